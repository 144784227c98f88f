"""Runs of a tiny network on the tiny shard set."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.tasks import LocalRanks, Train
from pipeline import configure
from pipeline.config import Config
from pipeline.distributed import World
from pipeline.run_directory import RunDirectory
from pipeline.tracking import Tracker
from pipeline.training.checkpoint import CheckpointStore, read_state


@dataclass(frozen=True)
class Tiny:
    """Configurations of 64 images, batch 16: four steps an epoch, three epochs."""

    shards: Path

    def config(self, **overrides: Any) -> Config:
        values = {
            "name": "tiny",
            "model": "dr_resnet16",
            "data": {"path": str(self.shards), "augment": {"crop": "pad", "size": 32}},
            "optimizer": {"lr": 0.05, "nesterov": True, "weight_decay": 5e-4},
            "schedule": {"name": "one_cycle"},
            "train": {"epochs": 3, "batch_size": 16, "evaluate_every": 3},
        }
        return configure.build(values, [f"{key}={value}" for key, value in overrides.items()])


@pytest.fixture
def tiny(shards: Path, database: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tiny:
    monkeypatch.chdir(tmp_path)  # where the tracking store is
    shutil.copy(database, tmp_path / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Tiny(shards)


@pytest.fixture
def journal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare a test of something else the seconds of the process that carries the journal away."""
    monkeypatch.setattr(Tracker, "start", lambda self: None)
    monkeypatch.setattr(Tracker, "finish", lambda self, status: True)


def train(config: Config, run: Path, *, nproc: int = 1, stop_after: int | None = None) -> int:
    """Train as the command does; the exit status."""
    task: Callable[[], int] = Train(config, run, quiet=True, stop_after=stop_after)
    return LocalRanks(task, nproc)() if nproc > 1 else task()


@dataclass(frozen=True)
class Trace:
    """What two runs that did the same have in common: weights, and the ordered sample keys."""

    weights: str
    averages: str
    keys: tuple[str, ...]


def trace(run: Path) -> Trace:
    """Hashes of the newest checkpoint."""
    found = CheckpointStore(RunDirectory(run).checkpoints, World(), 1).newest()
    assert found is not None
    ranks = [read_state(path) for path in sorted(found.path.glob("rank-*.safetensors"))]
    averages = found.load("average")["network"] if "average" in found.states else {}
    return Trace(
        weights=digest(found.load("model")),
        averages=digest(averages),
        keys=tuple(rank["progress"]["keys_digest"] for rank in ranks),
    )


def digest(tensors: Mapping[str, Any]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode() + tensor.numpy().tobytes())
    return total.hexdigest()
