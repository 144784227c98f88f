"""The journal on disk: what a run has to tell, kept before anybody is asked to receive it.

A journal is a file of JSON lines, one record each, written by one process and read by others:

    {"time": MS, "metrics": {NAME: VALUE}, "step": N}
    {"time": MS, "params": {NAME: TEXT}}
    {"time": MS, "tags": {NAME: TEXT}}
    {"time": MS, "artifact": PATH, "folder": FOLDER_OR_NULL}
    {"time": MS, "status": "RUNNING" | "FINISHED" | "FAILED" | "KILLED"}

The time stamp belongs to the record, not to the sending: MLflow's SQL store keys a point by name,
step, time and value, so a record that is sent twice is stored once.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.files import write_atomically

JOURNAL = "journal.jsonl"
SYSTEM_JOURNAL = "system.jsonl"
JOURNALS = (JOURNAL, SYSTEM_JOURNAL)
IDENTITY = "tracking.json"
SENT = "sent.json"
LOG = "tracking.log"
LOCK = "sender.lock"

Record = dict[str, Any]


def write_json(path: Path, value: object) -> None:
    """Replace `path` in one step, so that a reader sees the old content or the new, never a part.

    Raises OSError where the disk refuses.
    """
    write_atomically(path, json.dumps(value, indent=1).encode())


def now_ms() -> int:
    """Unix time in milliseconds, MLflow's unit."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class Identity:
    """Which MLflow run a run directory is.

    `uid` is ours and is set as a tag when the MLflow run is created: a process that dies after the
    creation and before `run_id` is on disk finds its run again by it.
    """

    uri: str
    experiment: str
    run_name: str
    uid: str
    begun_ms: int  # when the run directory was made, Unix time: MLflow may hear of it later
    run_id: str | None = None
    parent: str | None = None  # run directory of the MLflow run above it

    @classmethod
    def load(cls, run_dir: Path) -> "Identity | None":
        """The recorded identity; None where nothing was recorded yet."""
        path = run_dir / IDENTITY
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is not readable ({error}): delete it, and the run's journal is sent again "
                "as a new MLflow run"
            ) from None

    def save(self, run_dir: Path) -> None:
        write_json(run_dir / IDENTITY, asdict(self))


@dataclass(frozen=True)
class Sent:
    """How far each journal was sent, in bytes, and whether the MLflow run was given its end."""

    offsets: dict[str, int]
    closed: bool

    @classmethod
    def nothing(cls) -> "Sent":
        """The position of a run that MLflow has never heard of."""
        return cls(dict.fromkeys(JOURNALS, 0), closed=False)

    @classmethod
    def load(cls, run_dir: Path) -> "Sent":
        """The recorded position; the beginning where none is recorded or it is not readable.

        A position beyond the end of a journal (the journal lost its tail in a power failure) is
        also answered with the beginning: sending again is harmless, leaving out is not.
        """
        try:
            value = json.loads((run_dir / SENT).read_text())
            offsets = {name: int(value["offsets"].get(name, 0)) for name in JOURNALS}
            closed = bool(value["closed"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return cls.nothing()
        for name in JOURNALS:
            if offsets[name] > size(run_dir / name):
                offsets[name] = 0
        return cls(offsets, closed)

    def save(self, run_dir: Path) -> None:
        write_json(run_dir / SENT, asdict(self))


def size(path: Path) -> int:
    """Bytes in `path`; 0 where it does not exist."""
    return path.stat().st_size if path.exists() else 0


def read(path: Path, offset: int = 0) -> Iterator[tuple[Record | None, int]]:
    """Each complete line from byte `offset` on: its record and the offset behind it.

    A line that is not a record (a block that a power failure left empty) gives None. A last line
    without its newline is not complete: it is being written, or its writer was killed.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield _record(line), offset


def _record(line: bytes) -> Record | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "time" in value else None


class Journal:
    """The writing end. One process at a time may hold it for a path."""

    def __init__(self, path: Path) -> None:
        """Opens the journal, creating it, and cuts off a line that a killed writer left torn."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._end = 0
        for _, self._end in read(path):
            pass
        os.ftruncate(self._file, self._end)

    def append(self, record: Record) -> None:
        """Adds the time and writes one line with one system call; no fsync, the caller is training.

        Raises OSError where the disk refuses; the journal is then as it was before.
        """
        stamped = {"time": now_ms(), **record}
        line = json.dumps(stamped, separators=(",", ":")).encode() + b"\n"
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes fitted")
        except OSError:
            if self._file >= 0:
                os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)

    def close(self) -> None:
        """Ends the writing; `append` raises OSError from here on."""
        os.close(self._file)
        self._file = -1  # the number may soon be another file's
