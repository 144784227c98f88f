"""How the ranks of a start ended: each leaves a line in the run directory, for the batch script.

srun tells the highest status of all ranks. Those that it ends because another one has failed have a
higher one than that, so that the cause is lost. A rank that leaves nothing says something too: it
was killed, or Python did not begin.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.files import write_atomically
from pipeline.run_directory import RunDirectory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ending:
    """One rank's; `said` is its last line where something was wrong."""

    start: str
    rank: int
    status: int
    said: str = ""


def start_of(environment: Mapping[str, str]) -> str | None:
    """Which start of which job this is; None where no scheduler has started it.

    A job that is queued again keeps its number, and what its earlier starts left lies there still.
    """
    job = environment.get("SLURM_JOB_ID")
    return job and f"{job}.{environment.get('SLURM_RESTART_COUNT', '0')}"


def leave(run: Path, status: int, said: str) -> None:
    """As a rank of a job, say how it ended; nothing where there is no job or no run directory.

    A disk that refuses changes no status: then only srun's is known.
    """
    start, rank = start_of(os.environ), os.environ.get("SLURM_PROCID")
    if start is None or rank is None or not RunDirectory(run).exists:
        return
    try:
        save(run, Ending(start, int(rank), status, said))
    except OSError as error:
        log.warning("cannot write how rank %s ended (status %d): %s", rank, status, error)


def save(run: Path, ending: Ending) -> None:
    logs = RunDirectory(run).logs
    logs.mkdir(exist_ok=True)
    write_atomically(
        logs / f"rank-{ending.rank}.end.json", json.dumps(asdict(ending), indent=1).encode()
    )


def read(run: Path, start: str) -> dict[int, Ending]:
    """What the ranks of this start have left, by rank."""
    found = {}
    for file in RunDirectory(run).logs.glob("rank-*.end.json"):
        try:
            ending = Ending(**json.loads(file.read_bytes()))
        except (OSError, ValueError, TypeError):
            continue  # damaged: as if it were not there
        if ending.start == start:
            found[ending.rank] = ending
    return dict(sorted(found.items()))
