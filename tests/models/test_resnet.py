"""The cell and the network around it, written out by hand."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from by_hand import normalise, random_norms

from pipeline.models import create_model
from pipeline.models.cells import BasicCell
from pipeline.models.norms import PerStepNorm, Step
from pipeline.models.shapes import ShapesOnly


def _cell(x, cell):
    """He et al. 2016: two convolutions and the shortcut, which pads new channels with zeros."""
    y = F.conv2d(x, cell.conv1.weight, stride=cell.conv1.stride, padding=1)
    y = F.conv2d(normalise(y, cell.norm1.norms[0]).relu(), cell.conv2.weight, padding=1)
    y = normalise(y, cell.norm2.norms[0])
    stride = x.shape[2] // y.shape[2]
    shortcut = torch.zeros_like(y)
    shortcut[:, : x.shape[1]] = x[:, :, ::stride, ::stride]
    return (y + shortcut).relu()


@pytest.mark.parametrize(("channels", "stride"), [((4, 4), 1), ((4, 8), 2), ((4, 6), 1)])
def test_basic_cell(channels, stride):
    torch.manual_seed(0)
    cell = BasicCell(*channels, stride=stride, norm=partial(PerStepNorm, steps=1)).eval()
    random_norms(cell)
    x = torch.randn(3, 4, 8, 8)
    y = cell(x, Step(0))
    assert y.shape == (3, channels[1], 8 // stride, 8 // stride)
    torch.testing.assert_close(y, _cell(x, cell))


def test_static_network_is_an_ordinary_resnet():
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=7).eval()
    random_norms(model)
    images = torch.randn(2, 3, 32, 32)
    x = normalise(F.conv2d(images, model.stem.weight, padding=1), model.norm).relu()
    sizes = []
    for stage in model.stages:
        for recursive in stage:
            x = _cell(x, recursive.cell)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    logits = x.flatten(2).mean(2) @ model.classifier.weight.T + model.classifier.bias
    output = model(images)
    torch.testing.assert_close(output.logits, logits)
    assert output.routes == ()


def test_pre_activation_network():
    """He et al., Identity mappings: no norm after the stem, one before the pooling."""
    torch.manual_seed(0)
    model = create_model("preact_resnet110", num_classes=7).eval()
    random_norms(model)
    images = torch.randn(2, 3, 8, 8)
    x = F.conv2d(images, model.stem.weight, padding=1)
    for stage in model.stages:
        assert len(stage) == 18
        for recursive in stage:
            cell = recursive.cell
            activated = normalise(x, cell.norm1.norms[0]).relu()
            y = F.conv2d(activated, cell.conv1.weight, stride=cell.conv1.stride, padding=1)
            y = F.conv2d(normalise(y, cell.norm2.norms[0]).relu(), cell.conv2.weight, padding=1)
            if cell.projection is not None:
                stride = cell.projection.stride
                x = F.conv2d(activated, cell.projection.weight, stride=stride)
            x = x + y
    assert x.shape == (2, 64, 2, 2)
    features = normalise(x, model.norm).relu().flatten(2).mean(2)
    logits = features @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(images).logits, logits)


@pytest.mark.parametrize(
    ("name", "t", "targets"),
    [
        (
            "aig_resnet50",
            0.7,
            [1, 1, 0.8, 1, 0.7, 0.7, 0.7, 1, 0.7, 0.7, 0.7, 0.7, 0.7, 1, 0.7, 1],
        ),
        (
            "aig_resnet50",
            0.4,
            [1, 1, 0.8, 1, 0.4, 0.4, 0.4, 1, 0.4, 0.4, 0.4, 0.4, 0.4, 1, 0.7, 1],
        ),
        ("aig_resnet101", 0.5, [1] * 8 + [0.5] * 25),
    ],
)
def test_targets_of_adaptive_inference_graphs(name, t, targets):
    """The schedules of Veit and Belongie's released code."""
    with ShapesOnly():
        model = create_model(name, target_rate=t)
    assert [cell.router.target for stage in model.stages for cell in stage] == targets


def test_recursive_network_repeats_the_cells_of_the_later_stages_only():
    stages = create_model("r_resnet32").stages
    assert [[recursive.steps for recursive in stage] for stage in stages] == [
        [1] * 9,
        [1, 4, 4],
        [1, 4, 4],
    ]
