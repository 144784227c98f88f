"""The same ranks, whoever starts them: `--nproc`, torchrun or srun give the same weights."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.distributed import PORTS, _host, _port
from tests.conftest import ROOT
from tests.jobs.command import PATIENCE, until
from tests.jobs.launchers import LAUNCHERS, REPRISE, TORCHRUN, end, start
from tests.training.conftest import Trace, trace

SRUN = ("srun", "--ntasks", "2", "--overcommit", "--kill-on-bad-exit=1")


@pytest.fixture(scope="module")
def by_nproc(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """What two ranks of one command trained."""
    folder = tmp_path_factory.mktemp("nproc")
    end(start([REPRISE, "train", recipe, "--run", "run", "--nproc", 2], folder), 0)
    found = trace(folder / "run")
    assert len(set(found.keys)) == 2  # two ranks, each with its own samples
    return found


@pytest.fixture(scope="module")
def cluster() -> None:
    """A SLURM cluster to start job steps on."""
    if shutil.which("sinfo") is None:
        pytest.skip("needs a SLURM cluster; there is no sinfo here")
    asked = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=20)
    if asked.returncode:
        pytest.skip(f"needs a SLURM cluster; sinfo says {asked.stderr.splitlines()[-1]}")


def test_torchrun(recipe: Path, by_nproc: Trace, tmp_path: Path) -> None:
    end(start([*TORCHRUN, REPRISE, "train", recipe, "--run", "run"], tmp_path), 0)
    assert trace(tmp_path / "run") == by_nproc


def test_one_rank_of_an_evaluation_speaks(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    process = start([*TORCHRUN, REPRISE, "eval", "run"], tmp_path)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    for said in ("16 (test)", "per-sample results:", "evaluating: 8 of 8 images"):
        assert output.count(said) == 1, output


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("nodes", [1, 2])
def test_srun(recipe: Path, by_nproc: Trace, tmp_path: Path, nodes: int) -> None:
    command = [*SRUN, "--nodes", nodes, REPRISE, "train", recipe, "--run", "run"]
    end(start(command, tmp_path), 0)
    assert trace(tmp_path / "run") == by_nproc


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_a_signal_to_one_task_stops_the_step_with_its_own_status(
    recipe: Path, tmp_path: Path
) -> None:
    """The first task to leave must not turn the others' status into that of a killed one."""
    log = tmp_path / "run" / "logs" / "rank-0.log"
    train = [REPRISE, "train", recipe, "--run", "run", "train.epochs=500"]
    for starts, rank in ((1, 1), (2, 0)):  # the second start resumes
        step = start([*SRUN, *train, "train.evaluate_every=500"], tmp_path)
        try:
            until(lambda starts=starts: _trains(log, starts), "the step trains")
            os.kill(_task(rank, recipe), signal.SIGUSR2)
            end(step, 130)
        finally:
            step.terminate()  # srun ends its tasks with itself
    text = log.read_text()
    assert text.count("saved checkpoint at step") == 2
    assert text.count("resumed from") == 1


def _trains(log: Path, starts: int) -> bool:
    """Whether the log has a line of a step after this number of starts."""
    text = log.read_text() if log.is_file() else ""
    parts = re.split("starting a new run|resumed from", text)
    return len(parts) == starts + 1 and "INFO step " in parts[-1]


def _task(rank: int, recipe: Path) -> int:
    """Process id of a task of the job step that trains this recipe."""
    for process in psutil.process_iter():
        try:
            ours = REPRISE in process.cmdline() and str(recipe) in process.cmdline()
            if ours and process.environ().get("SLURM_PROCID") == str(rank):
                return process.pid
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    raise AssertionError(f"no task {rank} runs on this machine")


def test_steps_beside_each_other_meet_on_different_ports() -> None:
    steps = [
        {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        for job in (1, 2, 3, 67_000_000)
        for step in range(4)
    ]
    ports = [_port(step) for step in steps]
    assert len(set(ports)) == len(steps)
    assert set(ports) <= set(PORTS)
    assert PORTS.start > 1024
    assert PORTS.stop <= 32768  # where Linux begins to hand out ports by itself


def test_where_the_ranks_of_a_step_meet() -> None:
    many = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "no-such-host-[3-4]"}
    assert _host(many | {"SLURM_STEP_NUM_NODES": "1"}) == "localhost"
    assert _host(many | {"SLURM_STEP_NODELIST": "localhost,other"}) == "localhost"
    with pytest.raises(ValueError, match=r"no-such-host-3, the first .* export MASTER_ADDR"):
        _host(many)


def test_an_address_that_is_given_is_not_looked_for() -> None:
    """The cure that the error names, as a job step of two ranks whose first node has no address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = {k: v for k, v in os.environ.items() if k not in LAUNCHERS}
    step = {"SLURM_STEP_NODELIST": "no-such-host-[3-4]", "SLURM_STEP_NUM_NODES": "2",
            "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "MASTER_PORT": str(port)}  # fmt: skip

    def rank(number: int, **given: str) -> "subprocess.Popen[str]":
        code = (
            "from pipeline.distributed import CPU, World\n"
            f"world = World({number}, 2, 0, CPU); world.start()\n"
            f"print(world.gather({number})); world.stop()"
        )
        return subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=kept | step | given,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    said, _ = rank(0).communicate(timeout=PATIENCE)
    assert "export MASTER_ADDR" in said
    for process in [rank(number, MASTER_ADDR="127.0.0.1") for number in (0, 1)]:
        said, _ = process.communicate(timeout=PATIENCE)
        assert said.splitlines()[-1] == "[0, 1]"
