"""Faults on two ranks: the run goes on later as if nothing had been (weights and ordered keys)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.tracking import history
from pipeline.training.checkpoint import find
from tests.conftest import ROOT
from tests.training.conftest import Tiny, Trace, tiny, trace, train  # noqa: F401 - a fixture

TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node", "2", "-m", "--")
FAULTY = "tests.training.faults"
SAVE_EVERY = 3
PATIENCE = 120  # seconds


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """What two ranks train that nothing happens to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(_config(Tiny(shards)), run, nproc=2) == 0
    return trace(run)


def _config(tiny: Tiny) -> Config:  # noqa: F811
    return tiny.config(**{"checkpoints.every_steps": SAVE_EVERY})


def strike(
    folder: Path, recipe: Path, fault: str, rank: int, step: int
) -> "subprocess.CompletedProcess[str]":
    """The whole training under torchrun, with the fault; the launcher's end."""
    program = Path(sys.executable).with_name(TORCHRUN[0])
    return subprocess.run(
        [
            program,
            *TORCHRUN[1:],
            FAULTY,
            fault,
            str(rank),
            str(step),
            "train",
            recipe,
            "--run",
            "run",
        ],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize(
    ("fault", "rank", "step", "kept"),
    [
        ("kill_in_step", 1, 7, 6),
        ("kill_in_step", 0, 7, 6),
        ("kill_before_own_state", 1, 6, 3),
        ("kill_before_publishing", 0, 6, 3),
    ],
)
def test_a_killed_rank_ends_the_others_and_costs_the_steps_since_the_checkpoint(
    tiny: Tiny,  # noqa: F811
    tmp_path: Path,
    whole: Trace,
    fault: str,
    rank: int,
    step: int,
    kept: int,
) -> None:
    recipe, run = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(_config(tiny).to_yaml())
    done = strike(tmp_path, recipe, fault, rank, step)
    assert done.returncode != 0
    assert "bug of Reprise" not in done.stderr, done.stderr
    assert max(path.name for path in (run / "checkpoints").glob("step-*")) == f"step-{kept:09d}"
    assert train(_config(tiny), run, nproc=2) == 0
    assert (
        f"resumed from {run}/checkpoints/step-{kept:09d}" in (run / "logs/rank-0.log").read_text()
    )
    assert not list((run / "checkpoints").glob(".*"))
    assert trace(run) == whole


@pytest.mark.parametrize(
    ("fault", "step", "every", "said"),
    [
        ("stop_in_evaluation", 8, 100, "the evaluation at step 8 is left to the resumed run"),
        ("stop_thrice", 7, 100, "the evaluation at step 8 is left to the resumed run"),
        ("kill_in_evaluation", 8, 4, "saved checkpoint at step 8"),
    ],
)
def test_a_stop_costs_the_evaluation_that_is_due_and_no_step(
    tiny: Tiny,  # noqa: F811
    tmp_path: Path,
    whole: Trace,
    fault: str,
    step: int,
    every: int,
    said: str,
) -> None:
    """Two of eight images a rank are evaluated when it comes; a kill finds what was due saved."""
    config = tiny.config(
        **{"train.evaluate_every": 1, "data.eval_batch_size": 2, "checkpoints.every_steps": every}
    )
    recipe, run = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(config.to_yaml())
    done = strike(tmp_path, recipe, fault, 1, step)
    assert done.returncode != 0
    assert "bug of Reprise" not in done.stderr, done.stderr
    assert said in (run / "logs/rank-0.log").read_text()
    assert [at for at, _ in history(run)["eval/top1"]] == [4]
    newest = find(run / "checkpoints")
    assert (newest.step, newest.score, newest.evaluated) == (8, None, False)
    assert train(config, run, nproc=2) == 0
    assert f"resumed from {newest.path}" in (run / "logs/rank-0.log").read_text()
    assert trace(run) == whole
    assert [at for at, _ in history(run)["eval/top1"]] == [4, 8, 12]
    scores = {found.step: found for found in (find(run / "checkpoints", at=n) for n in (8, 12))}
    for at, value in history(run)["eval/top1"][1:]:
        assert (scores[at].score, scores[at].evaluated) == (value, True)


def test_signals_to_one_rank_in_a_step_and_in_its_save_stop_once(
    tiny: Tiny,  # noqa: F811
    tmp_path: Path,
    whole: Trace,
) -> None:
    recipe, run = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(_config(tiny).to_yaml())
    done = strike(tmp_path, recipe, "stop_thrice", 1, 4)
    assert done.returncode != 0
    assert "bug of Reprise" not in done.stderr, done.stderr
    assert done.stderr.count("stopped with a checkpoint") == 1
    # The wish of step 4 is heard where the ranks agree, in step 5.
    steps = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert steps == ["step-000000003", "step-000000005"]
    assert train(_config(tiny), run, nproc=2) == 0
    assert trace(run) == whole
