"""`reprise` as a person starts it: a process of its own, in its own process group."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

PATIENCE = 180.0  # seconds; far beyond what anything here takes, beside other tests too
ENTRY = "import sys; from jobs.cli import main; sys.argv[0] = 'reprise'; main()"


def start(
    *args: object, cwd: Path, stderr: int = subprocess.PIPE, first: str = ""
) -> "subprocess.Popen[str]":
    """Args:
    first: a program to run before the command in its process.
    """
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    return subprocess.Popen(
        [sys.executable, "-c", first + ENTRY, *map(str, args)],
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def reprise(*args: object, cwd: Path, first: str = "") -> "subprocess.CompletedProcess[str]":
    """Run to the end."""
    with started(*args, cwd=cwd, first=first) as process:
        return ended(process)


@contextmanager
def started(*args: object, cwd: Path, first: str = "") -> "Iterator[subprocess.Popen[str]]":
    """A process that is gone, with its group, after the block."""
    process = start(*args, cwd=cwd, first=first)
    try:
        yield process
    finally:
        for left in group(process.pid):
            left.kill()
        process.communicate()


def ended(process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
    """Wait for the end, after which no process of its group may be left."""
    out, err = process.communicate(timeout=PATIENCE)
    until(lambda: not group(process.pid), "the process group is gone")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def assert_untouched(folder: Path) -> None:
    """Nothing is in a working folder but the tracking store that was there, with nothing in it."""
    assert [path.name for path in folder.iterdir()] == ["mlflow.db"]
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as rows:
        assert rows.execute("select count(*) from runs").fetchone() == (0,)
        assert rows.execute("select name from experiments").fetchall() == [("Default",)]


def group(number: int) -> list[psutil.Process]:
    """The living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == number and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def ranks(parent: int) -> list[int]:
    """Process ids of the local ranks, in their order."""
    children = psutil.Process(parent).children()
    return sorted(child.pid for child in children if "spawn_main" in " ".join(child.cmdline()))


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.05)


@contextmanager
def training(*args: object, run: Path, rank: int = 0) -> "Iterator[subprocess.Popen[str]]":
    """`reprise train` beside its run directory, entered once the rank has logged a new step."""
    log = run / "logs" / f"rank-{rank}.log"
    before = len(log.read_text()) if log.is_file() else 0
    with started("train", *args, cwd=run.parent) as process:
        until(
            lambda: (
                process.poll() is not None
                or (log.is_file() and "INFO step " in log.read_text()[before:])
            ),
            f"{log} has a step",
        )
        assert process.poll() is None, process.communicate()
        yield process


def interrupt_group(process: "subprocess.Popen[str]") -> None:
    """What a terminal does at Ctrl-C."""
    os.killpg(process.pid, signal.SIGINT)
