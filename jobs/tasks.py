"""Tasks: small picklable callables that do one piece of work, here or wherever they are sent."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import console
from jobs.errors import Exit, guarded

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.evaluate import Summary

log = logging.getLogger(__name__)
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


@dataclass(frozen=True)
class Train:
    """Train a configuration in a run directory, on the rank that this process is."""

    config: Config
    run: Path
    quiet: bool = False
    stop_after: int | None = None

    def __call__(self) -> int:
        """The exit status: 0 finished, `Exit.INTERRUPTED` stopped with a checkpoint."""
        return guarded(self._train)

    def _train(self) -> int:
        from pipeline.distributed import World
        from pipeline.run_directory import RunDirectory
        from pipeline.training.run import run
        from pipeline.training.trainer import Outcome

        rank = World.detect().rank
        console.configure(self.quiet, console=rank == 0)
        directory = RunDirectory(self.run)
        stop = _StopRequest()
        display = console.TrainingDisplay(console.wants_bar(self.quiet) and rank == 0)
        try:
            outcome = run(
                self.config,
                directory,
                display,
                on_owned=lambda: console.configure(
                    self.quiet, directory.logs / f"rank-{rank}.log", console=rank == 0
                ),
                stop_requested=stop,
                stop_after=self.stop_after,
            )
        finally:
            display.close()
        if outcome is Outcome.FINISHED:
            return 0
        log.warning("stopped with a checkpoint; resume with: reprise train %s", self.run)
        return Exit.INTERRUPTED if stop() else 0


@dataclass(frozen=True)
class LocalRanks:
    """The same task as several local ranks; the others end when one fails."""

    task: Callable[[], int]
    nproc: int

    def __call__(self) -> int:
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.nproc)))
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self.nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.2,
        )
        try:
            codes: dict[int, int] = elastic_launch(launch, _as_rank)(self.task)
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            if failure.exitcode < 0:
                log.error("rank %d was killed by signal %d", error.rank, -failure.exitcode)
            return abs(failure.exitcode)
        except SignalException:
            return Exit.INTERRUPTED
        return max(codes.values())


def _as_rank(task: Callable[[], int]) -> int:
    """Turn a status into an exit, so that the launcher sees a failed rank as failed."""
    code = task()
    if code not in (0, Exit.INTERRUPTED):
        sys.exit(code)
    return int(code)


class _StopRequest:
    """Whether a signal asked this process to stop."""

    def __init__(self) -> None:
        self._asked = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def __call__(self) -> bool:
        return self._asked


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run's checkpoint on its own or another shard set."""

    run: Path
    data: Path | None = None
    best: bool = False
    quiet: bool = False

    def __call__(self) -> tuple[Summary, Path]:
        """The summary, and the folder that holds it and the per-sample results."""
        from pipeline import evaluate as evaluation
        from pipeline.distributed import World
        from pipeline.run_directory import RunDirectory
        from pipeline.training.checkpoint import CheckpointError, CheckpointStore
        from pipeline.training.engine import DTYPES
        from pipeline.training.run import load_trained, open_evaluation, plan

        directory = RunDirectory(self.run)
        config = directory.read_config()
        if self.data is not None:
            data = config.data.model_copy(update={"path": self.data})
            config = config.model_copy(update={"data": data})
        world = World.detect()
        world.start()
        store = CheckpointStore(directory.checkpoints, world, config.checkpoints.keep_last)
        checkpoint = store.best() if self.best else store.newest()
        if checkpoint is None:
            raise CheckpointError(f"{self.run} has no checkpoint yet: reprise train {self.run}")
        planned = plan(config, world.world_size)
        # Other images are normalised as those that the network was trained on.
        trained_on = checkpoint.load("identity")
        planned = replace(
            planned,
            manifest=replace(
                planned.manifest,
                channel_mean=tuple(trained_on["channel_mean"]),
                channel_std=tuple(trained_on["channel_std"]),
            ),
        )
        model = load_trained(planned, checkpoint, world.device)
        loader = open_evaluation(config, planned.manifest, world)
        with console.progress("evaluating", self.quiet) as report:
            done = 0

            def count(samples: int) -> None:
                nonlocal done
                done += samples
                report(done, loader.samples)

            summary, samples = evaluation.evaluate(
                model,
                loader,
                world,
                planned.cost,
                planned.manifest.evaluation.name,
                DTYPES[config.train.precision],
                count,
            )
        loader.close()
        folder = directory.evaluation_of(planned.manifest)
        if world.is_main:
            evaluation.save(folder, summary, samples)
        world.stop()
        return summary, folder
