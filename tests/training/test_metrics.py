"""The step metrics are means over the window's batches and over the ranks."""

import unittest.mock
from pathlib import Path

import pytest
import torch

from pipeline.config import Loss
from pipeline.data import Batch
from pipeline.distributed import World
from pipeline.models import CellRoute, Output
from pipeline.tasks import Classification
from pipeline.training.metrics import Window
from tests.training.processes import on_ranks


def two_batches(world: World) -> dict[str, float]:
    """Two batches of two samples on each rank, with losses that no two of them share."""
    clock = unittest.mock.Mock(return_value=100.0)
    with unittest.mock.patch("time.perf_counter", clock):
        return _two_batches(world, clock)


def _two_batches(world: World, clock: unittest.mock.Mock) -> dict[str, float]:
    window = Window()
    for number in range(2):
        loss = torch.tensor(1.0 + number + 10 * world.rank)
        weights = torch.tensor([[1.0, float(number)], [1.0, float(world.rank)]])
        route = CellRoute("cell", weights, weights > 0, 0.7)
        ungated = CellRoute("fixed", torch.ones(2, 1), torch.ones(2, 1) > 0, None)
        terms = {"cross_entropy": loss, "execution_rate": 2 * loss}
        output = Output(torch.eye(3)[[number, 2]], (route, ungated))
        batch = Batch(torch.zeros(2, 3, 8, 8), torch.tensor([world.rank, 2]), ("a", "b"))
        window.add(terms, Classification(Loss()).training_metrics(output, batch), output)
    clock.return_value = 104.0
    return window.point(world)


def test_means_over_the_batches() -> None:
    point = two_batches(World())
    assert point == pytest.approx(
        {
            "train/loss": 4.5,
            "train/cross_entropy": 1.5,
            "train/execution_rate": 3.0,
            "train/rate/cell/1": 1.0,
            "train/rate/cell/2": 0.25,
            "train/rate/fixed/1": 1.0,
            "train/top1": 0.75,
            "train/images_per_second": 1.0,
        }
    )


def test_means_over_the_ranks(tmp_path: Path) -> None:
    for point in on_ranks(two_batches, 2, tmp_path / "ranks"):
        assert point["train/cross_entropy"] == pytest.approx(6.5)
        assert point["train/loss"] == pytest.approx(19.5)
        assert point["train/rate/cell/1"] == 1.0
        assert point["train/rate/cell/2"] == 0.5
        assert point["train/top1"] == 0.75
        assert point["train/images_per_second"] == 2.0  # of both ranks together


def test_an_empty_window_has_no_point() -> None:
    assert Window().point(World()) == {}
