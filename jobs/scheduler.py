"""What SLURM says of jobs, asked with as few calls as possible."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass

WAIT_SECONDS = 60  # for an answer of a busy controller
INSIST_SECONDS = 900.0  # for one that is restarted
AGAIN_SECONDS = 5.0
# What SLURM's commands say where their controller or their accounting is not there or too busy.
_SILENT = ("unable to contact", "timed out", "connection refused", "connect failure")
_NO_ACCOUNTING = "accounting storage is disabled"
# What ranks were told that a shell started before: those of a job must not take it for theirs.
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ALIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "PREEMPTED")


class Unreachable(ValueError):
    """The scheduler does not answer now; that it refuses is another matter."""


class Refused(ValueError):
    """A command of SLURM failed; `said` has the lines that it printed."""

    def __init__(self, command: str, said: str) -> None:
        super().__init__(f"{command} refuses: {' '.join(said.split())}")
        self.said = said


@dataclass(frozen=True)
class State:
    """One job: its state in SLURM's words, where it is, and why it waits."""

    name: str
    nodes: str = ""
    left: str = ""  # until the time limit
    reason: str = ""

    @property
    def alive(self) -> bool:
        return self.name in ALIVE


def states(jobs: Iterable[str]) -> dict[str, State]:
    """The state of each job that SLURM knows: of the queue, and of the accounting for the rest.

    Where a site keeps no accounting, a job that has left the queue is unknown.
    """
    wanted = set(jobs)
    if not wanted or shutil.which("squeue") is None:
        return {}
    found: dict[str, State] = {}
    queue = ask(
        "squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%T|%N|%L|%r"
    )
    for line in queue.splitlines():
        job, name, nodes, left, reason = line.split("|", 4)
        if job in wanted:
            found[job] = State(name, nodes, left, reason if name == "PENDING" else "")
    if missing := wanted - found.keys():
        for line in _accounting({job.split("_")[0] for job in missing}).splitlines():
            job, name, nodes = line.split("|")
            if job in missing:
                found[job] = State(name.split()[0], nodes)  # `CANCELLED by 1000`
    return found


def _accounting(jobs: set[str]) -> str:
    """Lines of `job|state|nodes`, none where there is no accounting."""
    if shutil.which("sacct") is None:
        return ""
    format_ = "--format=JobID,State,NodeList"
    try:
        return ask("sacct", "--allocations", "-nP", format_, "-j", ",".join(sorted(jobs)))
    except Refused as error:
        if _NO_ACCOUNTING in error.said.lower():
            return ""
        raise


def ask(*command: str, wait: float | None = WAIT_SECONDS) -> str:
    """What a command of SLURM prints; `wait` seconds for it, None: as long as it takes.

    Raises:
        Unreachable: no answer.
        Refused: it failed, and the message is what it said.
        ValueError: there is no such command.
    """
    kept = {name: text for name, text in os.environ.items() if name not in LAUNCHERS}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=wait, env=kept)
    except FileNotFoundError:
        raise ValueError(
            f"there is no {command[0]} on this machine: call this on a node of a SLURM cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise Unreachable(
            f"{command[0]} did not answer within {wait} s: try again when the scheduler is "
            "less busy"
        ) from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}"
        if any(words in said.lower() for words in _SILENT):
            shown = " ".join(said.split())
            raise Unreachable(f"{command[0]} has no answer: {shown}; try again later")
        raise Refused(command[0], said)
    return done.stdout


def insist(*command: str) -> str:
    """What `ask` answers, asked again until the scheduler is there.

    Raises:
        Unreachable: it was away for all of `INSIST_SECONDS`.
        ValueError: it refuses.
    """
    until = time.monotonic() + INSIST_SECONDS
    while True:
        try:
            return ask(*command)
        except Unreachable as error:
            if time.monotonic() > until:
                raise
            print(f"{error}; asked again in {AGAIN_SECONDS:.0f} s", flush=True)
            time.sleep(AGAIN_SECONDS)
