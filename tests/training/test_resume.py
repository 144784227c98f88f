"""2N steps in one go equal N, stop, resume, N: same weights bit by bit, same ordered keys."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.run_directory import RunDirectory
from tests.training.conftest import Tiny, trace, train

pytestmark = pytest.mark.usefixtures("journal_only")  # in this process; ranks of their own track

MID_EPOCH = 6  # of 12 steps, 4 an epoch

# Some processors have no fast kernels for convolutions in half precision.
SMALL = {"data.augment": "{crop: pad, size: 8}"}
VARIANTS = {
    "fp32": {},
    "bf16": {"train.precision": "bf16", **SMALL},
    "fp16": {"train.precision": "fp16", "optimizer.lr": 0.01, **SMALL},
    "zero": {"train.zero_stage": 1},
    "zero bf16": {"train.zero_stage": 1, "train.precision": "bf16", **SMALL},
    "zero fp16": {
        "train.zero_stage": 1,
        "train.precision": "fp16",
        "optimizer.lr": 0.01,
        **SMALL,
    },
    "adamw accumulated, averaged": {
        "optimizer.name": "adamw",
        "optimizer.lr": 0.001,
        "optimizer.nesterov": "false",
        "optimizer.clip_norm": 1.0,
        "train.accumulation": 2,
        "train.ema_decay": 0.9,
    },
    "zero adam": {
        "optimizer.name": "adam",
        "optimizer.lr": 0.001,
        "optimizer.nesterov": "false",
        "train.zero_stage": 1,
    },
    "torch reader": {"data.reader": "torch", "data.workers": 0},
    "at the end of an epoch": {},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_rank(tiny: Tiny, tmp_path: Path, variant: str) -> None:
    config = tiny.config(**VARIANTS[variant])
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    stop_after = 4 if variant == "at the end of an epoch" else MID_EPOCH
    assert train(config, whole) == 0
    assert train(config, halves, stop_after=stop_after) == 0
    stopped = trace(halves)
    assert train(config, halves) == 0
    assert trace(halves) == trace(whole)
    assert trace(halves).weights != stopped.weights


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_two_ranks(tiny: Tiny, tmp_path: Path, zero_stage: int) -> None:
    config = tiny.config(**{"train.zero_stage": zero_stage, "train.ema_decay": 0.9})
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(config, whole, nproc=2) == 0
    assert train(config, halves, nproc=2, stop_after=MID_EPOCH) == 0
    assert train(config, halves, nproc=2) == 0
    assert trace(halves) == trace(whole)
    assert len(set(trace(whole).keys)) == 2


def test_a_checkpoint_or_an_evaluation_on_the_way_changes_nothing(
    tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny.config()
    busy = tiny.config(**{"train.evaluate_every": 1, "checkpoints.every_steps": 1})
    assert train(config, tmp_path / "calm", nproc=2) == 0
    assert train(busy, tmp_path / "busy", nproc=2) == 0
    assert trace(tmp_path / "busy") == trace(tmp_path / "calm")


def test_another_seed_gives_other_weights_and_another_order(tiny: Tiny, tmp_path: Path) -> None:
    assert train(tiny.config(seed=0), tmp_path / "a", stop_after=2) == 0
    assert train(tiny.config(seed=1), tmp_path / "b", stop_after=2) == 0
    a, b = trace(tmp_path / "a"), trace(tmp_path / "b")
    assert a.weights != b.weights
    assert a.keys != b.keys


def test_a_run_on_two_ranks_goes_on_on_one(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(**{"train.zero_stage": 1})
    assert train(config, tmp_path / "run", nproc=2, stop_after=MID_EPOCH) == 0
    assert train(config, tmp_path / "run") == 0
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert "resuming on 1 ranks what 2 saved" in log


def test_a_finished_run_is_left_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    config, run = tiny.config(**{"train.epochs": 1}), tmp_path / "run"
    assert train(config, run) == 0
    before = {path: path.stat().st_mtime_ns for path in RunDirectory(run).checkpoints.rglob("*")}
    assert train(config, run) == 0
    after = {path: path.stat().st_mtime_ns for path in RunDirectory(run).checkpoints.rglob("*")}
    assert after == before


def test_a_run_killed_with_kill_9_goes_on_as_if_it_had_not_been(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(**{"checkpoints.every_steps": 2, "train.epochs": 6})
    (tmp_path / "tiny.yaml").write_text(config.to_yaml())
    command = [Path(sys.executable).with_name("reprise"), "train", "tiny.yaml", "--quiet", "--run"]
    killed = subprocess.Popen([*command, "killed"], cwd=tmp_path)
    while not list(tmp_path.glob("killed/checkpoints/step-00000000[46]")):
        assert killed.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    for run in ("killed", "whole"):
        subprocess.run([*command, run], cwd=tmp_path, check=True)
    assert "resumed from" in (tmp_path / "killed" / "logs" / "rank-0.log").read_text()
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")
