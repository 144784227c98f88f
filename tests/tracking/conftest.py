"""Real stores: sqlite files with MLflow's tables, one MLflow server, a port that can be shut."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest
from stores import Store, free_port, senders, wait_for

from pipeline.tracking import Tracker


@pytest.fixture
def store(database, tmp_path, monkeypatch):
    """An own sqlite store in the working folder, as a user has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(database, tmp_path / "mlflow.db")
    return Store(f"sqlite:///{tmp_path / 'mlflow.db'}")


@pytest.fixture
def run_dir(tmp_path):
    """A run directory; the test fails if a sender outlives it."""
    path = tmp_path / "run"
    path.mkdir()
    yield path
    left = senders(path)
    for process in left:
        process.kill()
    assert not left, "a sender was left behind"


@pytest.fixture
def tracker(run_dir):
    """Opens the run directory's tracker, as every start of the run does."""

    def open_tracker(**options):
        return Tracker(run_dir, run_name="first", experiment="digits", **options)

    return open_tracker


@pytest.fixture(scope="session")
def server(database, tmp_path_factory):
    """One real MLflow server; its process group, so that it can be stopped and continued."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(database, folder / "mlflow.db")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", (folder / "mlartifacts").as_uri()]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )

    def answers():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        assert process.poll() is None, (folder / "log").read_text()
        return False

    wait_for(answers, 60)
    yield process, port
    os.killpg(process.pid, signal.SIGCONT)
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Gate:
    """A port that leads to the server while it is open and refuses connections while it is not."""

    def __init__(self, target):
        self._target = target
        self.port = free_port()
        self._listener = None

    def open(self):
        self._listener = socket.create_server(("127.0.0.1", self.port), reuse_port=True)
        threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()

    def close(self):
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None

    def _serve(self, listener):
        with contextlib.suppress(OSError):
            while True:
                inner, _ = listener.accept()
                outer = socket.create_connection(("127.0.0.1", self._target))
                for pair in ((inner, outer), (outer, inner)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    @staticmethod
    def _copy(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def gate(server):
    gate = Gate(server[1])
    yield gate
    gate.close()
