"""MLflow's page on the store in use, with everything that the runs still have to tell it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)
REPLAY_SECONDS = 10.0  # for each run that is not wholly at the store yet
LOADING_SECONDS = 60.0  # of a server that listens already and cannot answer yet
# Eight processes more, with 1.4 GB, that judge what language models say.
_WITHOUT_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def send_journals(runs: Path) -> None:
    """Send what the runs' journals still hold; a store that cannot be reached is asked once."""
    from jobs.runs import directories
    from pipeline import tracking
    from pipeline.tracking.journal import JOURNAL

    # The parent of a sweep has a journal and no configuration.
    told = [run for run in directories(runs, holding=JOURNAL) if _has_begun(run / JOURNAL)]
    for number, run in enumerate(told, start=1):
        if not tracking.replay(run, timeout=REPLAY_SECONDS):
            log.warning("%d more runs are not asked for what they hold", len(told) - number)
            return


def _has_begun(path: Path) -> bool:
    """Not so a run that waits for its job: what is sent for it by others would give it an end."""
    from pipeline.tracking import journal

    return any("params" not in record for record, _ in journal.read(path) if record)


def address(port: int, runs: Path) -> str:
    """Of the table of these runs on the server at this port, or of its first page where there are
    none, or runs of several experiments.
    """
    from jobs.runs import directories
    from pipeline.tracking.journal import Identity

    server = f"http://127.0.0.1:{port}"
    found = {
        identity.experiment
        for run in directories(runs)
        if (identity := Identity.load(run)) is not None
    }
    if len(found) != 1:
        return server
    query = urllib.parse.urlencode({"experiment_name": found.pop()})
    try:
        with urllib.request.urlopen(
            f"{server}/api/2.0/mlflow/experiments/get-by-name?{query}", timeout=LOADING_SECONDS
        ) as answer:
            number = json.load(answer)["experiment"]["experiment_id"]
    except (OSError, ValueError, KeyError):
        return server  # the page is there all the same
    return f"{server}/#/experiments/{number}/runs"


def serve(command: list[str], port: int, ready: Callable[[], None]) -> int:
    """Run a server on a local port until it ends, Ctrl-C or SIGTERM; no process of it is left.

    ``ready`` is called once it answers.

    Raises:
        ValueError: the port is taken.
    """
    import psutil

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"port {port} cannot be used ({error}): give another --port") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    server = psutil.Popen(command, env=_WITHOUT_JOBS | os.environ)
    try:
        while server.poll() is None:
            if _answers(port):
                ready()
                break
            time.sleep(0.1)
        return int(server.wait())
    finally:
        # Ctrl-C may have reached this process alone, and the server has processes of its own.
        left = [*server.children(recursive=True), server] if server.is_running() else []
        for end in (psutil.Process.terminate, psutil.Process.kill):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    end(process)
            _, left = psutil.wait_procs(left, timeout=5)


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
