"""Running statistics are averaged over the ranks where they are used, and nowhere else."""

import contextlib
from pathlib import Path

import torch

from pipeline.distributed import World
from pipeline.models import create_model
from pipeline.training.average import WeightAverage
from pipeline.training.statistics import LocalStatistics
from tests.training.processes import on_ranks


def averaged(world: World) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    model = create_model("resnet20")
    model.norm.running_mean.fill_(float(world.rank + 1))
    model.norm.running_var.fill_(10.0 * (world.rank + 1))
    statistics = LocalStatistics(model)
    with statistics.averaged(world):
        within = model.norm.running_mean.clone(), model.norm.running_var.clone()
    after = model.norm.running_mean.clone()
    with contextlib.suppress(ZeroDivisionError), statistics.averaged(world):
        raise ZeroDivisionError
    assert torch.equal(model.norm.running_mean, after), "an error leaves the mean behind"
    return (*within, after)


def test_mean_over_the_ranks_within_and_ones_own_after(tmp_path: Path) -> None:
    for rank, (mean, var, after) in enumerate(on_ranks(averaged, 2, tmp_path / "ranks")):
        torch.testing.assert_close(mean, torch.full((16,), 1.5))
        torch.testing.assert_close(var, torch.full((16,), 15.0))
        torch.testing.assert_close(after, torch.full((16,), float(rank + 1)))


def test_every_running_statistic_is_covered() -> None:
    model = create_model("dr_resnet16")
    names = {name for name in model.state_dict() if "running_" in name}
    assert names
    assert LocalStatistics(model).buffers.keys() == names


def averages_saved(world: World) -> dict[str, torch.Tensor]:
    """What a checkpoint would hold of the moving average, on ranks of different statistics."""
    torch.manual_seed(0)
    model = create_model("resnet20")
    average = WeightAverage(model, decay=0.9)
    with torch.no_grad():
        model.stem.weight.add_(1.0)
    average.update(model)
    model.norm.running_mean.fill_(float(world.rank + 1))
    with LocalStatistics(model).averaged(world):
        network = average.state_dict(model)["network"]
        return {name: network[name].clone() for name in ("norm.running_mean", "stem.weight")}


def test_the_moving_average_is_saved_with_the_mean_statistics(tmp_path: Path) -> None:
    ranks = on_ranks(averages_saved, 2, tmp_path / "ranks")
    for found in ranks:
        torch.testing.assert_close(found["norm.running_mean"], torch.full((16,), 1.5))
        torch.testing.assert_close(found["stem.weight"], ranks[0]["stem.weight"])
