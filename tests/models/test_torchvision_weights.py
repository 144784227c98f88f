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


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_torchvision(name):
    theirs = _theirs(name)
    ours = create_model(name, **NAMES[name]).eval()
    ours.load_state_dict(translate(theirs.state_dict(), ours))
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected, found = theirs(images), ours(images).logits
    assert expected.std() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


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
