"""From a configuration and a run directory to a trained network: construction, in order."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from data_prep.manifest import Manifest
from pipeline import evaluate as evaluation
from pipeline import exported, tasks
from pipeline.config import Config, ConfigError
from pipeline.data import Loader, Noise, eval_loader, train_loader
from pipeline.distributed import World
from pipeline.models import Network
from pipeline.run_directory import RunDirectory
from pipeline.tracking import Tracker
from pipeline.tracking.tracker import Status
from pipeline.training import checkpoint, compiling, consolidation, initial, schedules
from pipeline.training.average import WeightAverage
from pipeline.training.checkpoint import Checkpoint, CheckpointStore
from pipeline.training.engine import DTYPES, Engine, has_kernels
from pipeline.training.optim import scaled
from pipeline.training.plan import Plan, build_model, plan
from pipeline.training.randomness import seed_everything
from pipeline.training.restore import (
    check_config,
    check_identity,
    evaluated_weights,
    identity,
)
from pipeline.training.trainer import Outcome, Trainer

log = logging.getLogger(__name__)


class Display(Protocol):
    """What a person sees of a run; rank 0's shows, the others are silent."""

    def stepped(self, step: int, total: int, metrics: Mapping[str, float]) -> None: ...

    def evaluated(self, summary: evaluation.Summary) -> None: ...


def run(
    config: Config,
    directory: RunDirectory,
    display: Display,
    *,
    on_owned: Callable[[Plan], None],
    stop_requested: Callable[[], bool],
    stop_after: int | None = None,
) -> Outcome:
    """Train, or go on training, in this run directory; every rank calls this.

    Args:
        on_owned: called with what will be done once the directory belongs to this run.
        stop_requested, stop_after: see `Trainer`.

    Raises:
        ValueError: what the user can mend.
        NonFiniteLoss: on all ranks.
    """
    world = World.detect()
    world.start()
    try:
        planned = plan(config, world.world_size)
        compiling.check(config, world)
        if not directory.exists:
            # Refused before a directory belongs to a run that cannot start.
            initial.check(config, len(planned.manifest.classes))
        with _owned(directory, config, world):
            on_owned(planned)
            outcome = _run_owned(planned, directory, world, display, stop_requested, stop_after)
        world.broadcast(None)  # leave together: some launchers end whoever stays behind
        return outcome
    finally:
        world.stop()


def _run_owned(
    planned: Plan,
    directory: RunDirectory,
    world: World,
    display: Display,
    stop_requested: Callable[[], bool],
    stop_after: int | None,
) -> Outcome:
    config = planned.config
    store = CheckpointStore(
        directory.checkpoints, world, config.checkpoints.keep_last, directory.newest_saved
    )
    newest = store.newest()
    if newest:
        # Before the tracker hears of a start: a refusal is no end of the run.
        check_identity(newest, identity(config, planned.manifest))
        check_config(newest, config)
    tracker = _tracker(config, directory, world)
    status: Status = "FAILED"
    try:
        trainer = _build(planned, directory, world, tracker, display, stop_requested, store, newest)
        with closing(trainer.loader):
            outcome = trainer.train(stop_after)
        if outcome is Outcome.FINISHED and not _is_consolidated(planned, trainer, directory):
            _consolidate(planned, trainer, directory, tracker)
        if world.is_main and outcome is Outcome.FINISHED:
            _hand_over(planned, trainer.store, directory, tracker)
        status = "FINISHED" if outcome is Outcome.FINISHED else "KILLED"
        return outcome
    finally:
        tracker.finish(status)


def _build(
    planned: Plan,
    directory: RunDirectory,
    world: World,
    tracker: Tracker | Untracked,
    display: Display,
    stop_requested: Callable[[], bool],
    store: CheckpointStore,
    newest: Checkpoint | None,
) -> Trainer:
    config = planned.config
    if world.is_main and world.device.type == "cpu" and not has_kernels(config.train.precision):
        log.warning(
            "this CPU cannot compute in %s, and imitates it many times more slowly: "
            "train.precision=fp32 is faster here",
            config.train.precision,
        )
    model = build_model(config, len(planned.manifest.classes))
    if newest is None and config.init_from:
        initial.start_from(config.init_from, model)
    model = model.to(world.device)
    average = WeightAverage(model, config.train.ema_decay) if config.train.ema_decay else None
    seed_everything(config.seed, world)

    def build_engine(own: Config, steps: int) -> Engine:
        own = scaled(own)
        factor = schedules.factor(own.schedule, planned.steps_per_epoch, steps)
        return Engine(model, own, world, factor)

    trainer = Trainer(
        config=config,
        world=world,
        model=model,
        build_engine=build_engine,
        average=average,
        loader=train_loader(
            planned.manifest,
            reader=config.data.reader,
            augment=config.data.augment,
            global_batch=config.train.batch_size,
            accumulation=config.train.accumulation,
            world=world,
            seed=config.seed,
            workers=config.data.workers,
            repeats=config.data.repeats,
            noise=Noise.of(config),
        ),
        store=store,
        evaluate=_Evaluation(planned, directory, world, model, average, display, stop_requested),
        sink=tracker,
        shared={"tracker": tracker},
        identity=identity(config, planned.manifest),
        run_dir=directory.path,
        stop_requested=stop_requested,
        on_step=display.stepped,
    )
    if newest:
        trainer.restore(newest)
        log.info("resumed from %s", newest.path)
    elif world.is_main:
        log.info("starting a new run in %s", directory.path)
    return trainer


class _Evaluation:
    """The evaluation after an epoch: of the averaged weights where there are any.

    A cost-adjustable network is evaluated at each of its numbers of steps; the metrics that have no
    number of steps in their name are those of the largest. Raises EvaluationStopped.
    """

    def __init__(
        self,
        planned: Plan,
        directory: RunDirectory,
        world: World,
        model: Network,
        average: WeightAverage | None,
        display: Display,
        stop_requested: Callable[[], bool],
    ) -> None:
        self.stop_requested: Callable[[], bool] | None = stop_requested
        self.planned = planned
        self.directory = directory
        self.world = world
        self.model = model
        self.average = average
        self.display = display
        self.loader = open_evaluation(planned.config, planned.manifest, world)

    def of(self, model: Network, directory: RunDirectory) -> _Evaluation:
        """The same evaluation of another network, kept in another directory, to its end."""
        other = copy.copy(self)
        other.model, other.average, other.directory = model, None, directory
        other.stop_requested = None
        return other

    def __call__(self, step: int) -> dict[str, float]:
        manifest, config = self.planned.manifest, self.planned.config
        model = self.average.network(self.model) if self.average else self.model
        metrics: dict[str, float] = {}
        for steps, cost in self.planned.costs.items():
            # Evaluation skips samples, so that its shapes are new ones in every batch.
            with torch.compiler.set_stance("force_eager"):
                summary, samples = evaluation.evaluate(
                    model,
                    self.loader,
                    self.world,
                    cost,
                    manifest.evaluation.name,
                    step,
                    DTYPES[config.train.precision],
                    task=tasks.of(config),
                    steps=steps,
                    stop_requested=self.stop_requested,
                )
            if self.world.is_main:
                fewer = None if steps == model.steps_taken(None) else steps
                folder = self.directory.evaluation_of(manifest, fewer_steps=fewer)
                evaluation.save(folder, summary, samples)
                self.display.evaluated(summary)
            metrics |= summary.metrics()  # the largest number of steps comes last
        return metrics


def open_evaluation(
    config: Config, manifest: Manifest, world: World, split: str | None = None
) -> Loader:
    """A split of a shard set, its evaluation split by default, read as the configuration says."""
    return eval_loader(
        manifest,
        reader=config.data.reader,
        augment=config.data.augment,
        batch_size=config.data.eval_batch_size,
        world=world,
        workers=config.data.workers,
        split=split,
        noise=Noise.of(config),
    )


def _is_consolidated(planned: Plan, trainer: Trainer, directory: RunDirectory) -> bool:
    """Whether nothing is tied, or a call before this one has done it; rank 0's answer on all ranks.

    To do it again would delete the evaluations that were made since.
    """
    done = planned.config.pull is None
    if trainer.world.is_main and not done:
        folder = directory.consolidated.evaluation_of(planned.manifest)
        made = (folder / evaluation.SUMMARY).is_file()
        done = made and evaluation.load(folder)[0].step == trainer.progress.step
    return bool(trainer.world.broadcast(done))


def _consolidate(
    planned: Plan, trainer: Trainer, directory: RunDirectory, tracker: Tracker | Untracked
) -> None:
    """Evaluate and write the consolidated network of a run that has come to its end; collective."""
    world, step, manifest = trainer.world, trainer.progress.step, planned.manifest
    config = consolidation.shared(planned.config)
    evaluate = trainer.evaluate
    assert isinstance(evaluate, _Evaluation)
    with trainer.statistics.averaged(world):
        model = trainer.average.network(trainer.model) if trainer.average else trainer.model
        made = consolidation.network(config, len(manifest.classes), model)
    if world.is_main:
        angle = consolidation.angle_of(model)
        consolidation.write(
            directory,
            config,
            made,
            manifest,
            progress=trainer.progress.state_dict(),
            angle=angle,
        )
    evaluate.of(made, directory.consolidated)(step)
    if world.is_main:
        before, _ = evaluation.load(directory.evaluation_of(manifest))
        after, _ = evaluation.load(directory.consolidated.evaluation_of(manifest))
        log.info(
            "consolidated %s, tied weights at most %.3f degrees apart: %s before, %s after",
            directory.consolidated.path,
            angle,
            before.headline,
            after.headline,
        )
        tracker.metrics({f"consolidated/{k}": v for k, v in after.results.items()}, step)


def _hand_over(
    planned: Plan, store: CheckpointStore, directory: RunDirectory, tracker: Tracker | Untracked
) -> None:
    """Give the tracker what a reader of the run will want: report and best weights."""
    from pipeline.analysis import report

    report.write(directory)
    tracker.artifact(directory.report)
    best = checkpoint.find(store.folder, best=True)
    weights = evaluated_weights(best)
    exported.save(directory.weights, weights, planned.config, planned.manifest, best.step)
    tracker.artifact(directory.weights)


class Untracked:
    """Stands for the tracker on the ranks that do not write."""

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def artifact(self, path: Path, folder: str | None = None) -> None: ...

    def finish(self, status: Status) -> bool:
        return True

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def _tracker(config: Config, directory: RunDirectory, world: World) -> Tracker | Untracked:
    if not world.is_main:
        return Untracked()
    tracker = Tracker(directory.path, run_name=directory.path.name, experiment=config.experiment)
    tracker.start()
    tracker.params(config.flat())
    tracker.artifact(directory.config_file)
    return tracker


@contextmanager
def _owned(directory: RunDirectory, config: Config, world: World) -> Iterator[None]:
    """Rank 0 owns the run directory for all; a refusal reaches every rank."""
    refusal: str | None = None
    if world.is_main:
        try:
            directory.claim(config)
        except ValueError as error:
            refusal = str(error)
    refusal = world.broadcast(refusal)
    if refusal:
        raise ConfigError(refusal)
    try:
        yield
    finally:
        if world.is_main:
            directory.release()
