"""Two nodes train as one group, and what happens to them costs nothing but time."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import LAB, Submitted, jobs_of, reprise, slurm
from tests.training.conftest import Trace, trace

Submit = Callable[..., Submitted]
SOON = 12  # a step early in the training


def test_two_nodes_train_as_two_local_ranks_do(
    submit: Submit, whole: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ranks the shell that submits believes to be."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    run = submit()
    assert (run.run / "tracking.json").read_text().count('"run_id": null') == 0
    second = reprise("submit", run.run / "config.yaml", "--cluster", "lab", "--run", run.run.name,
                     "--nodes", 2, "--time", "10m", cwd=run.run.parent)  # fmt: skip
    assert second.returncode == 2
    assert f"has job {run.job.id} on lab already" in second.stderr
    run.finished()
    assert trace(run.run) == whole
    nodes = {line.split("|")[0] for line in slurm("sacct", "-nP", "-o", "NodeList", "-j",
                                                 run.job.id).splitlines()}  # fmt: skip
    assert "node[1-2]" in nodes


def test_signals_to_one_rank_requeue_the_job_once(submit: Submit, whole: Trace) -> None:
    """Twice, and with a checkpoint being written most of the time."""
    run = submit()
    run.reached(SOON)
    for _ in range(2):
        run.rank(1).send_signal(signal.SIGUSR2)
    run.until(lambda: run.resumed == 1, "the run goes on")
    run.finished()
    assert run.restarts == 1
    assert run.log.count("stopped with a checkpoint") == 1
    assert trace(run.run) == whole


def test_a_controller_that_is_away_when_the_ranks_stop(submit: Submit, whole: Trace) -> None:
    run = submit()
    run.reached(SOON)
    (controller,) = (p for p in psutil.process_iter(["name"]) if p.info["name"] == "slurmctld")
    run.rank(1).send_signal(signal.SIGUSR2)
    controller.suspend()
    try:
        run.until(lambda: "asked again" in run.outputs(), "the job has no answer")
    finally:
        controller.resume()
    run.until(lambda: run.resumed == 1, "the run goes on")
    run.finished()
    assert run.restarts == 1
    assert trace(run.run) == whole


def test_a_job_of_higher_priority(submit: Submit, whole: Trace) -> None:
    run = submit()
    run.reached(SOON)
    slurm("sbatch", "--partition=high", "--nodes=2", "--gpus-per-node=2", "--output=/dev/null",
          "--wrap", "sleep 2")  # fmt: skip
    run.until(lambda: run.resumed == 1, "the run goes on")
    run.finished()
    assert run.restarts == 1
    assert trace(run.run) == whole


def test_a_killed_rank(submit: Submit, whole: Trace) -> None:
    run = submit()
    run.reached(SOON)
    other = run.rank(0)
    run.rank(1).kill()
    assert not psutil.wait_procs([other], timeout=5)[1]
    run.until(lambda: run.resumed == 1, "the run goes on")
    run.finished()
    assert run.restarts == 1
    (failure,) = run.job.failures
    assert failure.status == 128 + signal.SIGKILL
    assert trace(run.run) == whole


def test_a_lost_node(submit: Submit, whole: Trace) -> None:
    """Everything that runs on it is killed at once; it comes back after SLURM has noticed."""
    run, node = submit(), "node2"
    run.reached(SOON)
    lost = [run.rank(1)]
    for process in psutil.process_iter(["name", "cmdline"]):
        is_manager = process.info["name"] == "slurmstepd" and f"/{node}.log" in _files(process)
        if is_manager or (process.info["cmdline"] or [])[:3] == ["slurmd", "-N", node]:
            lost.append(process)
    assert len(lost) == 3
    for process in lost:
        process.kill()
    run.until(lambda: "down" in slurm("sinfo", "-hN", "-n", node, "-o", "%T"), "it is noticed")
    subprocess.run([LAB / "node", node], check=True)
    run.until(lambda: run.resumed == 1, "the run goes on")
    run.finished()
    assert trace(run.run) == whole


def _files(process: psutil.Process) -> str:
    """Names of the files that a process has open; a job manager logs to its node's."""
    try:
        return " ".join(str(fd.readlink()) for fd in Path(f"/proc/{process.pid}/fd").iterdir())
    except (OSError, psutil.NoSuchProcess):
        return ""


def test_the_time_limit(submit: Submit) -> None:
    run = submit("--time", "2m", "train.epochs=9000", "train.evaluate_every=9000",
                 "checkpoints.every_steps=9000")  # fmt: skip
    run.until(lambda: run.resumed == 1, "the run goes on after its time limit")
    assert run.restarts == 1
    assert run.log.count("stopped with a checkpoint") == 1
    cancelled = reprise("cancel", "run", cwd=run.run.parent)
    assert cancelled.returncode == 0, cancelled.stderr
    run.until(lambda: not jobs_of(run.run.parent), "the job has ended")
    run.until(lambda: run.state.startswith("CANCELLED"), "the accounting knows")
    assert run.restarts == 1
