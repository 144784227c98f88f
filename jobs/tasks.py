"""Tasks: small picklable callables that do one piece of work, here or wherever they are sent."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import console, describe, stopping
from jobs.errors import Exit, guarded
from pipeline.loading import end_quickly, loading

if TYPE_CHECKING:
    from data_prep.manifest import Manifest
    from pipeline.config import Config
    from pipeline.distributed import World
    from pipeline.models import Network
    from pipeline.run_directory import RunDirectory
    from pipeline.tasks import Summary
    from pipeline.training.checkpoint import Checkpoint
    from pipeline.training.plan import Plan

log = logging.getLogger(__name__)
REPLAY_SECONDS = 10.0  # for each run that is not wholly at the store yet
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
            return guarded(lambda: self._train(stop))

    def _train(self, stop: stopping.StopRequest) -> int:
        with loading():
            from pipeline.distributed import World
            from pipeline.run_directory import RunDirectory
            from pipeline.training import engine
            from pipeline.training.run import run
            from pipeline.training.trainer import Outcome

            engine.load()

        world = World.detect()
        # Nothing has begun, and no other rank waits for this one to agree.
        if stop.asked and world.world_size == 1:
            return Exit.INTERRUPTED
        rank = world.rank
        console.configure(self.quiet, rank=rank)
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
            if rank == 0 and not display.steps:
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
            signals_to_handle=",".join(number.name for number in stopping.SIGNALS),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.2,
        )
        if stopping.heed():  # from here on the launcher answers to signals
            return Exit.INTERRUPTED
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


@dataclass(frozen=True)
class _Trained:
    """The network of a run's newest or best checkpoint, on this rank's device."""

    directory: RunDirectory
    config: Config
    manifest: Manifest
    world: World
    model: Network
    checkpoint: Checkpoint

    @classmethod
    def open(cls, run: Path, data: Path | None = None, best: bool = False) -> _Trained:
        """`data` is another shard set than the run's own; joins the process group."""
        from pipeline.distributed import World
        from pipeline.run_directory import RunDirectory
        from pipeline.training import checkpoint, restore
        from pipeline.training.plan import check_task, open_set

        directory = RunDirectory(run)
        config = directory.read_config()
        found = checkpoint.find(directory.checkpoints, best=best)
        # Other images are normalised as those that the network was trained on.
        trained_on = found.load("identity")
        manifest = replace(
            open_set(data or config.data.path),
            channel_mean=tuple(trained_on["channel_mean"]),
            channel_std=tuple(trained_on["channel_std"]),
        )
        check_task(config, manifest)
        world = World.detect()
        world.start()
        model = restore.trained_network(config, manifest, found, world.device)
        return cls(directory, config, manifest, world, model, found)

    def alone(self) -> World:
        """What is only done by one rank sees the whole of the data.

        Raises:
            ValueError: there are several ranks.
        """
        if self.world.world_size > 1:
            raise ValueError("this is done by one process: leave the launcher away")
        return self.world


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run's checkpoint on its own or another shard set.

    `steps` are asked of a cost-adjustable network one after the other; without, the largest number.
    """

    run: Path
    data: Path | None = None
    split: str | None = None
    best: bool = False
    quiet: bool = False
    steps: tuple[int, ...] = ()

    def __call__(self) -> list[tuple[Summary, Path]]:
        """Each summary, and the folder that holds it and the per-sample results."""
        from pipeline import evaluate as evaluation
        from pipeline import tasks
        from pipeline.models.cost import measure
        from pipeline.training.engine import DTYPES
        from pipeline.training.run import open_evaluation

        opened = _Trained.open(self.run, self.data, self.best)
        directory, config, world = opened.directory, opened.config, opened.world
        manifest, model = opened.manifest, opened.model
        for number in self.steps:
            model.steps_taken(number)  # refuse a wrong number before the work on the right ones
        loader = open_evaluation(config, manifest, world, self.split)
        results = []
        for steps in self.steps or (None,):
            at = "" if steps is None else f" at {steps} steps"
            with console.progress(f"evaluating{at}", self.quiet) as report:
                summary, samples = evaluation.evaluate(
                    model,
                    loader,
                    world,
                    measure(model, config.data.augment.size, steps),
                    self.split or manifest.evaluation.name,
                    opened.checkpoint.step,
                    DTYPES[config.train.precision],
                    _running_total(report, loader.samples),
                    task=tasks.of(config),
                    steps=steps,
                )
            fewer = None if steps == model.steps_taken(None) else steps
            folder = directory.evaluation_of(
                manifest, self.data, split=self.split, fewer_steps=fewer
            )
            if world.is_main:
                evaluation.save(folder, summary, samples)
            results.append((summary, folder))
        loader.close()
        world.stop()
        return results


@dataclass(frozen=True)
class Embed:
    """Write the route vectors of a shard set's images, as a ReSet network chooses them."""

    evaluate: Evaluate
    out: Path | None = None

    def __call__(self) -> Path:
        """The file, a NumPy archive: `keys`, `labels`, `routes` (images, components) float32, and
        `components`, their names.

        Raises:
            ValueError: the network has no controllers.
        """
        import numpy as np

        from data_prep.files import write_atomically
        from pipeline.models import create_model
        from pipeline.models.shapes import ShapesOnly
        from pipeline.run_directory import RunDirectory
        from pipeline.tasks.classification import Samples

        directory = RunDirectory(self.evaluate.run)
        config = directory.read_config()
        with ShapesOnly():
            pools = create_model(config.model, **config.model_options).pools
        if not pools:
            raise ValueError(
                f"{self.evaluate.run} is a run of model={config.model}, which has no controllers "
                "and so no routes to embed: give a run of a network with pools (reset*)"
            )
        ((_, folder),) = self.evaluate()
        samples = Samples.load(folder / "samples.npz")
        content = io.BytesIO()
        np.savez_compressed(
            content,
            keys=samples.keys,
            labels=samples.labels,
            routes=samples.routes,
            components=samples.components,
        )
        out = self.out or directory.path / f"routes-{folder.name}.npz"
        write_atomically(out, content.getvalue())
        return out


@dataclass(frozen=True)
class Consolidate:
    """Consolidate the newest weights of a run with relaxed sharing, as the end of training does."""

    run: Path
    quiet: bool = False

    def __call__(self) -> tuple[Summary, Summary, float, Path]:
        """Before and after, the largest angle between tied weights, and the directory made."""
        from pipeline.run_directory import RunDirectory
        from pipeline.training import consolidation, restore

        shared = consolidation.shared(RunDirectory(self.run).read_config())
        opened = _Trained.open(self.run)
        opened.alone()
        angle = consolidation.angle_of(opened.model)
        made = consolidation.network(shared, len(opened.manifest.classes), opened.model)
        identity = restore.identity(shared, opened.manifest)
        written = consolidation.write(
            opened.directory,
            shared,
            made,
            identity,
            progress=opened.checkpoint.load("rank-00000")["progress"],
            angle=angle,
        )
        (before, _), *_ = Evaluate(self.run, quiet=self.quiet)()
        (after, _), *_ = Evaluate(written.path, quiet=self.quiet)()
        return before, after, angle, written.path


@dataclass(frozen=True)
class Ablate:
    """Switch the blocks of a level off in every order, and draw the errors."""

    run: Path
    level: int
    images: int | None = None
    beside: tuple[Path, ...] = ()
    quiet: bool = False

    def __call__(self) -> Path:
        """The picture, beside which are its figures."""
        from pipeline.analysis import ablation
        from pipeline.run_directory import RunDirectory
        from pipeline.training.run import open_evaluation

        others = [ablation.Ablation.load(self._folder(RunDirectory(run))) for run in self.beside]
        opened = _Trained.open(self.run)
        check_classifies(opened.config)
        loader = open_evaluation(opened.config, opened.manifest, opened.alone())
        total = loader.samples if self.images is None else min(self.images, loader.samples)
        with console.progress("ablating", self.quiet) as report:
            found = ablation.ablate(
                opened.model,
                loader,
                run=self.run.resolve().name,
                level=self.level,
                size=opened.config.data.augment.size,
                images=total,
                on_batch=_running_total(report, total),
            )
        loader.close()
        folder = self._folder(opened.directory)
        found.save(folder)
        ablation.draw(folder / "ablation.png", [found, *others])
        return folder / "ablation.png"

    def _folder(self, directory: RunDirectory) -> Path:
        return directory.path / "ablation" / f"level-{self.level}"


@dataclass(frozen=True)
class Trajectories:
    """Draw where the representations of images go, level by level."""

    run: Path

    def __call__(self) -> Path:
        """The picture, beside which are its points."""
        from pipeline.analysis import trajectories
        from pipeline.training.run import open_evaluation

        opened = _Trained.open(self.run)
        check_classifies(opened.config)
        split = opened.manifest.train.name
        loader = open_evaluation(opened.config, opened.manifest, opened.alone(), split)
        size = opened.config.data.augment.size
        points, labels = trajectories.collect(opened.model, loader, size)
        loader.close()
        projected = {
            (level, drift): trajectories.project(found, drift=drift)
            for level, found in points.items()
            for drift in (True, False)
        }
        folder = opened.directory.path / "trajectories"
        folder.mkdir(exist_ok=True)
        named = {
            f"level-{level}{'' if drift else '-without-drift'}": plane
            for (level, drift), plane in projected.items()
        }
        trajectories.save(folder / "trajectories.npz", named | {"labels": labels})
        classes = opened.manifest.classes
        trajectories.draw(folder / "trajectories.png", projected, labels, classes)
        return folder / "trajectories.png"


def check_classifies(config: Config) -> None:
    """Raises ValueError for a run of another task."""
    from data_prep.manifest import CLASSIFICATION

    if config.task != CLASSIFICATION:
        raise ValueError(
            f"model={config.model} is for {config.task}: give a run of a network that classifies"
        )


def _running_total(report: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """A callback for the samples of one batch, from one for all that are done."""
    done = 0

    def count(samples: int) -> None:
        nonlocal done
        done += samples
        report(done, total)

    return count


def send_journals(runs: Path) -> None:
    """Send what the runs' journals still hold; a store that cannot be reached is asked once."""
    from pipeline import tracking

    journals = sorted(runs.glob("*/journal.jsonl"))
    for number, journal in enumerate(journals, start=1):
        if not tracking.replay(journal.parent, timeout=REPLAY_SECONDS):
            log.warning("%d more runs are not asked for what they hold", len(journals) - number)
            return


def serve(command: list[str], port: int) -> int:
    """Run a server on a local port until it ends or Ctrl-C; no process of it is left.

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
    server = psutil.Popen(command)
    try:
        return int(server.wait())
    finally:
        # Ctrl-C may have reached this process alone, and the server has processes of its own.
        processes = [*server.children(recursive=True), server] if server.is_running() else []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, stubborn = psutil.wait_procs(processes, timeout=5)
        for process in stubborn:
            process.kill()
