"""The tiny run on a CUDA device, read by DALI: it finishes, resumes, and is the CPU's network."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.manifest import Manifest
from pipeline.config import Augmentation
from pipeline.data import train_loader
from pipeline.distributed import World
from pipeline.run_directory import RunDirectory
from pipeline.training.checkpoint import CheckpointStore
from tests.training.conftest import Tiny, tiny, trace, train  # noqa: F401 - a fixture

pytestmark = pytest.mark.gpu
MID_EPOCH = 6  # of 12 steps, 4 an epoch


def weights(run: Path) -> torch.Tensor:
    """All weights and statistics of the newest checkpoint, in one vector."""
    found = CheckpointStore(RunDirectory(run).checkpoints, World(), 1).newest()
    assert found is not None
    tensors = sorted(found.load("model").items())
    return torch.cat([tensor.flatten().double() for _, tensor in tensors])


@pytest.mark.parametrize(
    ("precision", "compiled"), [("bf16", False), ("fp16", False), ("bf16", True)]
)
def test_finishes_and_resumes(
    tiny: Tiny,  # noqa: F811
    tmp_path: Path,
    precision: str,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What remains undetermined is the order of a few sums.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    values = {"train.precision": precision, "train.compile": compiled, "optimizer.lr": 0.01}
    config = tiny.config(**values)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(config, whole) == 0
    assert train(config, halves, stop_after=MID_EPOCH) == 0
    stopped = weights(halves)
    assert train(config, halves) == 0
    assert trace(halves).keys == trace(whole).keys
    expected, found = weights(whole), weights(halves)
    assert expected.isfinite().all()
    moved = (expected - stopped).norm()
    assert moved > 0
    assert (found - expected).norm() < 0.05 * moved


def test_batches_are_on_the_device(shards: Path) -> None:
    world = World.detect({})
    assert world.device.type == "cuda"
    loader = train_loader(
        Manifest.load(shards),
        reader="dali",
        augment=Augmentation(crop="pad", size=32),
        global_batch=16,
        accumulation=1,
        world=world,
        seed=0,
        workers=1,
    )
    for batch in loader:
        assert batch.images.device == batch.labels.device == world.device
        assert batch.images.shape == (16, 3, 32, 32)
        assert batch.images.isfinite().all()
        assert batch.images.std() > 0.1
    loader.close()


def test_evaluates_as_the_cpu_does(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    assert train(tiny.config(**{"train.epochs": 1, "train.evaluate_every": 1}), run) == 0
    on_cuda, cuda = evaluated(run, {})
    on_cpu, cpu = evaluated(run, {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})
    assert on_cuda["samples"] == on_cpu["samples"] == 16
    for name in ("keys", "labels"):
        np.testing.assert_array_equal(cuda[name], cpu[name])
    # A gate at the edge of its decision may fall either way under TF32.
    same = (cuda["steps"] == cpu["steps"]).all(1)
    assert same.mean() >= 0.8
    np.testing.assert_allclose(cuda["losses"][same], cpu["losses"][same], rtol=0.02, atol=0.02)


def evaluated(run: Path, environment: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Summary and per-sample results of `reprise eval` in an environment of its own."""
    # This process has joined a group of its own, which a new one must not take for its launcher's.
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR")
    kept = {name: value for name, value in os.environ.items() if name not in launched}
    subprocess.run(
        [str(Path(sys.executable).parent / "reprise"), "eval", str(run), "--quiet"],
        env=kept | environment,
        check=True,
        timeout=120,
    )
    (summary,) = RunDirectory(run).evaluation.rglob("summary.json")
    with np.load(summary.parent / "samples.npz") as stored:
        return json.loads(summary.read_text()), dict(stored)
