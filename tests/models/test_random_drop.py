"""Stochastic depth: what is drawn, and what evaluation makes of it (Huang et al. 2016)."""

from functools import partial
from pathlib import Path

import pytest
import torch

from pipeline.models import create_model
from pipeline.models.cells import BasicCell
from pipeline.models.norms import PerStepNorm, Step
from pipeline.models.routers import RandomDrop
from pipeline.models.routers.random_drop import linear_decay
from pipeline.models.stage import RecursiveCell
from tests.training.processes import on_ranks

N, C = 6, 4


def _cell(survival):
    torch.manual_seed(0)
    cell = BasicCell(C, C, norm=partial(PerStepNorm, steps=1))
    router = RandomDrop([survival])
    return RecursiveCell("cell", cell, steps=1, router=router, weighs="branch")


def test_training_keeps_or_drops_the_branch_of_all_samples():
    recursive = _cell(0.5)
    x = torch.randn(N, C, 5, 5)
    kept, dropped = recursive.cell(x, Step(0)), x.relu()
    torch.manual_seed(1)
    found = [recursive(x)[0] for _ in range(40)]
    drops = [torch.equal(y, dropped) for y in found]
    assert 10 < sum(drops) < 30
    assert all(
        torch.equal(y, dropped if drop else kept) for y, drop in zip(found, drops, strict=True)
    )


def test_gradients_of_a_dropped_cell_are_zero_and_not_missing():
    recursive = _cell(1e-9)
    recursive(torch.randn(N, C, 5, 5))[0].sum().backward()
    assert all(not parameter.grad.any() for parameter in recursive.parameters())


def test_evaluation_scales_the_residual_and_not_the_shortcut():
    recursive = _cell(0.7).eval()
    x = torch.randn(N, C, 5, 5)
    state = torch.get_rng_state()
    y, route = recursive(x)
    assert route is None
    torch.testing.assert_close(y, (x + 0.7 * recursive.cell.residual(x, Step(0))).relu())
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_is_the_mean_of_training_before_the_activation():
    router = RandomDrop([0.7])
    x = torch.zeros(N, 1, 1, 1)
    torch.manual_seed(0)
    draws = torch.stack([router(x) for _ in range(4000)])
    assert (draws == draws[:, :1]).all()
    assert draws[:, 0].mean().item() == pytest.approx(0.7, abs=0.02)
    assert router.eval()(x).tolist() == pytest.approx([0.7] * N)


@pytest.mark.parametrize(("name", "cells"), [("sd_resnet110", 54), ("sd_resnet101", 33)])
def test_survival_decays_linearly_to_one_half(name, cells):
    with torch.device("meta"):
        model = create_model(name)
    found = [
        survival for m in model.modules() if isinstance(m, RandomDrop) for survival in m.survival
    ]
    assert found == pytest.approx([1 - cell / cells / 2 for cell in range(1, cells + 1)])
    assert (linear_decay(1, cells), found[-1]) == (found[0], 0.5)


@pytest.mark.parametrize("survival", [0, -1, 1.1])
def test_what_is_no_probability_is_refused(survival):
    with pytest.raises(ValueError, match=rf"survival={survival} is not in \(0, 1\]: give"):
        RandomDrop([1, survival])


def _draws(world):
    torch.manual_seed(world.rank)  # as in training, where each rank has its own noise
    router = RandomDrop([0.5])
    return torch.stack([router(torch.zeros(2, 1, 1, 1)) for _ in range(32)])


def test_all_ranks_drop_the_same(tmp_path: Path):
    first, second = on_ranks(_draws, 2, tmp_path / "ranks")
    assert torch.equal(first, second)
    assert 0 < first.mean() < 1


ANY = ["resnet20", "r_resnet16", "r_mobilenet_v2", "rc_r2_3", "rc_s2_2", "rc_r4", "rs_3_all"]


@pytest.mark.parametrize("name", ANY)
def test_any_residual_cells_can_be_dropped(name):
    """Relaxed sharing, Sec. 3.2: nothing dies at the first, one in two at the last; ours evaluate
    with the rates of survival, and train with none left out as without."""
    torch.manual_seed(0)
    model, plain = create_model(name, death_rate=0.5), create_model(name)
    plain.load_state_dict(model.state_dict())
    drops = [m for m in model.modules() if isinstance(m, RandomDrop)]
    found = [survival for drop in drops for survival in drop.survival]
    assert found == pytest.approx(torch.linspace(1, 0.5, len(found)).tolist())
    images = torch.randn(4, 3, 64 if "mobile" in name else 16, 64 if "mobile" in name else 16)
    for drop in drops:
        drop.survival = (1.0,) * len(drop.survival)
    torch.testing.assert_close(model(images).logits, plain(images).logits)
    state = torch.get_rng_state()
    evaluated = model.eval()(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(route.executed.all() for route in evaluated.routes)
    torch.testing.assert_close(evaluated.logits, plain.eval()(images).logits)


def test_steps_of_one_cell_are_dropped_each_by_itself():
    torch.manual_seed(0)
    cell = BasicCell(C, C, norm=partial(PerStepNorm, steps=3))
    router = RandomDrop([1, 1e-9, 1])
    recursive = RecursiveCell("cell", cell, steps=3, router=router, weighs="branch").train()
    x = torch.randn(N, C, 5, 5)
    y, route = recursive(x)
    expected = cell(cell(x, Step(0)).relu(), Step(2))
    torch.testing.assert_close(y, expected)
    assert route.executed[0].tolist() == [True, False, True]


def test_an_ablated_step_loses_its_branch_in_evaluation_alone():
    recursive = _cell(0.7).eval()
    x = torch.randn(N, C, 5, 5)
    recursive.router.ablated = frozenset([0])
    assert torch.equal(recursive(x)[0], x.relu())


@pytest.mark.parametrize(
    ("name", "rate", "message"),
    [
        ("resnet20", 1.5, r"death_rate=1.5 is not in \(0, 1\): give"),
        ("rs_3", 0, r"death_rate=0 is not in \(0, 1\): give"),
        ("dr_resnet16", 0.5, "with dr_resnet16: its cells are left out by a router of their own"),
        ("sd_resnet20", 0.5, "with sd_resnet20: its cells are left out by a router of their own"),
        ("rc_r3_4", 0.5, "unknown option 'death_rate' of rc_r3_4"),
    ],
)
def test_stochastic_depth_that_makes_no_sense_is_refused(name, rate, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, death_rate=rate)
