"""Jobs by the name of their run: listed, read, cancelled, resumed, swept, given up, drilled."""

import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs.record import SAME_STEP, Job, newest_step
from pipeline import tracking
from tests.cluster.conftest import (
    LATER,
    PATIENCE,
    SOON,
    Submitted,
    jobs_of,
    reprise,
    slurm,
    start,
)
from tests.conftest import ROOT
from tests.training.conftest import Trace, trace

Submit = Callable[..., Submitted]
ALIKE = ("model=resnet20", "model_options.sync_norm=true")
LONG = ("train.epochs=50", "train.batch_size=32", "train.evaluate_every=50", "train.log_every=1",
        "optimizer.lr=0.005", "data.augment.size=16")  # fmt: skip
"""100 steps of twice the images and four times the pixels: time enough for three commands while it
trains; at a rate at which sums in another order do not grow into another loss (at 0.05 they do,
to 9 % within 40 steps)."""


ENDS = {"rank-0.end.json", "rank-1.end.json"}


def row(run: Submitted) -> str:
    shown = reprise("runs", "--runs", ".", cwd=run.run.parent)
    assert shown.returncode == 0, shown.stderr
    (line,) = [
        line for line in shown.stdout.splitlines()[2:] if line.startswith(f"{run.run.name} ")
    ]
    return line


def history(run: Path) -> list[tuple[int, float]]:
    """Every step of a run with its loss."""
    return tracking.history(run)["train/loss"]


def test_drill_and_doctor(tmp_path: Path) -> None:
    drilled = reprise("drill", "--cluster", "lab", "--quiet", cwd=tmp_path)
    assert drilled.returncode == 0, drilled.stderr
    assert "the same weights bit by bit" in drilled.stdout
    deadline = time.monotonic() + PATIENCE
    while jobs_of(tmp_path):
        assert time.monotonic() < deadline, "the drill leaves jobs behind"
        time.sleep(0.5)
    examined = reprise("doctor", "--cluster", "lab", "--data", "runs/drill/digits", cwd=tmp_path)
    assert examined.returncode == 0, examined.stdout + examined.stderr
    assert "2 ranks on" in examined.stdout or "4 ranks on" in examined.stdout


def test_the_time_limit(submit: Submit) -> None:
    run = submit("--time", "2m", "train.epochs=9000", "train.evaluate_every=9000",
                 "train.log_every=1", "checkpoints.every_steps=9000", cluster=LATER)  # fmt: skip
    start(run.job.id)
    run.until(lambda: "step 1 of" in run.log, "it trains")
    run.sleeps()
    run.goes_on()
    assert run.log.count("stopped with a checkpoint") == 1
    cancelled = reprise("cancel", "run", cwd=run.run.parent)
    assert cancelled.returncode == 0, cancelled.stderr
    run.until(lambda: not jobs_of(run.run.parent), "the job has ended")
    run.until(lambda: run.state.startswith("CANCELLED"), "the accounting knows")
    assert run.restarts == 1


def test_two_nodes_one_node_two_nodes(submit: Submit, recipe: Path) -> None:
    """The global batch and its order stay, and with them the loss: to 2 % of the uninterrupted
    run's in every ten steps, where nothing is random and the norms see the whole batch."""
    run = submit(*ALIKE, *LONG)
    folder = run.run.parent
    words = ("train", recipe, *ALIKE, *LONG, "--nproc", 2, "--run", "whole")
    alone = ThreadPoolExecutor().submit(reprise, *words, cwd=folder)
    for starts, nodes in enumerate((1, 2)):
        run.until(lambda starts=starts: run.resumed == starts, "the run goes on")
        run.trains()
        assert "running" in row(run)
        assert f"{run.job.id} on lab" in row(run)
        cancelled = reprise("cancel", "run", "--runs", ".", cwd=folder)
        assert cancelled.returncode == 0, cancelled.stderr
        run.until(lambda: not jobs_of(folder), "the job has ended")
        assert "cancelled" in row(run)
        resumed = reprise("resume", "run", "--runs", ".", "--nodes", nodes, cwd=folder)
        assert resumed.returncode == 0, resumed.stderr
    run.finished()
    assert "finished" in row(run)
    assert "50.0 of 50" in row(run)
    assert "resuming on 1 ranks what 2 saved" in run.log
    assert "resuming on 2 ranks what 1 saved" in run.log
    logged = reprise("logs", "run", "--runs", ".", "--rank", 1, "-f", cwd=folder)
    assert logged.stdout == (run.run / "logs" / "rank-1.log").read_text()
    refused = reprise("resume", "run", "--runs", ".", cwd=folder)
    assert refused.returncode == 2
    assert "has finished" in refused.stderr
    assert alone.result().returncode == 0, alone.result().stderr
    ours, theirs = dict(history(run.run)), dict(history(folder / "whole"))
    assert len(ours) == len(theirs) == 100
    for first in range(1, 100, 10):
        window = range(first, first + 10)
        mean = sum(theirs[step] for step in window) / 10
        assert abs(sum(ours[step] for step in window) / 10 - mean) < 0.02 * mean


def test_a_sweep_of_ten_with_one_that_fails(submit: Submit, recipe: Path, tmp_path: Path) -> None:
    """In two arrays, because the lab takes no larger ones; the tenth member is mended alone."""
    small = ["train.epochs=1", "train.evaluate_every=1"]
    seeds = ",".join(map(str, range(10)))
    done = reprise(
        "submit", recipe, "--sweep", f"seed={seeds}", *small, "--cluster", LATER,
        "--gpus-per-node", 1, "--time", "10m", "--max-parallel", 2, "--run", "sweep",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (tmp_path / "sweep" / "seed=9" / "checkpoints").write_text("in the way")
    members = [Submitted(tmp_path / "sweep" / f"seed={seed}") for seed in range(10)]
    assert len({member.job.id for member in members}) == 10
    arrays = {member.job.id.split("_")[0] for member in members}
    assert len(arrays) == 2
    for array in arrays:
        start(array)
    for member in members[:9]:
        member.finished()
    bad = members[9]
    with pytest.raises(AssertionError, match="status 2"):
        bad.until(lambda: False, "it is given up")
    (bad.run / "checkpoints").unlink()
    again = reprise("resume", "sweep/seed=9", "--runs", ".", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    start(bad.job.id)
    bad.finished()
    with sqlite3.connect(tmp_path / "mlflow.db") as rows:
        parents = rows.execute(
            "select value, count(*) from tags where key = 'mlflow.parentRunId' group by value"
        ).fetchall()
        (finished,) = rows.execute("select count(*) from runs where status = 'FINISHED'").fetchone()
    assert [count for _, count in parents] == [10]
    assert finished == 11  # the parent too


def test_a_job_that_fails_at_the_same_step_is_given_up(submit: Submit) -> None:
    """The job runs the snapshot, and nothing else: it is broken, the installed code is not."""
    run = submit(cluster=LATER)
    code = run.run / "code" / "pipeline" / "training" / "run.py"
    code.write_text(code.read_text() + "\nraise RuntimeError('broken snapshot')\n")
    start(run.job.id)
    with pytest.raises(AssertionError, match="failed 3 times at step 0"):
        run.until(lambda: False, "it is given up")
    run_states = [failure.step for failure in run.job.failures]
    assert run_states == [0] * SAME_STEP
    # Of each start what its own ranks have left, and not those of the one before.
    said = [failure.said.partition(": ")[2] for failure in run.job.failures]
    assert said == ["RuntimeError: broken snapshot"] * SAME_STEP
    assert {file.name for file in run.run.glob("logs/*.end.json")} <= ENDS
    assert "stopped: failed 3 times at step 0, last with status 70" in row(run)
    shown = reprise("logs", "run", "--runs", ".", cwd=run.run.parent)
    assert "broken snapshot" in shown.stdout


def test_a_mistake_that_one_rank_meets_while_the_other_is_not_there_yet(submit: Submit) -> None:
    """srun ends the other one, which does not listen to signals yet, and tells that one's end."""
    run = submit(cluster=LATER)
    code = run.run / "code"
    slow = "\nimport os, time\nif os.environ.get('SLURM_PROCID') == '0': time.sleep(600)\n"
    wrong = "\nfrom pipeline.config import ConfigError\nraise ConfigError('shards are cut')\n"
    for module, text in (("jobs/submit.py", slow), ("pipeline/training/run.py", wrong)):
        (code / module).write_text((code / module).read_text() + text)
    start(run.job.id)
    with pytest.raises(AssertionError, match="must be mended"):
        run.until(lambda: False, "it is given up")
    assert run.restarts == 0
    assert run.job.failures == ()
    assert "disk must be mended (rank 1: shards are cut)" in row(run)


@contextlib.contextmanager
def served(store: Path, port: int) -> Iterator[str]:
    """A team's tracking server as a job of its own, which ends with the block; its address."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["sbatch", "--parsable", "--time=10", "--cpus-per-task=1", "--output=/dev/null"]
    job = subprocess.run(
        [*command, ROOT / "slurm/mlflow-server.sbatch", store, str(port)],
        env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(port):
            assert time.monotonic() < deadline, "the tracking server does not come up"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        slurm("scancel", job)
        while answers(port):
            time.sleep(0.2)


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_a_tracking_server_away_at_submission_in_mid_run_and_at_the_end(
    submit: Submit, tmp_path: Path
) -> None:
    """Everything arrives, once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store, address = tmp_path / "store", f"http://127.0.0.1:{port}"
    store.mkdir()
    (tmp_path / "mlflow.db").rename(store / "mlflow.db")
    run = submit("train.epochs=9000", "train.evaluate_every=9000", "train.log_every=1",
                 cluster=LATER, tracking=address)  # fmt: skip
    assert known_as(run) is None
    with served(store, port):
        start(run.job.id)
        run.until(lambda: known_as(run), "the server has heard of the run")
        run.trains()
    assert run.state == "RUNNING"
    run.trains()
    cancelled = reprise("cancel", "run", "--runs", ".", cwd=tmp_path)
    assert cancelled.returncode == 0, cancelled.stderr
    run.until(lambda: not jobs_of(tmp_path), "the job has ended")
    with served(store, port):
        run.until(lambda: tracking.replay(run.run, timeout=20), "everything has arrived")
    with sqlite3.connect(store / "mlflow.db") as rows:
        runs = rows.execute("select status from runs").fetchall()
        points = rows.execute("select step from metrics where key = 'train/loss'").fetchall()
    assert runs == [("KILLED",)]
    assert sorted(step for (step,) in points) == [step for step, _ in history(run.run)]
    assert len(points) >= newest_step(run.run) > 2 * SOON


def known_as(run: Submitted) -> str | None:
    """The run's id at the tracking server."""
    return json.loads((run.run / "tracking.json").read_text())["run_id"]


def test_the_same_job_without_submitit(recipe: Path, whole: Trace, tmp_path: Path) -> None:
    """Stopped once on its way, as by a preemption."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    asked = subprocess.run(
        ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=1", "--time=10", "--cpus-per-task=1",
         ROOT / "slurm/train.sbatch", recipe, "--run", "run"],
        cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    job = Job("lab", asked.stdout.strip(), 2, 1, 10, "here")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()  # a run directory to be, which holds its record already
    job.save(tmp_path / "run")
    run = Submitted(tmp_path / "run")
    run.trains()
    slurm("scancel", "--signal=USR2", job.id)
    run.goes_on()
    run.finished()
    assert trace(run.run) == whole
