"""R_3 and S_3 of the RC paper: their sizes, their graph, and residual learning."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.models import create_model, list_models, task_of
from pipeline.models.cost import measure
from pipeline.models.norms import BANKS, NormBank, Step
from pipeline.models.stage import RecursiveCell

STEPS = (1, 2, 3, 4)
FIRST, LAST = 9 * 64 + 64, 64 * 9 + 1  # 3x3 convolutions between 1 and 64 channels, with biases
CONVOLUTION = 64 * 64 * 9
NORM = 2 * 64


def built(name, **options):
    """A network whose last layer is not at its initial zero any more."""
    torch.manual_seed(0)
    model = create_model(name, **options)
    torch.nn.init.normal_(model.last.weight, std=0.05)
    return model


@pytest.mark.parametrize("n", STEPS)
def test_sizes_and_costs_by_hand(n):
    recurrent, standard = (measure(create_model(f"rc_{kind}3_{n}")) for kind in "rs")
    assert recurrent.parameters == FIRST + 3 * (CONVOLUTION + n * NORM) + LAST
    assert standard.parameters == FIRST + 3 * n * (CONVOLUTION + NORM) + LAST
    assert recurrent.nominal == standard.nominal
    assert recurrent.nominal == 40 * 40 * (2 * 9 * 64 + 3 * n * CONVOLUTION)


def test_golden_sizes():
    sizes = {name: measure(create_model(name)).parameters for name in list_models("rc_*3_*")}
    assert sizes == {
        "rc_r3_1": 112_193,
        "rc_r3_2": 112_577,
        "rc_r3_3": 112_961,
        "rc_r3_4": 113_345,
        "rc_s3_1": 112_193,
        "rc_s3_2": 223_169,
        "rc_s3_3": 334_145,
        "rc_s3_4": 445_121,
    }
    assert {task_of(name) for name in sizes} == {"denoising"}
    assert task_of("resnet20") == "classification"


@pytest.mark.parametrize(
    ("norm", "parameters"),
    [
        ("none", FIRST + 3 * (CONVOLUTION + 64) + LAST),  # a bias where there is no norm
        ("shared", FIRST + 3 * (CONVOLUTION + NORM) + LAST),
        ("per_step", FIRST + 3 * (CONVOLUTION + 4 * NORM) + LAST),
    ],
)
def test_sizes_of_the_norms_of_table_3(norm, parameters):
    model = create_model("rc_r3_4", norm=norm)
    assert measure(model).parameters == parameters
    banks = [module for module in model.modules() if isinstance(module, NormBank)]
    assert [type(bank) for bank in banks] == [BANKS[norm]] * 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["none", "shared", "per_step"])
def test_the_recurrent_network_is_its_equation(norm, training):
    # In double precision: the network chooses a memory format, which rounds in another order.
    model, same = (built("rc_r3_3", norm=norm).train(training).double() for _ in range(2))
    noisy = torch.rand(2, 1, 9, 12, dtype=torch.float64)
    restored, routes = model(noisy)
    x = F.relu(same.first(noisy))
    for cell in same.cells:
        for step in range(3):
            x = F.relu(cell.cell.norm(cell.cell.conv(x), Step(step)))
    torch.testing.assert_close(restored, noisy + same.last(x))  # Eq. 7
    assert restored.shape == noisy.shape
    assert [route.cell for route in routes] == ["cells.0", "cells.1", "cells.2"]
    assert all(bool(route.executed.all()) and route.target is None for route in routes)


@pytest.mark.parametrize("n", STEPS)
def test_the_standard_network_with_equal_cells_is_the_recurrent_one(n):
    recurrent, standard = built(f"rc_r3_{n}"), built(f"rc_s3_{n}")
    assert all(cell.is_static for cell in standard.cells)
    standard.first, standard.last = recurrent.first, recurrent.last
    for number, cell in enumerate(standard.cells):
        loop, step = recurrent.cells[number // n].cell, number % n
        cell.cell.conv.load_state_dict(loop.conv.state_dict())
        cell.cell.norm.norms[0].load_state_dict(loop.norm.norms[step].state_dict())
    noisy = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(standard(noisy).prediction, recurrent(noisy).prediction)


def test_training_begins_at_the_noisy_image():
    noisy = torch.rand(2, 1, 8, 8)
    assert torch.equal(create_model("rc_r3_2")(noisy).prediction, noisy)


@pytest.mark.parametrize("name", ["rc_r3_2", "rc_s3_2"])
def test_every_parameter_is_trained(name):
    model = built(name)
    model(torch.rand(2, 1, 8, 8)).prediction.square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in model.parameters())


def test_roles():
    roles = create_model("rc_r3_2").roles()
    assert roles["cells.0.cell.conv.weight"] == "shared"
    assert roles["cells.0.cell.norm.norms.1.weight"] == "norm"
    assert roles["first.weight"] == roles["last.bias"] == "rest"
    assert "shared" not in create_model("rc_r3_1").roles().values()
    assert "shared" not in create_model("rc_s3_2").roles().values()


def test_cells_are_recursive_cells():
    cells = [m for m in create_model("rc_r3_4").modules() if isinstance(m, RecursiveCell)]
    assert [cell.steps for cell in cells] == [4, 4, 4]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rc_r3_5", {}, "unknown model 'rc_r3_5': did you mean 'rc_[rs]3_"),
        ("rc_r3_4", {"norm": "lvbn"}, "norm='lvbn' is unknown: choose one of .*per_step.*none"),
        ("rc_r3_4", {"norm": "gated_per_step"}, "needs a router that skips samples"),
        ("rc_s3_4", {"norm": "shared"}, "norm='shared' with rc_s3_4: it uses every cell once"),
        ("rc_r3_4", {"sync_norm": "no"}, "sync_norm='no' is neither true nor false"),
        ("rc_r3_4", {"num_classes": 10}, "unknown option 'num_classes' of rc_r3_4"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)
