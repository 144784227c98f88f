"""Running statistics are averaged over the ranks where they are used, and nowhere else."""

from pathlib import Path

import torch

from pipeline.distributed import World
from pipeline.models import create_model
from pipeline.training.statistics import LocalStatistics
from tests.training.processes import on_ranks


def averaged(world: World) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    model = create_model("resnet20")
    model.norm.running_mean.fill_(float(world.rank + 1))
    model.norm.running_var.fill_(10.0 * (world.rank + 1))
    with LocalStatistics(model).averaged(world):
        within = model.norm.running_mean.clone(), model.norm.running_var.clone()
    return (*within, model.norm.running_mean.clone())


def test_mean_over_the_ranks_within_and_ones_own_after(tmp_path: Path) -> None:
    for rank, (mean, var, after) in enumerate(on_ranks(averaged, 2, tmp_path / "ranks")):
        torch.testing.assert_close(mean, torch.full((16,), 1.5))
        torch.testing.assert_close(var, torch.full((16,), 15.0))
        torch.testing.assert_close(after, torch.full((16,), float(rank + 1)))


def test_own_values_return_after_an_error() -> None:
    model = create_model("resnet20")
    statistics = LocalStatistics(model)
    own = model.norm.running_mean.clone()
    try:
        with statistics.averaged(World()):
            raise RuntimeError
    except RuntimeError:
        pass
    assert torch.equal(model.norm.running_mean, own)


def test_every_running_statistic_is_covered() -> None:
    model = create_model("dr_resnet16")
    names = {name for name in model.state_dict() if "running_" in name}
    assert names
    assert LocalStatistics(model).buffers.keys() == names
