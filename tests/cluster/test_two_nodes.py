"""Two nodes train as one group, and what happens to them costs nothing but time."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import LAB, Submitted, reprise, slurm
from tests.training.conftest import Trace, trace

Submit = Callable[..., Submitted]


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


@pytest.mark.alone
def test_one_fault_after_another(submit: Submit, whole: Trace) -> None:
    """A job of higher priority, signals to one rank, a rank killed: each queues the job again once.

    A checkpoint is being written most of the time.
    """
    run = submit("checkpoints.every_steps=2")
    run.trains()
    run.sleeps()
    slurm("sbatch", "--partition=high", "--nodes=2", "--gpus-per-node=2", "--output=/dev/null",
          "--wrap", "sleep 2")  # fmt: skip
    run.goes_on()
    run.trains()
    stops = run.log.count("stopped with a checkpoint")
    for _ in range(2):
        run.rank(1).send_signal(signal.SIGUSR2)
    run.goes_on(2)
    assert run.log.count("stopped with a checkpoint") == stops + 1
    run.trains()
    other = run.rank(0)
    run.rank(1).kill()
    assert not psutil.wait_procs([other], timeout=5)[1]
    run.goes_on(3)
    run.finished()
    assert run.restarts == 3
    (failure,) = run.job.failures
    assert failure.status == 128 + signal.SIGKILL
    assert trace(run.run) == whole


@pytest.mark.alone
def test_a_controller_that_is_away_and_then_a_lost_node(submit: Submit, whole: Trace) -> None:
    """Nobody answers when the ranks have stopped; later all that runs on a node is killed at once.

    Not before they have: SLURM itself would wait a minute before it says again that they ended.
    """
    run, node = submit(), "node2"
    run.trains()
    (controller,) = (p for p in psutil.process_iter(["name"]) if p.info["name"] == "slurmctld")
    script = run.batch_script()
    script.suspend()
    run.rank(1).send_signal(signal.SIGUSR2)
    run.until(lambda: f"{run.job.id}.0" not in slurm("squeue", "-hs"), "the ranks have ended")
    controller.suspend()
    try:
        script.resume()
        run.until(lambda: "asked again" in run.outputs(), "the job has no answer")
    finally:
        controller.resume()
    run.goes_on()
    run.trains()
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
    run.goes_on(2)
    run.finished()
    assert run.restarts == 2
    assert trace(run.run) == whole


def _files(process: psutil.Process) -> str:
    """Names of the files that a process has open; a job manager logs to its node's."""
    try:
        return " ".join(str(fd.readlink()) for fd in Path(f"/proc/{process.pid}/fd").iterdir())
    except (OSError, psutil.NoSuchProcess):
        return ""
