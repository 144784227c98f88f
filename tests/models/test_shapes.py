"""Shapes without values: the counter of multiply-adds against PyTorch's own, and no draws."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models import create_model, list_models
from pipeline.models.cost import measure
from pipeline.models.pool import Pool
from pipeline.models.scorers import Scorer
from pipeline.models.shapes import ShapesOnly
from pipeline.models.stage import RecursiveCell
from tests.conftest import ROOT

LAYERS = {
    "convolution": (nn.Conv2d(4, 6, 3, bias=False), (2, 4, 9, 7)),
    "strided": (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2)), (1, 4, 9, 7)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2, padding=1), (1, 4, 9, 7)),
    "grouped": (nn.Conv2d(4, 6, 1, groups=2), (3, 4, 9, 7)),
    "linear": (nn.Linear(5, 3), (2, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_has_the_shape_and_the_multiply_adds_that_torch_counts(name: str) -> None:
    layer, shape = LAYERS[name]
    with FlopCounterMode(display=False) as torchs:
        expected = layer(torch.zeros(shape)).shape
    with ShapesOnly() as shapes:
        assert layer(torch.zeros(shape)).shape == expected
    assert 2 * shapes.multiply_adds == torchs.get_total_flops()


def test_an_lstm_cell_has_four_gates_over_input_and_hidden_state() -> None:
    with ShapesOnly() as shapes:
        hidden, cell = nn.LSTMCell(5, 7)(torch.zeros(3, 5))
    assert hidden.shape == cell.shape == (3, 7)
    assert shapes.multiply_adds == 3 * 4 * 7 * (5 + 7)


@pytest.mark.parametrize("name", list_models())
def test_a_network_has_the_multiply_adds_that_torch_counts(name: str) -> None:
    """All steps, whatever the gates say."""
    model = create_model(name).eval()
    for module in model.modules():
        if isinstance(module, RecursiveCell | Pool):
            module.training = True
    images = torch.zeros(1, model.channels, 64, 64)
    with torch.no_grad(), ShapesOnly() as shapes:
        model(images)
    with torch.no_grad(), FlopCounterMode(display=False) as torchs:
        model(images)
    assert 2 * shapes.multiply_adds == torchs.get_total_flops()


@pytest.mark.parametrize("name", list_models())
def test_nothing_is_drawn(name: str) -> None:
    before = torch.random.get_rng_state()
    with ShapesOnly():
        create_model(name)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_nothing_is_drawn_for_the_cost_of_a_network_that_draws_its_weights() -> None:
    model = create_model("reset_1_1_5")
    model.scorer = Scorer("gumbel", temperature=0.5)
    before = torch.random.get_rng_state()
    measure(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_planning_loads_no_compiler() -> None:
    program = (
        "import sys; from pipeline.models import create_model;"
        "from pipeline.models.cost import measure_choices;"
        "from pipeline.models.shapes import ShapesOnly\n"
        "for name in ('dr_resnet16', 'rc_r2', 'reset38', 'rs_18_all', 'dr_mobilenet_v2'):\n"
        "    with ShapesOnly(): model = create_model(name)\n"
        "    measure_choices(model)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "False\n"
