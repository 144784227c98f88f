"""What the machine does while it trains, named as MLflow's page of system metrics expects."""

import logging
import threading
from typing import Any

from pipeline.tracking.journal import Journal

SAMPLE_SECONDS = 2.0
SAMPLES_PER_POINT = 5

log = logging.getLogger(__name__)


class SystemMetrics:
    """Samples processor, memory, disk, network and NVIDIA GPUs into a journal, in a daemon thread.

    It belongs into the sender's process, which runs on the machine of rank 0 and has MLflow
    imported anyway, so that not even the sampling costs the training process anything.
    """

    def __init__(self, journal: Journal, first_step: int) -> None:
        """`first_step` continues the count of points of an earlier start of the same run."""
        self._journal = journal
        self._step = first_step
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the sampling with a last point, so that the shortest run has one."""
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        monitors = _monitors()
        samples = 0
        stopped = False
        while not stopped:
            stopped = self._stop.wait(SAMPLE_SECONDS)
            for monitor in monitors:
                monitor.collect_metrics()
            samples += 1
            if stopped or samples == SAMPLES_PER_POINT:
                self._publish(monitors)
                samples = 0

    def _publish(self, monitors: list[Any]) -> None:
        values: dict[str, float] = {}
        for monitor in monitors:
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        metrics = {f"system/{name}": float(value) for name, value in values.items()}
        try:
            self._journal.append({"metrics": metrics, "step": self._step})
        except OSError as error:
            log.error("system metrics of sample %d are lost: %s", self._step, error)
        self._step += 1


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    # psutil answers the first question for the processor's load with 0: nothing to compare with.
    monitors[0].collect_metrics()
    monitors[0].clear_metrics()
    try:
        monitors.append(GPUMonitor())
    except (ImportError, RuntimeError) as error:
        log.info("no GPU metrics: %s", error)
    return monitors
