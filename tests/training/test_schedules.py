"""Schedules against torch's own."""

import pytest
import torch
from torch.optim import lr_scheduler

from pipeline.config import Schedule
from pipeline.training.schedules import factor

PER_EPOCH, EPOCHS = 7, 10
TOTAL = PER_EPOCH * EPOCHS


def torchs(build: object, **options: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build(optimizer, **options)
    rates = []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def ours(**options: object) -> list[float]:
    at = factor(Schedule(**options), PER_EPOCH, TOTAL)
    return [at(step) for step in range(TOTAL)]


def test_constant() -> None:
    assert ours() == [1.0] * TOTAL


def test_step() -> None:
    expected = torchs(
        lr_scheduler.MultiStepLR, milestones=[3 * PER_EPOCH, 6 * PER_EPOCH], gamma=0.1
    )
    assert ours(name="step", milestones=(3, 6)) == pytest.approx(expected)


def test_cosine() -> None:
    assert ours(name="cosine") == pytest.approx(
        torchs(lr_scheduler.CosineAnnealingLR, T_max=TOTAL), abs=1e-9
    )


def test_one_cycle() -> None:
    expected = torchs(
        lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=TOTAL, pct_start=(0.3 * TOTAL + 1) / TOTAL
    )
    assert ours(name="one_cycle", peak=0.3) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_warm_up_is_linear_and_meets_the_schedule(name: str) -> None:
    rates = ours(name=name, warmup_epochs=2)
    warm = 2 * PER_EPOCH
    assert rates[:warm] == pytest.approx([(step + 1) / warm for step in range(warm)])
    assert rates[warm] == pytest.approx(1.0)
    assert rates[-1] == (1.0 if name == "constant" else pytest.approx(0.0, abs=1e-3))


def test_milestones_count_from_the_start_of_training_not_of_the_end_of_warm_up() -> None:
    rates = ours(name="step", milestones=(3,), warmup_epochs=1)
    assert rates[3 * PER_EPOCH - 1] == 1.0
    assert rates[3 * PER_EPOCH] == pytest.approx(0.1)
