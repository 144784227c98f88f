"""Parts of the networks that the tests write out by hand."""

import torch
import torch.nn.functional as F


def normalise(x, norm):
    """Batch norm in evaluation, of (N, C) or (N, C, H, W)."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


def random_norms(model):
    """Norms of which none is trivial, so that a missing or a wrong one shows."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
