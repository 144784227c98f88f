"""The training process's side of tracking."""

import contextlib
import logging
import os
import select
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import urlsplit

from pipeline.tracking import journal
from pipeline.tracking.journal import Identity, Journal, Record, Sent
from pipeline.tracking.sender import BUSY, DRAINED

Status = Literal["FINISHED", "FAILED", "KILLED"]
Process = subprocess.Popen[bytes]

log = logging.getLogger(__name__)


def store_uri(folder: Path | None = None) -> str:
    """The store in use: MLFLOW_TRACKING_URI, else a sqlite file in `folder` (the working folder).

    Raises ValueError for an address that cannot be used.
    """
    folder = folder or Path.cwd()
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return _checked(given, folder) if given else f"sqlite:///{folder.resolve() / 'mlflow.db'}"


def _checked(uri: str, folder: Path) -> str:
    """The address, a sqlite path made absolute."""
    parts = urlsplit(uri)
    if parts.password:
        raise ValueError(
            f"tracking address with a password in it (host {parts.hostname}): it would be written "
            "to disk; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        )
    if uri.startswith("sqlite:///") and len(uri) > len("sqlite:///"):
        return f"sqlite:///{(folder / uri.removeprefix('sqlite:///')).resolve()}"
    if parts.scheme in ("http", "https") and parts.hostname:
        return uri
    raise ValueError(
        f"tracking address {uri!r} cannot be used: give sqlite:///FILE or http(s)://HOST:PORT"
    )


def ui_command(uri: str, port: int = 5000) -> list[str] | None:
    """Arguments that start MLflow's page on a sqlite store; None where `uri` is a server already.

    The page listens on the loopback interface only.
    """
    if not uri.startswith("sqlite:///"):
        return None
    artifacts = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--artifacts-destination", artifacts, "--host", "127.0.0.1"]
    # A line for each picture of each page hides what a person should read.
    command += ["--uvicorn-opts", "--log-level warning"]
    return [*command, "--port", str(port), "--workers", "1"]


class Tracker:
    """What one run tells MLflow. Only rank 0 constructs it."""

    def __init__(
        self,
        run_dir: Path,
        *,
        run_name: str,
        experiment: str,
        uri: str | None = None,
        parent: Path | None = None,
    ) -> None:
        """Opens the run directory's journal; nothing is sent and nothing is imported yet.

        `uri` None takes the run directory's recorded address, else `store_uri()`. Another address
        than the recorded one sends the whole journal there. `parent` is the run directory of the
        run that this one belongs to. Raises ValueError for an address that cannot be used.
        """
        self._run_dir = run_dir.resolve()
        self._run_dir.mkdir(parents=True, exist_ok=True)
        identity = Identity.load(self._run_dir)
        if identity is None:
            address = _checked(uri, Path.cwd()) if uri else store_uri()
            above = str(parent.resolve()) if parent else None
            identity = Identity(
                address, experiment, run_name, uuid.uuid4().hex, journal.now_ms(), parent=above
            )
            identity.save(self._run_dir)
        elif uri and _checked(uri, Path.cwd()) != identity.uri:
            identity = replace(identity, uri=_checked(uri, Path.cwd()), run_id=None)
            identity.save(self._run_dir)
        self._identity = identity
        self._params: dict[str, str] = {}
        self._points: dict[int, frozenset[str]] = {}  # step -> names
        self._shared: dict[frozenset[str], frozenset[str]] = {}
        self._process: Process | None = None
        path = self._run_dir / journal.JOURNAL
        self._journal = Journal(path)
        for record, _ in journal.read(path):
            self._remember(record or {})

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None until the sender has reached the store once."""
        if self._identity.run_id is None:
            self._identity = Identity.load(self._run_dir) or self._identity
        return self._identity.run_id

    def start(self) -> None:
        """Begins to send in the background; returns at once, whatever the server does."""
        self._append({"status": "RUNNING"})
        self._process = _spawn(self._run_dir, "follow")

    def params(self, values: Mapping[str, str | int | float | bool | None]) -> None:
        """Records parameters, which MLflow never changes: the first value of each name is kept."""
        texts = {name: str(value) for name, value in values.items()}
        for name, text in texts.items():
            if (first := self._params.get(name, text)) != text:
                log.warning("parameter %s is %s now; tracked stays %s", name, text, first)
        new = {name: text for name, text in texts.items() if name not in self._params}
        if new:
            self._append({"params": new})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Records one point per name. A point that the journal has already is left out.

        A resumed run repeats the steps since its checkpoint; they must not appear twice.
        """
        known = self._points.get(step, frozenset())
        new = {name: float(value) for name, value in values.items() if name not in known}
        if new:
            self._append({"metrics": new, "step": step})

    def tags(self, values: Mapping[str, str]) -> None:
        """Records tags; a later value replaces an earlier one."""
        self._append({"tags": dict(values)})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Records that the file belongs to the run; logged again, it replaces the earlier one.

        It is read when it is sent: leave it where it is. Raises FileNotFoundError, and ValueError
        for a folder outside the run's own.
        """
        if folder is not None and (folder.startswith("/") or ".." in folder.split("/")):
            raise ValueError(f"artifact folder {folder!r} leads out of the run: name one inside")
        path = path.resolve()
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is not a file: an artifact must exist when it is named"
            )
        if path.is_relative_to(self._run_dir):
            # A run directory may be moved; its files move with it.
            path = path.relative_to(self._run_dir)
        self._append({"artifact": str(path), "folder": folder})

    def close(self, status: Status) -> None:
        """Records the end of a run that nothing more will be told of; sends nothing."""
        self._append({"status": status})
        self._journal.close()

    def finish(self, status: Status, timeout: float = 20.0) -> bool:
        """Sends what is left within `timeout` seconds and gives the MLflow run its end.

        Returns False, after saying how much and the cure, where something is left for later.
        """
        self.close(status)
        started = time.monotonic()
        # Who sent had the cores last, and gets them never where other work keeps them busy.
        code = _end(self._process, started + timeout / 2) if self._process else None
        if code is None or code < 0:
            # Nobody sends, or who did was killed (here, by hand, for want of memory): another takes
            # over, with its share of the cores.
            code = _end(_spawn(self._run_dir, "finish"), started + timeout)
        return _is_done(self._run_dir, code)

    def state_dict(self) -> dict[str, str | None]:
        """Which MLflow run this is, for a checkpoint."""
        return {"mlflow_run_id": self.run_id, "uid": self._identity.uid}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Checks that the checkpoint is of this run; the run directory says which run it is."""
        if state["uid"] != self._identity.uid:
            log.warning(
                "the checkpoint was tracked as MLflow run %s, this run directory is %s: it goes on "
                "as the latter",
                state["mlflow_run_id"],
                self.run_id,
            )

    def _append(self, record: Record) -> None:
        try:
            self._journal.append(record)
        except OSError as error:
            log.error("not tracked: %s of %s", error, record)
            return
        self._remember(record)

    def _remember(self, record: Record) -> None:
        if metrics := record.get("metrics"):
            names = self._points.get(record["step"], frozenset()).union(metrics)
            # Most steps have the same names: one set for all of them keeps long runs small.
            self._points[record["step"]] = self._shared.setdefault(names, names)
        for name, text in record.get("params", {}).items():
            self._params.setdefault(name, text)


def history(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric as (step, value) in the order of steps, from the journals alone."""
    points: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    for name in journal.JOURNALS:
        for record, _ in journal.read(run_dir / name):
            if record is None:
                continue
            for key, value in record.get("metrics", {}).items():
                points[key].append((record["step"], value))
    return {key: sorted(values, key=lambda point: point[0]) for key, values in points.items()}


def replay(run_dir: Path, timeout: float = 60.0) -> bool:
    """Sends what the journal of a run that is over still holds; True where nothing is left."""
    run_dir = run_dir.resolve()
    if Identity.load(run_dir) is None or (Sent.load(run_dir).closed and not _left(run_dir)):
        return True
    code = _end(_spawn(run_dir, "drain"), time.monotonic() + timeout)
    return _is_done(run_dir, code)


class Announcer:
    """Tells MLflow of trainings that wait to be started; see `announcer`."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._told = False

    def __call__(self, run_dir: Path, timeout: float) -> bool:
        """Tells of a run directory, and of those within, once; False where no server answers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._told = True
        with contextlib.suppress(BrokenPipeError):
            os.write(self._process.stdin.fileno(), os.fsencode(run_dir.resolve()) + b"\n")
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            self._process.kill()
        return bool(set(self._process.stdout.read(1)) & {DRAINED, BUSY})

    def withdraw(self, timeout: float) -> bool:
        """Takes it back, in MLflow and in run directories that are left; False where it cannot.

        A run that was created is deleted, another one has the status from before.
        """
        if not self._told:
            return True
        return _end(self._process, time.monotonic() + timeout, b"withdraw") == DRAINED


@contextlib.contextmanager
def announcer() -> Iterator[Announcer]:
    """Yields what tells MLflow of a training that waits to be started, and of those of its members.

    MLflow is loaded in the background until it is told; what it is not told of leaves no trace.
    """
    with _start("announce", subprocess.DEVNULL, answers=subprocess.PIPE) as process:
        try:
            yield Announcer(process)
        finally:
            process.kill()


def _left(run_dir: Path) -> int:
    """Records that were not sent yet."""
    offsets = Sent.load(run_dir).offsets
    return sum(1 for name in offsets for _ in journal.read(run_dir / name, offsets[name]))


def _spawn(run_dir: Path, mode: Literal["follow", "finish", "drain"]) -> Process:
    with (run_dir / journal.LOG).open("ab") as output:
        return _start(mode, output, run_dir)


def _start(
    mode: str, output: IO[bytes] | int, *run_dir: Path, answers: int | None = None
) -> Process:
    """A sender; its output goes to a file or one of subprocess' special values.

    `answers` is where its standard output goes instead.
    """
    words = [mode, os.getpid(), *run_dir]
    # MLflow's own defaults would let one call to a dead server last four minutes.
    environment = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "OMP_NUM_THREADS": "1",
        **os.environ,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.tracking", *map(str, words)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=output if answers is None else answers,
        stderr=output,
        # Ctrl-C in the terminal is for the training process. No session of its own: Linux may
        # share the cores between sessions before it looks at priorities.
        process_group=0,
    )


def _end(process: Process, until: float, last_word: bytes = b"") -> int:
    """Asks the sender to end, ends it at `until` (monotonic seconds), and answers its status."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(last_word + b"\n")
        process.stdin.close()
    try:
        return process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _is_done(run_dir: Path, code: int) -> bool:
    """Whether a sender's status means that nothing is left; where something is, says what."""
    if code in (DRAINED, BUSY):
        return True
    identity = Identity.load(run_dir)
    assert identity is not None
    log.warning(
        "%d records and the end of run %s are not at %s yet (%s says why): start the run again, or "
        "call `reprise ui`, to send them",
        _left(run_dir),
        run_dir,
        identity.uri,
        run_dir / journal.LOG,
    )
    return False
