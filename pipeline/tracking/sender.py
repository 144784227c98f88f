"""The process that carries a run's journal to MLflow.

It is a process and not a thread because importing MLflow and creating a database take seconds of
the interpreter's lock, which the training loop would feel. It ends by itself: when the journal is
sent and the run over, or a bounded time after its parent is gone.
"""

import logging
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

from filelock import Timeout

from data_prep.files import Lock
from pipeline.loading import loading
from pipeline.tracking import journal
from pipeline.tracking.journal import Journal, Record, Sent
from pipeline.tracking.outlet import METRICS_PER_CALL, Outlet, hopeless
from pipeline.tracking.system import SystemMetrics

DRAINED, LEFT, BUSY = 0, 1, 3
POLL_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
ORPHAN_SECONDS = 20.0
LOWEST_PRIORITY = 19  # as "nice" counts

log = logging.getLogger(__name__)


class Sender:
    """Carries the journals of one run directory; holds the directory's sender lock."""

    def __init__(self, run_dir: Path, parent: int, follow: bool) -> None:
        """`follow`: goes on until `parent`, the training process, says so or is gone.

        Otherwise sends what there is and ends.
        """
        self._run_dir = run_dir
        self._parent = parent
        self._outlet = Outlet(run_dir, training=follow)
        self._closing = not follow
        self._fault: tuple[str, str] | None = None
        self._system: SystemMetrics | None = None
        if follow:
            path = run_dir / journal.SYSTEM_JOURNAL
            points = sum(1 for _ in journal.read(path))
            self._system = SystemMetrics(Journal(path), first_step=points)

    def run(self) -> int:
        """Sends until the run is over; returns DRAINED or LEFT."""
        if self._system:
            self._system.start()
        pause = POLL_SECONDS
        while True:
            closing = self._is_closing()
            try:
                if self._step():
                    pause = POLL_SECONDS
                    continue
                if closing:
                    self._close()
                    return DRAINED
            except Exception as error:  # whatever goes wrong here, the training must not notice
                self._report(error)
                if closing and hopeless(error):
                    return LEFT
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            finally:
                if not closing:
                    _let_training_go_first()
            self._wait(pause)

    def _step(self) -> bool:
        """Connects, sends one batch and records the position; False where nothing was waiting."""
        self._outlet.connected()
        sent = Sent.load(self._run_dir)
        for name in journal.JOURNALS:
            records, end = _batch(self._run_dir / name, sent.offsets[name])
            if end > sent.offsets[name]:
                self._outlet.send(records)
                Sent({**sent.offsets, name: end}, closed=False).save(self._run_dir)
                self._fault = None
                return True
        return False

    def _close(self) -> None:
        """Gives the run the end that the journal names last.

        Where it names none, the training process was killed.
        """
        last: Record = {}
        for record, _ in journal.read(self._run_dir / journal.JOURNAL):
            last = record or last
        status = last.get("status", "RUNNING")
        status = "KILLED" if status == "RUNNING" else status
        self._outlet.close(status, last.get("time", journal.now_ms()))
        Sent(Sent.load(self._run_dir).offsets, closed=True).save(self._run_dir)
        log.info("all sent, status %s", status)

    def _is_closing(self) -> bool:
        """The parent says so with a byte, or is gone.

        A worker that the parent forked may hold the pipe open, so its end alone proves nothing.
        """
        if not self._closing:
            told = bool(select.select([sys.stdin], [], [], 0)[0])
            self._closing = told or os.getppid() != self._parent
            if self._closing and self._system:
                self._system.stop()
        return self._closing

    def _wait(self, seconds: float) -> None:
        """Pauses, but no longer than a moment once the end has been called."""
        if self._is_closing():
            time.sleep(POLL_SECONDS / 2)
        until = time.monotonic() + seconds
        while not self._is_closing() and (left := until - time.monotonic()) > 0:
            select.select([sys.stdin], [], [], min(left, POLL_SECONDS))

    def _report(self, error: Exception) -> None:
        """Names a fault once, not at every attempt."""
        fault = (type(error).__name__, str(getattr(error, "error_code", "")))
        if fault != self._fault:
            log.warning("the journal cannot be sent now and is kept: %s: %s", fault[0], error)
            self._fault = fault


def _batch(path: Path, offset: int) -> tuple[list[Record], int]:
    """Records from `offset` on, about one call's worth, and the offset behind them.

    The journal is forced to disk first: what MLflow knows, the journal must not lose.
    """
    records: list[Record] = []
    metrics = 0
    if journal.size(path) > offset:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for record, end in journal.read(path, offset):
        offset = end
        if record is None:
            log.error("%s: the line that ends at byte %d is no record and is left out", path, end)
            continue
        records.append(record)
        metrics += len(record.get("metrics", {}))
        # A file is sent last in its batch: when it fails, little else is sent again.
        if metrics >= METRICS_PER_CALL or "artifact" in record:
            break
    return records, offset


def _let_training_go_first() -> None:
    """What is left once all is loaded and the run is known is little, and can wait a little.

    Not the idle policy, which has no share at all of cores that other work keeps busy. The group is
    this process with all of its threads; alone, "the process" would be the calling thread.
    """
    os.setpriority(os.PRIO_PGRP, 0, LOWEST_PRIORITY)


def _leave_after(parent: int) -> None:
    """The last resort: no call that hangs may keep an orphan alive."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    time.sleep(ORPHAN_SECONDS)
    os._exit(LEFT)


def _announce(run_dir: Path, parent: int, answers: int) -> int:
    """Announces, writes the status to the descriptor, and takes all back if it is told to."""
    told: list[Outlet] = []
    try:
        # No longer than that: the training which is started then waits for the lock.
        with Lock(run_dir / journal.LOCK, timeout=0):
            status = _schedule(run_dir, parent, told)
    except Timeout:
        status = BUSY
    os.write(answers, bytes([status]))
    if not sys.stdin.buffer.readline():
        return status
    try:
        for outlet in reversed(told):
            outlet.withdraw()
    except Exception as error:
        log.warning("what waits cannot be taken back: %s: %s", type(error).__name__, error)
        return LEFT
    return DRAINED


def _schedule(run_dir: Path, parent: int, told: list[Outlet]) -> int:
    """Creates the run, and those of the run directories within; one that has such is over then."""
    members = [path.parent for path in sorted(run_dir.glob(f"*/{journal.IDENTITY}"))]
    try:
        for number, folder in enumerate([run_dir, *members]):
            told.append(Outlet(folder, training=False))
            told[-1].schedule()
            if members and number == 0:
                Sender(run_dir, parent, follow=False).run()
    except Exception as error:  # whatever it is, the training will ask again
        log.warning("the run cannot be created now: %s: %s", type(error).__name__, error)
        return LEFT
    return DRAINED


def main(mode: str, parent: int, run_dir: Path | None = None) -> int:
    """Runs the one sender of a run directory; BUSY where it should not wait and one is at work.

    Mode `follow` goes on until the training ends; `finish` sends what is left right after it, and
    `drain` at any later time. `announce` only creates the run, for a training that is not started
    yet; it is told of which by a line on its standard input, answers with a byte on its standard
    output, and takes that back on another line. The first two wait for a sender that a killed
    training process left behind: it ends soon.
    """
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever else is printed is no answer
    # Ctrl-C and a scheduler's signals are for the training process, which decides when to end.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_leave_after, args=(parent,), daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        with loading():
            import mlflow  # noqa: F401  before any thread: two at once can meet half-built modules
    finally:
        run_dir = run_dir or _told()  # where it is also said what went wrong
    if run_dir is None:
        return DRAINED
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # what goes wrong is reported above
    if mode == "announce":
        return _announce(run_dir, parent, answers)
    try:
        with Lock(run_dir / journal.LOCK, timeout=-1 if mode in ("follow", "finish") else 0):
            return Sender(run_dir, parent, mode == "follow").run()
    except Timeout:
        return BUSY


def _told() -> Path | None:
    """The run directory that stands on standard input, whose log takes the output from now on."""
    line = sys.stdin.buffer.readline().removesuffix(b"\n")
    if not line:
        return None
    run_dir = Path(os.fsdecode(line))
    with (run_dir / journal.LOG).open("ab") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    return run_dir
