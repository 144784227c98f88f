"""Asking MLflow's stores and the machine's processes what really happened."""

import socket
import time
from collections import Counter

import psutil


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, seconds=40.0):
    """Waits until the condition holds; the bound only ends a test that hangs."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def senders(run_dir):
    """Processes that carry this run directory's journal."""
    mine = {"pipeline.tracking", str(run_dir)}
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if mine <= set(process.info["cmdline"] or [])]


def log_has(run_dir, text):
    path = run_dir / "tracking.log"
    return path.exists() and text in path.read_text()


class Store:
    """What MLflow knows, asked through its own client."""

    def __init__(self, uri):
        from mlflow import MlflowClient

        self.uri = uri
        self.client = MlflowClient(tracking_uri=uri)

    def runs(self, experiment="digits"):
        found = self.client.get_experiment_by_name(experiment)
        return [] if found is None else list(self.client.search_runs([found.experiment_id]))

    def points(self, run_id, name):
        history = self.client.get_metric_history(run_id, name)
        return sorted((point.step, point.value) for point in history)


def assert_steps_once(store, run_id, name, steps):
    counts = Counter(step for step, _ in store.points(run_id, name))
    assert counts == Counter(steps)
