"""Training as a task: a small picklable callable, here or wherever it is sent, on any rank."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import console, describe, endings, stopping
from jobs.errors import Exit, judged
from pipeline.loading import end_quickly, loading
from pipeline.signals import STOPS, withheld

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.run_directory import RunDirectory
    from pipeline.training.plan import Plan

log = logging.getLogger(__name__)
SAVING_SECONDS = 600  # that local ranks have to stop with a checkpoint before they are killed


@dataclass(frozen=True)
class Train:
    """Train a configuration in a run directory, on the rank that this process is."""

    config: Config
    run: Path
    quiet: bool = False
    stop_after: int | None = None

    def __call__(self) -> int:
        """The exit status: 0 finished, `Exit.INTERRUPTED` stopped with a checkpoint."""
        end_quickly()
        with stopping.noted() as stop:
            status, said = judged(lambda: self._train(stop))
            endings.leave(self.run, status, said)
            return status

    def _train(self, stop: stopping.StopRequest) -> int:
        with loading():
            from pipeline.distributed import World

            world = World.detect()
            rank = world.rank
            console.configure(self.quiet, rank=rank)  # libraries speak while they are loaded

            from pipeline.run_directory import RunDirectory
            from pipeline.training import engine
            from pipeline.training.run import run
            from pipeline.training.trainer import Outcome

            engine.load(world)

        # Nothing has begun, and no other rank waits for this one to agree.
        if stop.asked and world.world_size == 1:
            return Exit.INTERRUPTED
        directory = RunDirectory(self.run)
        display = console.TrainingDisplay(console.wants_bar(self.quiet) and rank == 0)

        def keep_log(planned: Plan) -> None:
            console.configure(self.quiet, directory.logs / f"rank-{rank}.log", rank)
            log.info("%s", describe.plan(planned))

        try:
            outcome = run(
                self.config,
                directory,
                display,
                on_owned=keep_log,
                stop_requested=lambda: stop.asked,
                stop_after=self.stop_after,
            )
        finally:
            display.close()
        if outcome is Outcome.FINISHED:
            if rank == 0 and display.idle:
                _say_finished(directory)
            return 0
        log.warning("stopped with a checkpoint; resume with: reprise train %s", self.run)
        return Exit.INTERRUPTED if stop.asked or self.stop_after is None else 0


def _say_finished(directory: RunDirectory) -> None:
    from pipeline.training import checkpoint

    # The directory is no longer owned: another process may be writing to it.
    log.warning(
        "%s finished at step %d before this call: for another run give --run or another seed",
        directory.path,
        checkpoint.find(directory.checkpoints).step,
    )


@dataclass(frozen=True)
class LocalRanks:
    """The same task as several local ranks; the others end when one fails."""

    task: Callable[[], int]
    nproc: int

    def __call__(self) -> int:
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        _silence("torch.distributed.elastic", "torch.multiprocessing")
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_SECONDS))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.nproc)))
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self.nproc,
            signals_to_handle=",".join(number.name for number in STOPS),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.2,
        )
        if stopping.heed():  # from here on the launcher answers to signals
            return Exit.INTERRUPTED
        with withheld():
            resource_tracker.ensure_running()  # the ranks share it
        try:
            elastic_launch(launch, _as_rank)(self.task)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return _say_why(rank, failure.exitcode)
        except SignalException:
            return Exit.INTERRUPTED
        return 0


def _say_why(rank: int, code: int) -> int:
    """The status of a rank that failed; negative codes are signals, as a shell counts them."""
    if code < 0:
        name = signal.Signals(-code).name
        log.error("error: rank %d was killed (%s); the same command resumes the run", rank, name)
        return 128 - code
    log.info("rank %d ended with status %d", rank, code)
    return code


def _as_rank(task: Callable[[], int]) -> int:
    """Turn a status into an exit, so that the launcher sees a failed rank as failed."""
    stopping.note()  # also while the process ends: the launcher is to see the status
    if code := task():
        sys.exit(code)
    # The launcher keeps finished ranks until all are, and ends them with a signal where it stops.
    stopping.heed()
    return 0


def _silence(*packages: str) -> None:
    """The launcher's modules set the levels of their own loggers: lower every one of them."""
    for name in logging.root.manager.loggerDict:
        if name.startswith(packages):
            logging.getLogger(name).setLevel(logging.CRITICAL)
