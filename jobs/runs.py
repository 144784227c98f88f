"""The runs below a folder: where each one is, joined from the scheduler and its run directory."""

from __future__ import annotations

import difflib
import socket
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout

from data_prep.files import Lock
from data_prep.manifest import MANIFEST_NAME
from jobs import clusters, scheduler, submit
from jobs.describe import duration, table_of
from jobs.record import Job
from jobs.scheduler import State
from jobs.submit import Request
from pipeline.config import ConfigError
from pipeline.run_directory import CONFIG, RunDirectory
from pipeline.tracking import journal

SCORES = ("eval/top1", "eval/psnr")
LOOK_SECONDS = 1.0
REASON = 60  # characters, of why a run cannot be read


@dataclass(frozen=True)
class Progress:
    """What a run's journal says: epochs, score, seconds to its end at the pace of this start."""

    epoch: float = 0.0
    score: float | None = None
    seconds_left: float | None = None
    status: str = ""  # MLflow's


@dataclass(frozen=True)
class Row:
    run: Path
    state: str
    epochs: int | None  # None: as long as its phases
    progress: Progress
    nodes: str = ""
    job: str = ""


def find(name: str, runs: Path) -> Path:
    """The run directory of this name or path.

    Raises:
        ConfigError: there is none, the nearest name is suggested; or it is a shard set.
    """
    for path in (Path(name), runs / name):
        if RunDirectory(path).exists:
            return path
    if (Path(name) / MANIFEST_NAME).is_file():
        raise ConfigError(
            f"{name} is a shard set and not a run: give a run; `reprise runs` lists those below "
            f"{runs}"
        )
    names = [str(path.relative_to(runs)) for path in directories(runs)]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(f"there is no run {name!r}: {hint}`reprise runs` lists those below {runs}")


def directories(runs: Path, holding: str = CONFIG) -> list[Path]:
    """The folders below a folder that hold such a file, those of the members of sweeps included.

    A consolidated network is a part of the run that it was made of.
    """
    found = [*runs.glob(f"*/{holding}"), *runs.glob(f"*/*/{holding}")]
    folders = sorted(path.parent for path in found)
    return [path for path in folders if not RunDirectory(path).consolidation.is_file()]


def table(runs: Path) -> list[Row]:
    """A row for each run; the scheduler is asked once for all."""
    paths = directories(runs)
    jobs = {path: _job(path) for path in paths}
    found = [job for job in jobs.values() if isinstance(job, Job)]
    states = scheduler.states(job.id for job in found if job.cluster != clusters.LOCAL)
    return [_row(path, job, states) for path, job in jobs.items()]


def _job(run: Path) -> Job | ConfigError | None:
    """The run's job, or why it cannot be told; the other runs are listed all the same."""
    try:
        return Job.load(run)
    except ConfigError as error:
        return error


def shown(rows: Sequence[Row], folder: Path) -> str:
    """The runs below a folder, as a table."""
    if not rows:
        return f"no runs below {folder}"
    cells: list[list[object]] = [
        [
            row.run.relative_to(folder),
            row.state,
            f"{row.progress.epoch:.1f}" + (f" of {row.epochs}" if row.epochs else ""),
            "" if row.progress.score is None else f"{row.progress.score:.4g}",
            "" if row.progress.seconds_left is None else duration(row.progress.seconds_left),
            row.nodes,
            row.job,
        ]
        for row in rows
    ]
    return table_of(cells, ["run", "state", "epoch", "score", "left", "nodes", "job"])


def _row(run: Path, job: Job | ConfigError | None, states: dict[str, State]) -> Row:
    if isinstance(job, ConfigError):
        return Row(run, f"unreadable: {_brief(job, run)}", None, Progress())
    state = states.get(job.id) if job else None
    nodes = state.nodes if state and state.alive else ""
    where = f"{job.id} on {job.cluster}" if job else ""
    try:
        config, done = RunDirectory(run).read_config(), progress(run)
    except ConfigError as error:  # such as of another version; the others are listed all the same
        return Row(run, f"unreadable: {_brief(error, run)}", None, Progress(), nodes, where)
    return Row(run, _state(run, job, state, done), config.train.epochs, done, nodes, where)


def _brief(error: ConfigError, run: Path) -> str:
    """Without the path, which the row begins with anyway."""
    text = str(error).replace(f"{run}/", "")
    return textwrap.shorten(text, REASON, placeholder=" ...")


def _state(run: Path, job: Job | None, state: State | None, done: Progress) -> str:
    """In one word, or with the reason: the scheduler knows what lives, the run how it ended."""
    if state and state.alive:
        if state.name == "RUNNING" and done.status in ("", "KILLED"):
            return "starting"
        return {"PENDING": "queued"}.get(state.name, state.name.lower()) + (
            f" ({state.reason})" if state.reason not in ("", "None") else ""
        )
    if done.status == "FINISHED":
        return "finished"
    if job and job.stopped:
        return f"stopped: {job.stopped}"
    if state and state.name == "CANCELLED":
        return "cancelled"
    if _is_owned(run) or (job and submit.is_alive(job)):
        return "running"
    if done.status == "":
        if job and job.cluster == clusters.LOCAL and job.host == socket.gethostname():
            return "failed at its start"
        return "not started" if state is None else state.name.lower()
    return "interrupted" if done.status == "KILLED" else "failed"


def _is_owned(run: Path) -> bool:
    """Whether a process trains in the directory now."""
    if not (run / ".lock").exists():
        return False
    try:
        with Lock(run / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except ValueError:
        return False  # its file system has no locks, and so it has no owner


def progress(run: Path) -> Progress:
    """Read from the journal, which is there before any server is asked."""
    epochs: list[tuple[float, float]] = []  # seconds, epoch; of the newest start
    score, status = None, ""
    for record, _ in journal.read(run / journal.JOURNAL):
        record = record or {}
        values: dict[str, Any] = record.get("metrics", {})
        if "epoch" in values:
            epochs.append((record["time"] / 1000, values["epoch"]))
        score = next((values[name] for name in SCORES if name in values), score)
        if "status" in record:
            status = record["status"]
            if status == "RUNNING":
                epochs = [(record["time"] / 1000, epoch) for _, epoch in epochs[-1:]]
    if not epochs:
        return Progress(score=score, status=status)
    (then, first), (now, last) = epochs[0], epochs[-1]
    whole = RunDirectory(run).read_config().train.epochs
    if status != "RUNNING" or last == first or whole is None:
        return Progress(last, score, None, status)
    return Progress(last, score, (whole - last) * (now - then) / (last - first), status)


def logs(run: Path, rank: int, follow: bool) -> Iterator[str]:
    """The lines of a rank's log, then, where the ranks could not begin to keep one, the job's.

    Raises:
        ConfigError: nothing was written yet.
    """
    job = Job.load(run)
    path = run / "logs" / f"rank-{rank}.log"
    if not path.is_file() and job is not None:
        path = submit.output(run, job, rank)
    while not path.is_file():
        if not follow or job is None or not submit.is_alive(job):
            raise ConfigError(f"rank {rank} of {run} has written nothing yet: see `reprise runs`")
        time.sleep(LOOK_SECONDS)
    with path.open() as file:
        while True:
            if line := file.readline():
                yield line
            elif follow and job is not None and submit.is_alive(job):
                time.sleep(LOOK_SECONDS)
            else:
                return


def resume(run: Path, nodes: int | None, gpus_per_node: int | None, time: str | None) -> Job:
    """Queue a run again that has stopped, on as many ranks as before if no others are asked for.

    Raises:
        ConfigError: it was never submitted, is alive, or is at its end.
    """
    job = Job.load(run)
    if job is None:
        raise ConfigError(f"{run} was not submitted: `reprise train {run}` goes on with it here")
    if progress(run).status == "FINISHED":
        raise ConfigError(f"{run} has finished: for another run give another seed or --run")
    request = Request(
        profile=clusters.load(job.cluster),
        nodes=nodes or job.nodes,
        gpus_per_node=job.gpus_per_node if gpus_per_node is None else gpus_per_node,
        minutes=clusters.minutes(time) if time else job.minutes,
    )
    return submit.submit(RunDirectory(run).read_config(), run, request)


def cancel(run: Path) -> str:
    """End a run's job; a job that trains saves first, within the time that the site gives it.

    Raises:
        ConfigError: it has none that is alive.
    """
    job = Job.load(run)
    if job is None or not submit.is_alive(job):
        raise ConfigError(f"{run} has no job that is queued or running: see `reprise runs`")
    if job.cluster == clusters.LOCAL:
        submit.controllers(job)[-1].terminate()  # it hands the signal on to its ranks
    else:
        scheduler.ask("scancel", job.id)
    return job.id
