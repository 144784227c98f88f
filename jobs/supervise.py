"""`python -m jobs.supervise STATUS RUN...`: what becomes of a job whose ranks have ended.

The batch script calls it on its first node, after the ranks. A job that was stopped by a signal, or
lost a rank, is queued again; one whose failure would only repeat is not, and the run's record says
why. SLURM itself queues a job again that lost the node on which this would run.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from jobs import scheduler
from jobs.errors import Exit
from jobs.record import Job, newest_step

RECORD_SECONDS = 60.0
# USR2 (10) and TERM (15) end a process that has not begun to listen to them yet.
STOPPED = (Exit.INTERRUPTED, 128 + 10, 128 + 15)
FINAL = {
    Exit.USER_ERROR: "the configuration, its data or the disk must be mended",
    Exit.NON_FINITE: "the loss is not finite",
}


def supervise(status: int, run: Path) -> bool:
    """Record how the ranks ended; True where the job is to be queued again."""
    job = Job.load(run)
    assert job is not None, run
    if status == 0:
        return False
    if status in STOPPED:
        return True
    if reason := FINAL.get(Exit(status) if status in set(Exit) else Exit.BUG):
        replace(job, stopped=f"status {status}: {reason}").save(run)
        return False
    job = job.failed(newest_step(run), status)
    job.save(run)
    return job.stopped is None


def _await_record(run: Path, job: str) -> None:
    """A job may end before the one who submitted it, and many beside it, has written all down."""
    until = time.monotonic() + RECORD_SECONDS
    while (record := Job.load(run)) is None or record.id != job:
        if time.monotonic() > until:
            raise ValueError(f"{run} has no record of job {job}: it is not queued again")
        time.sleep(0.5)


def main(status: int, runs: list[str]) -> int:
    """The exit status of the batch script. A job that SLURM is ending already is left to it."""
    member = os.environ.get("SLURM_ARRAY_TASK_ID")
    run = Path(runs[int(member or 0)])
    # The number of an array's last member is the array's own: to queue it would queue them all.
    job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{member}" if member else os.environ["SLURM_JOB_ID"]
    _await_record(run, job)
    # A job that is told to stop is often one of many, in a controller's worst minutes.
    state = scheduler.insist("squeue", "--noheader", "--format=%T", "--jobs", job).strip()
    if state == "RUNNING" and supervise(status, run):
        print(f"ended with status {status}: job {job} is queued again", flush=True)
        scheduler.insist("scontrol", "requeue", job)
    return status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
