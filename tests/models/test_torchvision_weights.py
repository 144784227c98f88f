"""torchvision's own networks and ours with its weights: one function."""

import pytest
import torch
import torchvision

from pipeline.models import create_model
from pipeline.models.torchvision_weights import translate

NAMES = {
    "resnet50": {"stride_on": "3x3"},
    "resnet101": {"stride_on": "3x3"},
    "mobilenet_v2": {},
}


def _theirs(name):
    """Random weights and statistics: what pretrained ones are, without a download."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1)
            module.bias.data.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
def _logits(name, theirs, size):
    """Theirs, and ours with their weights."""
    ours = create_model(name, **NAMES[name]).eval()
    ours.load_state_dict(translate(theirs.state_dict(), ours))
    images = torch.rand(1, 3, size, size)
    return theirs(images), ours(images).logits


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_torchvision(name):
    expected, found = _logits(name, _theirs(name), 224)
    assert expected.std() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_activations_of_mobilenet_v2_end_at_six():
    """As torchvision's, in a network in which each of them has something to cut off."""
    theirs = _theirs("mobilenet_v2")
    cuts = []
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(3, 6)
            module.bias.data.normal_(0, 3)
        if isinstance(module, torch.nn.ReLU6):
            module.register_forward_pre_hook(lambda _, x: cuts.append(bool((x[0] > 6).any())))
    expected, found = _logits("mobilenet_v2", theirs, 64)
    assert cuts
    assert all(cuts)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet20", {}, "torchvision has no counterpart of this ResNet: its weights are for"),
        ("resnet50", {}, "stride_on='1x1': .*build this network with stride_on='3x3'"),
        ("mobilenet_v2", {}, "'conv1.weight' is no name in torchvision's counterpart of this Mob"),
    ],
)
def test_other_networks_are_refused(name, options, message):
    with torch.device("meta"):
        model = create_model(name, **options)
    with pytest.raises(ValueError, match=message):
        translate({"conv1.weight": torch.zeros(1)}, model)
