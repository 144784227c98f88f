"""Small forward passes of RC's networks."""

import torch

from pipeline.models import create_model
from pipeline.models.norms import BatchNorm

SIDE = 16
IMAGES = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
ADJUSTABLE = {"rc_r2": (2, 3, 4), "rc_r4": (1, 2, 3), "rc_early_exit": (2, 3, 4)}


def build(name, **options):
    """A network whose norms are not trivial, so that a wrong one shows."""
    torch.manual_seed(0)
    model = create_model(name, **options)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    return model


def logits(model, steps=None):
    with torch.no_grad():
        return model.eval()(IMAGES, steps).logits
