"""The MLflow run behind a run directory: found or created, fed, and given its end."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.tracking import journal
from pipeline.tracking.journal import Identity, Record, Sent

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run, RunInfo

METRICS_PER_CALL = 1000  # MLflow's limits for one batch
PARAMS_PER_CALL = 100
UID_TAG = "reprise.uid"
PARENT_TAG = "mlflow.parentRunId"  # MLflow's page shows a run below the one named

log = logging.getLogger(__name__)


class Outlet:
    """The MLflow run that a run directory is; connects on first use."""

    def __init__(self, run_dir: Path, training: bool) -> None:
        self._run_dir = run_dir
        self._training = training
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._is_new = False
        self._before: RunInfo | None = None

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

    def send(self, records: list[Record]) -> None:
        """Sends the records; raises what MLflow raises, then all of them may be sent again.

        What MLflow refuses for good (a name that it does not allow) is logged and left out.
        """
        from mlflow.entities import Metric, Param, RunTag

        self.connected()
        metrics = [
            Metric(name, value, record["time"], record["step"])
            for record in records
            for name, value in record.get("metrics", {}).items()
        ]
        params = [Param(k, v) for record in records for k, v in record.get("params", {}).items()]
        tags = [RunTag(k, v) for record in records for k, v in record.get("tags", {}).items()]
        for i in range(0, len(metrics), METRICS_PER_CALL):
            self._log("metrics", metrics[i : i + METRICS_PER_CALL])
        for i in range(0, len(params), PARAMS_PER_CALL):
            self._log("params", params[i : i + PARAMS_PER_CALL])
        for i in range(0, len(tags), PARAMS_PER_CALL):
            self._log("tags", tags[i : i + PARAMS_PER_CALL])
        for record in records:
            if "artifact" in record:
                self._artifact(self._run_dir / record["artifact"], record["folder"])

    def schedule(self) -> None:
        """Marks the run as one that waits to be started."""
        client = self.connected()
        self._before = client.get_run(self._run_id).info
        client.update_run(self._run_id, status="SCHEDULED")

    def withdraw(self) -> None:
        """Takes `schedule` back: a run that it created is deleted, another one is as it was."""
        if self._client is None:
            return
        if self._is_new:
            self._client.delete_run(self._run_id)
            if identity := Identity.load(self._run_dir):
                replace(identity, run_id=None).save(self._run_dir)
        elif self._before is not None:
            self._client.update_run(self._run_id, status=self._before.status)

    def close(self, status: str, end_ms: int) -> None:
        """Gives the run its end: a status of MLflow's and a time in milliseconds."""
        self.connected().set_terminated(self._run_id, status, end_ms)

    def _find_run(self, client: "MlflowClient", identity: Identity) -> str:
        """The run's id; where the store does not have the run, a new one, sent from the start."""
        if identity.run_id and _exists(client, identity.run_id):
            return identity.run_id
        experiment_id = _experiment(client, identity)
        runs = _with_uid(client, experiment_id, identity.uid)
        if not runs:
            Sent.nothing().save(self._run_dir)
            tags = {UID_TAG: identity.uid, "reprise.run_dir": str(self._run_dir)}
            if identity.parent:
                above = Outlet(Path(identity.parent), training=False)
                above.connected()
                tags[PARENT_TAG] = above._run_id
            self._is_new = True
            client.create_run(experiment_id, identity.begun_ms, tags, identity.run_name)
            # An earlier creation whose answer never came may have happened after all.
            runs = _with_uid(client, experiment_id, identity.uid)
        run, *others = runs
        for other in others:
            client.delete_run(other.info.run_id)
        replace(identity, run_id=run.info.run_id).save(self._run_dir)
        return str(run.info.run_id)

    def _log(self, kind: str, entries: list[Any]) -> None:
        """Sends one batch; where MLflow refuses it, finds the bad entry and leaves that one out."""
        from mlflow.exceptions import MlflowException

        client = self.connected()
        batch: dict[str, Any] = {kind: entries}
        try:
            client.log_batch(self._run_id, **batch)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE" or self._is_deleted():
                raise
            if len(entries) == 1:
                log.error("MLflow refuses %s %s: %s", kind, entries[0].key, error.message)
                return
            half = len(entries) // 2
            self._log(kind, entries[:half])
            self._log(kind, entries[half:])

    def _artifact(self, path: Path, folder: str | None) -> None:
        from requests import HTTPError

        try:
            self.connected().log_artifact(self._run_id, str(path), folder)
        except (FileNotFoundError, PermissionError) as error:
            log.error("file %s is not sent: %s", path, error)
        except HTTPError as error:
            # 413: larger than the server, or a proxy before it, will ever take.
            if error.response is None or error.response.status_code != 413:
                raise
            log.error("MLflow refuses file %s: %s", path, error)

    def _is_deleted(self) -> bool:
        run = self.connected().get_run(self._run_id)
        return bool(run.info.lifecycle_stage != "active")


def hopeless(error: Exception) -> bool:
    """Whether waiting cannot cure it: the run was deleted, or there is no permission."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        return False
    return error.error_code == "INVALID_PARAMETER_VALUE" or error.get_http_status_code() in (
        401,
        403,
        404,
    )


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
    """The runs that were created for this run directory, the oldest first."""
    return list(
        client.search_runs(
            [experiment_id],
            filter_string=f"tags.`{UID_TAG}` = '{uid}'",
            order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
        )
    )
