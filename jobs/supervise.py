"""`python -m jobs.supervise STATUS RUN...`: what becomes of a job whose ranks have ended.

The batch script calls it on its first node, after the ranks. A job that was stopped by a signal, or
lost a rank, is queued again; one whose failure would only repeat is not, and the run's record says
why. SLURM itself queues a job again that lost the node on which this would run.
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from jobs import endings, scheduler
from jobs.endings import Ending
from jobs.errors import Exit
from jobs.record import SAME_STOP, Job, newest_step
from pipeline.config import ConfigError

RECORD_SECONDS = 60.0
SETTLE_SECONDS = 10.0  # until a shared file system shows what a rank has left
SAID = 160  # characters, of what a rank says
# USR2 (10) and TERM (15) end a process that has not begun to listen to them yet.
STOPPED = (Exit.INTERRUPTED, 128 + 10, 128 + 15)
FINAL: dict[int, str] = {
    Exit.USER_ERROR: "the configuration, its data or the disk must be mended",
    Exit.NON_FINITE: "the loss is not finite",
}


def supervise(status: int, run: Path, left: Mapping[int, Ending] | None = None) -> bool:
    """Record how the ranks ended; True where the job is to be queued again.

    Args:
        status: the highest of all ranks, as srun tells it.
        left: what the ranks of this start have left.
    """
    if status == 0:
        return False
    try:
        job = Job.load(run)
    except ConfigError as error:
        return _uncounted(status, left or {}, error)
    assert job is not None, run
    status, said = _cause(status, left or {}, job.ranks)
    if reason := FINAL.get(status):
        reason += f" ({said})" if said else ""
        job = replace(job, stopped=f"status {status}: {reason}")
    elif status in STOPPED:
        job = job.halted(newest_step(run))
    else:
        job = job.failed(newest_step(run), status, said)
    try:
        job.save(run)
    except OSError as error:
        return _uncounted(status, left or {}, error)
    return job.stopped is None


def _uncounted(status: int, left: Mapping[int, Ending], error: Exception) -> bool:
    """The same without a record: SLURM's count of all restarts stands for what it would count."""
    status, said = _cause(status, left, 0)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    again = status not in FINAL and restarts < SAME_STOP
    print(
        f"error: {error}\nthe ranks ended with status {status}{f' ({said})' if said else ''} after "
        f"{restarts} restarts: the job is {'' if again else 'not '}queued again",
        flush=True,
    )
    return again


def _cause(status: int, left: Mapping[int, Ending], ranks: int) -> tuple[int, str]:
    """The status that decides, and what is known of whose it is.

    What no start can mend goes before a bug. A rank that only lost another one says the least: it
    decides where that one is not known to have been killed.
    """
    wrong = [ending for ending in left.values() if ending.status not in (0, *STOPPED)]
    wrong.sort(key=lambda one: (one.status not in FINAL, one.status == Exit.RANK_LOST, one.rank))
    if wrong and (wrong[0].status != Exit.RANK_LOST or status in STOPPED):
        said = textwrap.shorten(wrong[0].said, SAID, placeholder=" ...")
        return wrong[0].status, f"rank {wrong[0].rank}: {said}"
    silent = [str(rank) for rank in range(ranks) if rank not in left]
    if status in STOPPED or not silent or not left:
        return status, ""
    plural = "s" if len(silent) > 1 else ""
    return status, f"rank{plural} {textwrap.shorten(', '.join(silent), 40)} left no word"


def _left(run: Path, start: str, ranks: int | None) -> dict[int, Ending]:
    """What the ranks, of any number, left, once it is there; of a killed one nothing will be."""
    until = time.monotonic() + SETTLE_SECONDS
    while True:
        found = endings.read(run, start)
        if len(found) == ranks or time.monotonic() > until:
            return found
        time.sleep(0.5)


def _await_record(run: Path, job: str) -> int | None:
    """The number of ranks in the job's record; None where that cannot be read.

    A job may end before the one who submitted it, and many beside it, has written all down.
    """
    until = time.monotonic() + RECORD_SECONDS
    while True:
        try:
            record = Job.load(run)
        except ConfigError:
            return None
        if record is not None and record.id == job:
            return record.ranks
        if time.monotonic() > until:
            raise ValueError(f"{run} has no record of job {job}: it is not queued again")
        time.sleep(0.5)


def main(status: int, runs: list[str]) -> int:
    """The exit status of the batch script. A job that SLURM is ending already is left to it."""
    if status == 0:
        return status
    member = os.environ.get("SLURM_ARRAY_TASK_ID")
    run = Path(runs[int(member or 0)])
    # The number of an array's last member is the array's own: to queue it would queue them all.
    job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{member}" if member else os.environ["SLURM_JOB_ID"]
    ranks = _await_record(run, job)
    # A job that is told to stop is often one of many, in a controller's worst minutes.
    state = scheduler.insist("squeue", "--noheader", "--format=%T", "--jobs", job).strip()
    if state != "RUNNING":
        return status
    start = endings.start_of(os.environ)
    assert start is not None
    if supervise(status, run, _left(run, start, ranks)):
        print(f"ended with status {status}: job {job} is queued again", flush=True)
        scheduler.insist("scontrol", "requeue", job)
    return status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
