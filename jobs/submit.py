"""A run's way to the queue: checked, made, its code copied, queued; a refusal leaves nothing."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout

from data_prep.files import Lock
from jobs import scheduler, stopping
from jobs.clusters import LOCAL, Profile
from jobs.record import Job
from jobs.tasks import Train
from pipeline.config import Config, ConfigError
from pipeline.run_directory import RunDirectory

if TYPE_CHECKING:
    import psutil

    from pipeline.tracking import Announcer
    from pipeline.training.plan import Plan

log = logging.getLogger(__name__)
CODE = Path(__file__).resolve().parent.parent
PACKAGES = ("jobs", "pipeline", "data_prep")
SIGNAL_EARLY_S = 60  # SLURM may send a signal before a time limit this much sooner than asked
_LOCK = ".{}.submit.lock"
NAME_BYTES = 255 - len(_LOCK.format(""))  # of a run: file systems take 255 for a name
TRACKING_SECONDS = 60.0  # that a tracking server has to answer at submission
CHECKPOINT_BYTES = 20  # per parameter, generously: weights, their average, two moments, gradients


@dataclass(frozen=True)
class Request:
    """What is asked of a cluster for one run."""

    profile: Profile
    nodes: int
    gpus_per_node: int
    minutes: int

    @property
    def ranks_per_node(self) -> int:
        return max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class OnCluster:
    """A task as one of the ranks that a job started; what submitit pickles."""

    task: Train

    def __call__(self) -> int:
        stopping.note()  # also while the process ends: the launcher is to see the status
        if "SUBMITIT_LOCAL_JOB_ID" in os.environ:
            from submitit.helpers import TorchDistributedEnvironment

            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        status = self.task()
        if status:
            # Not by an exception: submitit would make its status 1, and what the interpreter winds
            # up may take longer than a launcher waits that has seen another rank leave.
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status


def check_all(runs: dict[Path, Config], request: Request) -> None:
    """Find what is wrong before anything is written or queued.

    Raises:
        ValueError: as `check`, for any of them; the disk has no room for the checkpoints of all.
    """
    _check_disk({run: check(config, run, request) for run, config in runs.items()})


def check(config: Config, run: Path, request: Request) -> Plan:
    """What is wrong with one run, whatever is beside it.

    Raises:
        ValueError: the configuration, the shards, the batch, the tracking address, the time limit,
            or what is asked of the cluster.
    """
    from pipeline import tracking
    from pipeline.data.shards import ShardSet
    from pipeline.training import initial
    from pipeline.training.plan import plan

    _check_request(request)
    planned = plan(config, request.world_size)
    for split in planned.manifest.splits.values():
        ShardSet(planned.manifest, split).close()
    if not RunDirectory(run).exists:
        initial.check(config, len(planned.manifest.classes))
    tracking.store_uri()
    check_shared(request.profile, run, config.data.path)
    return planned


def _check_request(request: Request) -> None:
    profile = request.profile
    if profile.is_local and request.nodes > 1:
        raise ConfigError(
            f"--nodes {request.nodes} on this one machine: give --nodes 1, or --cluster with a "
            "cluster's name"
        )
    if not profile.is_local and request.gpus_per_node > profile.gpus_per_node:
        raise ConfigError(
            f"--gpus-per-node {request.gpus_per_node}: a node of {profile.name} has "
            f"{profile.gpus_per_node}"
        )
    shortest = profile.signal_delay_s + SIGNAL_EARLY_S
    if not profile.is_local and 60 * request.minutes <= shortest:
        raise ConfigError(
            f"a time limit of {request.minutes} min is too short: the ranks are told to save "
            f"{profile.signal_delay_s} s before it, and SLURM may tell them {SIGNAL_EARLY_S} s "
            f"sooner: give --time {shortest // 60 + 1}m or more"
        )


def check_shared(profile: Profile, *paths: Path) -> None:
    if profile.shared is None:
        return
    for path in (*paths, Path(sys.prefix)):
        if not path.resolve().is_relative_to(profile.shared):
            raise ConfigError(
                f"{path} is not below {profile.shared}, which is what the nodes of {profile.name} "
                "see: move it there"
            )


def _check_disk(plans: dict[Path, Plan]) -> None:
    """For runs that lie on one disk, as the members of a sweep do."""
    kept = needed = 0
    for planned in plans.values():
        # The best besides, and the one that is being written.
        own = planned.config.checkpoints.keep_last + 2
        kept += own
        needed += own * CHECKPOINT_BYTES * planned.cost.parameters
    run = next(iter(plans)).resolve()
    folder = next(path for path in (run, *run.parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        of_all = f" of {len(plans)} runs" if len(plans) > 1 else ""
        raise ConfigError(
            f"{folder} has {free / 1e9:.2f} GB free and {kept} checkpoints{of_all} need about "
            f"{needed / 1e9:.2f} GB: free disk space, or give another --run"
        )


def submit(config: Config, run: Path, request: Request) -> Job:
    """Queue one run, or start it here; its job.

    Raises:
        ValueError: as `check`; the run has a job already, or the scheduler refuses.
    """
    from pipeline import tracking

    with tracking.announcer() as announce:
        check_all({run: config}, request)
        ask_site(request)
        with made(config, run), announced(announce, run):
            snapshot(run / "code")
            (job,) = queue({run: config}, request, run)
    return job


def ask_site(request: Request) -> None:
    """Raises ValueError where the site would refuse such a job: partition, account, limits."""
    if not request.profile.is_local:
        scheduler.ask("sbatch", "--test-only", *sbatch_options(request), "--wrap", "true")


@contextlib.contextmanager
def made(config: Config, run: Path, sweep: Path | None = None) -> Iterator[None]:
    """The run's directory and its place among the tracked runs, gone again if the block fails.

    Raises:
        ValueError: another process owns the directory, or its job is alive.
    """
    from pipeline.tracking import Tracker

    directory = RunDirectory(run)
    with alone(run), undone(run):
        refuse_second(run)
        directory.claim(config)
        try:
            Tracker(run, run_name=run.name, experiment=config.experiment, parent=sweep).params(
                config.flat()
            )
        finally:
            directory.release()
        yield


@contextlib.contextmanager
def undone(*paths: Path) -> Iterator[None]:
    """Those of the files and folders that are not there yet are gone again if the block fails."""
    new = [path for path in paths if not path.exists()]
    try:
        yield
    except BaseException:
        for path in new:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def alone(run: Path) -> Iterator[None]:
    """One submission of a run, or of a sweep, at a time."""
    run.parent.mkdir(parents=True, exist_ok=True)
    lock = run.parent / _LOCK.format(run.name)
    try:
        with Lock(lock, timeout=0):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except Timeout:
        raise ConfigError(f"{run} is being submitted by another process: wait for it") from None


def refuse_second(run: Path) -> None:
    """Raises ConfigError where the run's job is queued, running or ending."""
    job = Job.load(run)
    if job is not None and is_alive(job):
        raise ConfigError(
            f"{run} has job {job.id} on {job.cluster} already: wait for it, or `reprise cancel "
            f"{run}` first"
        )


def is_alive(job: Job) -> bool:
    if job.cluster == LOCAL:
        return bool(controllers(job))
    state = scheduler.states([job.id]).get(job.id)
    return state is not None and state.alive


def controllers(job: Job) -> list[psutil.Process]:
    """What answers for a job on this machine: submitit's shell, and its controller of the ranks."""
    import psutil

    try:
        shell = psutil.Process(int(job.id))
        if job.host != socket.gethostname() or "submitit" not in " ".join(shell.cmdline()):
            return []
        return [shell, *shell.children()]
    except psutil.NoSuchProcess:
        return []


def snapshot(folder: Path) -> None:
    """A copy of the code that runs here; a queued job sees no later edit."""
    shutil.rmtree(folder, ignore_errors=True)
    for package in PACKAGES:
        shutil.copytree(
            CODE / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )


@contextlib.contextmanager
def announced(announce: Announcer, run: Path) -> Iterator[None]:
    """The MLflow run, or all of a sweep, is there before a job starts; not so if the block fails.

    A server that is down gets them from the jobs.
    """
    try:
        if not announce(run, TRACKING_SECONDS):
            log.warning(
                "the tracking server does not answer: training keeps its journal, and the MLflow "
                "run of %s is created when it does",
                run,
            )
        yield
    except BaseException:
        if not announce.withdraw(TRACKING_SECONDS):
            log.warning("MLflow may keep %s as a run that waits: delete it there", run)
        raise


def queue(
    runs: dict[Path, Config],
    request: Request,
    folder: Path,
    max_parallel: int | None = None,
    after: str | None = None,
) -> list[Job]:
    """Hand the runs to submitit, several of them as one array; their jobs, recorded.

    Args:
        folder: holds the snapshot, and what submitit writes.
        max_parallel: members of the array that may run at a time.
        after: a job that must have ended before.

    Raises:
        ValueError: the scheduler refuses.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    tasks = [OnCluster(Train(config, run.resolve())) for run, config in runs.items()]
    own, profile = (folder / "slurm").resolve(), request.profile
    if profile.is_local:
        quoted = shlex.quote(str(own / "controller.log"))
        executor: Any = submitit.LocalExecutor(folder=own)
        executor.update_parameters(
            nodes=1,
            tasks_per_node=request.ranks_per_node,
            gpus_per_node=request.gpus_per_node,
            timeout_min=request.minutes,
            signal_delay_s=profile.signal_delay_s,
            stderr_to_stdout=True,
            # The job must not hold on to the terminal that it was started from.
            setup=["trap '' HUP", f"exec >{quoted} 2>&1 </dev/null", *_setup(profile, folder)],
        )
    else:
        executor = submitit.SlurmExecutor(folder=own)
        wanted = parameters(request, list(runs), folder)
        limits = {"array_parallelism": max_parallel, "dependency": after and f"afterany:{after}"}
        executor.update_parameters(**wanted, **{k: v for k, v in limits.items() if v is not None})
    try:
        handles = executor.submit_array(tasks) if len(tasks) > 1 else [executor.submit(tasks[0])]
    except FailedJobError as error:
        raise ValueError(f"sbatch refuses: {' '.join(str(error).split())}") from None
    jobs = []
    for run, handle in zip(runs, handles, strict=True):
        job = Job(
            cluster=profile.name,
            id=handle.job_id,
            nodes=request.nodes,
            gpus_per_node=request.gpus_per_node,
            minutes=request.minutes,
            host=socket.gethostname(),
        )
        job.save(run)
        jobs.append(job)
    return jobs


def output(run: Path, job: Job, rank: int) -> Path:
    """Where the scheduler keeps what a rank prints; members of a sweep have a folder together."""
    folder = run.parent if "_" in job.id else run
    return folder / "slurm" / f"{job.id}_{rank}_log.out"


def sbatch_text(request: Request, runs: list[Path], folder: Path) -> str:
    """The batch script, as submitit will write it for one run."""
    from submitit.slurm.slurm import _make_sbatch_string

    own = folder.resolve() / "slurm"
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(own))}"
    wanted = parameters(request, runs, folder)
    return str(_make_sbatch_string(command=command, folder=own, **wanted))


def parameters(request: Request, runs: list[Path], folder: Path) -> dict[str, Any]:
    """submitit's names for what is asked of SLURM to train."""
    wanted = common_parameters(request, folder)
    return wanted | {
        "job_name": "reprise",
        # The others end with a rank that was killed; the last lines decide what comes next.
        "srun_args": ["--kill-on-bad-exit=1"],
        "setup": [*wanted["setup"], "trap : TERM  # let the last lines run"],
        "teardown": [
            shlex.join([sys.executable, "-m", "jobs.supervise"])
            + ' "$?" '
            + shlex.join(str(run.resolve()) for run in runs)
        ],
    }


def common_parameters(request: Request, folder: Path) -> dict[str, Any]:
    """submitit's names for what is asked of SLURM, whatever is done there."""
    profile = request.profile
    return _asked(request) | {
        "signal_delay_s": profile.signal_delay_s,
        "stderr_to_stdout": True,
        "setup": _setup(profile, folder),
        "additional_parameters": {"requeue": True, **profile.sbatch},
    }


def _setup(profile: Profile, folder: Path) -> list[str]:
    """Shell lines before the ranks: the profile's, and the snapshot before the installed code."""
    cpus, code = profile.cpus_per_gpu, shlex.quote(str(folder.resolve() / "code"))
    lines = [
        f"unset {' '.join(scheduler.LAUNCHERS)}",
        *profile.setup,
        *(f"export {name}={shlex.quote(text)}" for name, text in profile.environment.items()),
        f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export OMP_NUM_THREADS={cpus} OMP_WAIT_POLICY=PASSIVE",
    ]
    return lines if profile.is_local else [*lines, f"export SRUN_CPUS_PER_TASK={cpus}"]


def sbatch_options(request: Request) -> list[str]:
    """What a site may refuse of a request."""
    wanted = {name.replace("_", "-"): value for name, value in _asked(request).items()}
    return [f"--{name}={value}" for name, value in (wanted | request.profile.sbatch).items()]


def _asked(request: Request) -> dict[str, Any]:
    """What sbatch is asked for, in submitit's names, which have an underscore where it has a dash.

    What is left out is left to the site.
    """
    profile = request.profile
    wanted = {
        "time": request.minutes,
        "nodes": request.nodes,
        "ntasks_per_node": request.ranks_per_node,
        "cpus_per_task": profile.cpus_per_gpu,
        "gpus_per_node": request.gpus_per_node or None,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
    }
    return {name: value for name, value in wanted.items() if value is not None}
