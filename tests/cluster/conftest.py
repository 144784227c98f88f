"""Jobs on the two-node lab: submitted as a person does, watched through SLURM and the run."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from filelock import FileLock, ReadWriteLock

from jobs.record import Job, newest_step
from tests.conftest import ROOT
from tests.jobs.command import ENTRY
from tests.training.conftest import Trace, trace

SOON = 5  # steps: some way into the training
PATIENCE = 240.0  # seconds; a requeued job waits for its nodes
RECIPE = """
name: tiny
model: dr_resnet16
data: {{path: {shards}, reader: torch, workers: 0, augment: {{crop: pad, size: 8}}}}
optimizer: {{lr: 0.05, nesterov: true, weight_decay: 5.0e-4}}
train: {{epochs: 15, batch_size: 16, evaluate_every: 15, log_every: 10}}
checkpoints: {{every_steps: 5}}
"""
HOME = Path("/run/reprise-lab")  # of the lab while it is up
LAB = Path(__file__).resolve().parents[2] / "slurm" / "lab"
TWO_NODES = ("--nodes", "2", "--gpus-per-node", "1", "--time", "10m")
LATER = "later"  # a user's own profile of the lab, whose jobs wait until they are told to start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            # Several waits in a test; not counting the one for the lab.
            item.add_marker(pytest.mark.timeout(4 * PATIENCE, func_only=True))
    # Those that cannot share the lab come last, when nothing is left that would wait for them.
    items.sort(key=_needs_the_lab_alone)


def _needs_the_lab_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


@pytest.fixture(scope="session", autouse=True)
def lab() -> None:
    """The lab, up: a test must not meet another cluster by accident."""
    if not HOME.is_dir():
        pytest.skip("needs the two-node lab: `make lab-up` as root, then `make test`")


@pytest.fixture(autouse=True)
def share(lab: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """The lab, beside tests of other workers; what strikes all of its jobs has it alone."""
    lock = ReadWriteLock(HOME / "tests.lock")
    with lock.write_lock() if _needs_the_lab_alone(request.node) else lock.read_lock():
        yield


@pytest.fixture(scope="session", autouse=True)
def own_profiles(lab: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A user's folder of profiles, with one more."""
    profile = yaml.safe_load((ROOT / "slurm/clusters/lab.yaml").read_text())
    home = tmp_path_factory.mktemp("config")
    file = home / "reprise" / "clusters" / f"{LATER}.yaml"
    file.parent.mkdir(parents=True)
    later = {"sbatch": {"begin": "now+1hour"}, "signal_delay_s": 20}
    file.write_text(yaml.safe_dump(profile | later))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(home))
        yield


def start(job: str) -> None:
    """Let a job go that was to begin later, or an array."""
    slurm("scontrol", "update", f"JobId={job.split('_')[0]}", "StartTime=now")


@pytest.fixture(scope="session")
def recipe(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 steps on 64 images: seconds for two ranks, with a checkpoint every five steps."""
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(RECIPE.format(shards=shards))
    return file


@pytest.fixture(scope="session")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """What two local ranks train that nothing happens to; trained once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "whole"
    with FileLock(f"{folder}.lock"):
        if not (folder / "run" / "weights.safetensors").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            done = reprise("train", recipe, "--nproc", 2, "--run", "run", cwd=folder)
            assert done.returncode == 0, done.stderr
    return trace(folder / "run")


def reprise(
    *args: object, cwd: Path, tracking: str | None = None
) -> "subprocess.CompletedProcess[str]":
    """The command to its end, with this tracking server."""
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    environment |= {"OMP_NUM_THREADS": "1"}
    if tracking:
        environment["MLFLOW_TRACKING_URI"] = tracking
    return subprocess.run(
        [sys.executable, "-c", ENTRY, *map(str, args)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,  # some of them wait for jobs
    )


@pytest.fixture
def tmp_path(tmp_path: Path, database: Path) -> Path:
    """A working folder in which a run was tracked before."""
    shutil.copy(database, tmp_path / "mlflow.db")
    return tmp_path


@dataclass(frozen=True)
class Submitted:
    """A run and its job."""

    run: Path

    @property
    def job(self) -> Job:
        found = Job.load(self.run)
        assert found is not None
        return found

    @property
    def log(self) -> str:
        file = self.run / "logs" / "rank-0.log"
        return file.read_text() if file.is_file() else ""

    @property
    def resumed(self) -> int:
        return self.log.count("INFO resumed from")

    @property
    def restarts(self) -> int:
        """How often SLURM has queued the job again."""
        shown = slurm("scontrol", "show", "job", self.job.id)
        return int(shown.split("Restarts=")[1].split()[0])

    @property
    def state(self) -> str:
        return slurm("sacct", "-nXP", "-o", "State", "-j", self.job.id).split("\n")[0]

    def reached(self, step: int) -> None:
        self.until(lambda: newest_step(self.run) >= step, f"training has saved step {step}")

    def trains(self) -> None:
        """It is some way into the training, from wherever it began."""
        self.reached(newest_step(self.run) + SOON)

    def goes_on(self, times: int = 1) -> None:
        """It was queued again, so many times in all, and trains from a checkpoint."""
        self.until(lambda: self.resumed == times, f"the run has gone on, {times} in all")
        assert self.restarts == times

    def finished(self) -> None:
        self.until(lambda: (self.run / "weights.safetensors").is_file(), "the run has finished")
        self.until(lambda: self.state == "COMPLETED", "the job is completed")

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            job = self.job
            assert job.stopped is None, job
            assert time.monotonic() < deadline, f"waited in vain until {what}: {self.outputs()}"
            time.sleep(0.2)

    def outputs(self) -> str:
        """What the job printed."""
        files = sorted(self.run.glob("slurm/*.out"))
        return "\n".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in files)

    def sleeps(self) -> None:
        """Until SLURM has something to tell the ranks, for which it wakes them, nothing happens.

        It takes its time, in which they would train to the end, on cores that others may use.
        """
        for number in range(2):
            self.rank(number).suspend()

    def rank(self, number: int) -> psutil.Process:
        return self._process("submitit.core._submit", SLURM_PROCID=str(number))

    def batch_script(self) -> psutil.Process:
        """The shell that waits for the ranks and then decides what comes next."""
        return self._process("slurm_script")

    def _process(self, word: str, **variables: str) -> psutil.Process:
        """What SLURM started with such a word in its command line, and these variables."""
        wanted = {"SLURM_JOB_ID": self.job.id, **variables}
        for process in psutil.process_iter():
            try:
                # srun has the ranks' command line and the first one's number, and is none of them.
                started = (parent := process.parent()) and parent.name() == "slurmstepd"
                if (
                    started
                    and wanted.items() <= process.environ().items()
                    and (word in " ".join(process.cmdline()))
                ):
                    return process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        raise AssertionError(f"job {self.job.id} has no process {word} with {variables}")


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(autouse=True)
def no_job_left(share: None, tmp_path: Path) -> Iterator[None]:
    yield
    deadline = time.monotonic() + PATIENCE
    while left := jobs_of(tmp_path):
        subprocess.run(["scancel", *left], check=False)
        assert time.monotonic() < deadline, f"jobs {left} do not end"
        time.sleep(0.5)


def jobs_of(folder: Path) -> list[str]:
    """The jobs that were submitted in a folder and have not ended."""
    lines = slurm("squeue", "--noheader", "--format=%i|%Z").splitlines()
    return [
        job for job, _, where in (line.partition("|") for line in lines) if where == str(folder)
    ]


@pytest.fixture
def submit(recipe: Path, tmp_path: Path) -> Callable[..., Submitted]:
    """Submit the recipe to two nodes."""

    def call(*args: object, cluster: str = "lab", tracking: str | None = None) -> Submitted:
        words = ["submit", recipe, "--cluster", cluster, *TWO_NODES, *args, "--run", "run"]
        done = reprise(*words, cwd=tmp_path, tracking=tracking)
        assert done.returncode == 0, done.stderr
        found = Submitted(tmp_path / "run")
        assert f"job {found.job.id} on {cluster}: run" in done.stdout
        return found

    return call
