"""The process that carries a run's journal to MLflow: `python -m pipeline.tracking.sender`.

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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from pipeline.tracking import journal
from pipeline.tracking.journal import Identity, Journal, Record, Sent
from pipeline.tracking.system import SystemMetrics

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DRAINED, LEFT, BUSY = 0, 1, 3
POLL_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
ORPHAN_SECONDS = 20.0
METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
UID_TAG = "reprise.uid"

log = logging.getLogger(__name__)


class Outlet:
    """The MLflow run that a run directory is; connects on first use."""

    def __init__(self, run_dir: Path, training: bool) -> None:
        self._run_dir = run_dir
        self._training = training
        self._client: MlflowClient | None = None
        self._run_id = ""

    def send(self, records: list[Record]) -> None:
        """Sends the records; raises what MLflow raises, then all of them may be sent again."""
        from mlflow.entities import Metric, Param, RunTag

        client = self.connected()
        metrics = [
            Metric(name, value, record["time"], record["step"])
            for record in records
            for name, value in record.get("metrics", {}).items()
        ]
        params = [Param(k, v) for record in records for k, v in record.get("params", {}).items()]
        tags = [RunTag(k, v) for record in records for k, v in record.get("tags", {}).items()]
        for part in _parts(metrics, METRICS_PER_CALL):
            self._log(metrics=part)
        for part in _parts(params, PARAMS_PER_CALL):
            self._log(params=part)
        for part in _parts(tags, PARAMS_PER_CALL):
            self._log(tags=part)
        for record in records:
            if "artifact" in record:
                self._artifact(client, self._run_dir / record["artifact"], record["folder"])

    def close(self, status: str, end_ms: int) -> None:
        """Gives the run its end."""
        self.connected().set_terminated(self._run_id, status, end_ms)

    def connected(self) -> "MlflowClient":
        """The client, after the run was found or created and, in training, marked as running."""
        if self._client is None:
            from mlflow import MlflowClient

            identity = Identity.load(self._run_dir)
            if identity is None:
                raise FileNotFoundError(
                    f"{self._run_dir / journal.IDENTITY} is missing: start the run again"
                )
            client = MlflowClient(tracking_uri=identity.uri)
            self._run_id = self._find_run(client, identity)
            if self._training:
                client.update_run(self._run_id, status="RUNNING")
            log.info("sending to run %s at %s", self._run_id, identity.uri)
            self._client = client
        return self._client

    def _find_run(self, client: "MlflowClient", identity: Identity) -> str:
        """The run's id; where the store does not have the run, a new one, sent from the start."""
        if identity.run_id and _exists(client, identity.run_id):
            return identity.run_id
        experiment_id = _experiment(client, identity)
        runs = _with_uid(client, experiment_id, identity.uid)
        if not runs:
            Sent(dict.fromkeys(journal.JOURNALS, 0), False).save(self._run_dir)
            tags = {UID_TAG: identity.uid, "reprise.run_dir": str(self._run_dir)}
            client.create_run(experiment_id, tags=tags, run_name=identity.run_name)
            # A creation that timed out may have happened after all, behind our back.
            runs = _with_uid(client, experiment_id, identity.uid)
        run, *others = runs
        for other in others:
            client.delete_run(other.info.run_id)
        replace(identity, run_id=run.info.run_id).save(self._run_dir)
        return str(run.info.run_id)

    def _log(self, **batch: list[Any]) -> None:
        """Sends one batch; where MLflow refuses it, finds the entry and leaves only that one out."""
        from mlflow.exceptions import MlflowException

        client = self.connected()
        ((kind, entries),) = batch.items()
        try:
            client.log_batch(self._run_id, **batch)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if client.get_run(self._run_id).info.lifecycle_stage != "active":
                raise
            if len(entries) == 1:
                log.error("MLflow refuses %s %s: %s", kind[:-1], entries[0].key, error.message)
                return
            half = len(entries) // 2
            self._log(**{kind: entries[:half]})
            self._log(**{kind: entries[half:]})

    def _artifact(self, client: "MlflowClient", path: Path, folder: str | None) -> None:
        try:
            client.log_artifact(self._run_id, str(path), folder)
        except (FileNotFoundError, PermissionError) as error:
            log.error("the file %s is not sent: %s", path, error)


def _parts(entries: list[Any], length: int) -> list[list[Any]]:
    return [entries[i : i + length] for i in range(0, len(entries), length)]


def _exists(client: "MlflowClient", run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def _experiment(client: "MlflowClient", identity: Identity) -> str:
    found = client.get_experiment_by_name(identity.experiment)
    if found is not None:
        return str(found.experiment_id)
    location = None
    if identity.uri.startswith("sqlite:///"):
        # Named, because MLflow's own choice depends on what else lies in the working folder.
        database = Path(identity.uri.removeprefix("sqlite:///"))
        location = (database.parent / "mlartifacts").as_uri()
    return client.create_experiment(identity.experiment, artifact_location=location)


def _with_uid(client: "MlflowClient", experiment_id: str, uid: str) -> "list[Run]":
    """Runs with this uid, the oldest first; deleted ones too, for a deletion is the user's will."""
    from mlflow.entities import ViewType

    return list(
        client.search_runs(
            [experiment_id],
            filter_string=f"tags.`{UID_TAG}` = '{uid}'",
            run_view_type=ViewType.ACTIVE_ONLY,
            order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
        )
    )


class Sender:
    """Follows the journals of one run directory."""

    def __init__(self, run_dir: Path, parent: int | None) -> None:
        """`parent` is the training process; None sends what there is and ends."""
        self._run_dir = run_dir
        self._parent = parent
        self._outlet = Outlet(run_dir, training=parent is not None)
        self._closing = parent is None
        self._last_error = ""

    def run(self) -> int:
        """Sends until the run is over; returns DRAINED or LEFT."""
        if self._parent is None:
            return self._loop()
        path = self._run_dir / journal.SYSTEM_JOURNAL
        system = SystemMetrics(Journal(path), sum(1 for _ in journal.read(path)))
        system.start()
        try:
            self._loop()
        finally:
            system.stop()
        return self._loop()

    def _loop(self) -> int:
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
                pause = POLL_SECONDS
            except Exception as error:  # whatever goes wrong here, the training must not notice
                self._report(error)
                if closing and _hopeless(error):
                    return LEFT
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            self._wait(pause)

    def _step(self) -> bool:
        """Connects, sends one batch and records the position; False where nothing was waiting."""
        self._outlet.connected()
        sent = Sent.load(self._run_dir)
        for name in journal.JOURNALS:
            records, end = _batch(self._run_dir / name, sent.offsets[name])
            if end > sent.offsets[name]:
                self._outlet.send(records)
                offsets = {**sent.offsets, name: end}
                Sent(offsets, False).save(self._run_dir)
                return True
        return False

    def _close(self) -> None:
        last: Record | None = None
        for last, _ in journal.read(self._run_dir / journal.JOURNAL):
            pass
        # Without a word about its end, the training process was killed.
        status = (last or {}).get("status", "KILLED")
        self._outlet.close(status, (last or {}).get("time", time.time_ns() // 1_000_000))
        Sent(Sent.load(self._run_dir).offsets, True).save(self._run_dir)
        log.info("all sent, status %s", status)

    def _is_closing(self) -> bool:
        """The parent says so with a byte (or the end of the pipe), or is gone."""
        if not self._closing:
            told = bool(select.select([sys.stdin], [], [], 0)[0])
            self._closing = told or os.getppid() != self._parent
        return self._closing

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        if self._is_closing():
            time.sleep(min(seconds, POLL_SECONDS / 2))
        while not self._is_closing() and (left := until - time.monotonic()) > 0:
            select.select([sys.stdin], [], [], min(left, POLL_SECONDS))

    def _report(self, error: Exception) -> None:
        """Names a fault once, not at every attempt."""
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if text != self._last_error:
            log.warning("MLflow does not take the journal now, it is kept: %s", text)
            self._last_error = text


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
        if record is None:
            log.error("%s: the line that ends at byte %d is no record and is left out", path, end)
        else:
            records.append(record)
            metrics += len(record.get("metrics", {}))
        offset = end
        if metrics >= METRICS_PER_CALL or (record and "artifact" in record):
            break
    return records, offset


def _hopeless(error: Exception) -> bool:
    """Whether waiting cannot cure it: no permission, or the run was deleted."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        return False
    return error.error_code == "INVALID_PARAMETER_VALUE" or error.get_http_status_code() in (
        401,
        403,
        404,
    )


def _leave_after(parent: int) -> None:
    """The last resort: no call that hangs may keep an orphan alive."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    time.sleep(ORPHAN_SECONDS)
    os._exit(LEFT)


def main(run_dir: Path, parent: int | None) -> int:
    """Runs the one sender of a run directory; BUSY where a live one is at work already."""
    # Ctrl-C and a scheduler's signals are for the training process, which decides when to end.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    os.nice(10)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if parent is not None:
        threading.Thread(target=_leave_after, args=(parent,), daemon=True).start()
    try:
        # A sender that a killed training process left behind ends soon; until then it holds this.
        with FileLock(run_dir / journal.LOCK, timeout=0 if parent is None else -1):
            return Sender(run_dir, parent).run()
    except Timeout:
        return BUSY


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None))
