"""From a configuration and a run directory to a trained network: construction, in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_prep.manifest import Manifest
from pipeline import evaluate as evaluation
from pipeline.config import Config, ConfigError
from pipeline.data import BatchPlan, Loader, eval_loader, train_loader
from pipeline.distributed import World
from pipeline.models import Network, create_model
from pipeline.models.cost import Cost, measure
from pipeline.run_directory import RunDirectory
from pipeline.tracking import Tracker
from pipeline.tracking.tracker import Status
from pipeline.training import optim, schedules
from pipeline.training.average import WeightAverage
from pipeline.training.checkpoint import Checkpoint, CheckpointStore
from pipeline.training.engine import DTYPES, Engine
from pipeline.training.randomness import seed_everything
from pipeline.training.trainer import Outcome, Trainer, check_identity, load_model

log = logging.getLogger(__name__)


class Display(Protocol):
    """What a person sees of a run; rank 0's shows, the others are silent."""

    def stepped(self, step: int, total: int, metrics: Mapping[str, float]) -> None: ...

    def evaluated(self, summary: evaluation.Summary) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What a configuration will do, known before any process or file is started."""

    config: Config
    manifest: Manifest
    cost: Cost
    groups: list[optim.Group]
    steps_per_epoch: int  # optimizer steps

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change over the life of a run directory."""
        return {
            "model": self.config.model,
            "classes": len(self.manifest.classes),
            "class_map_sha256": self.manifest.class_map_sha256,
            "channel_mean": list(self.manifest.channel_mean),
            "channel_std": list(self.manifest.channel_std),
        }


def plan(config: Config, world_size: int) -> Plan:
    """Check everything that can be wrong with a configuration here and now.

    Raises:
        ValueError: the model or its options, the shard set, the parameter groups, or a batch that
            the ranks cannot divide.
    """
    manifest = Manifest.load(config.data.path)
    model = build_model(config, len(manifest.classes))
    micro = _batch_plan(config, manifest, World(world_size=world_size)).steps_per_epoch
    return Plan(
        config=config,
        manifest=manifest,
        cost=measure(model, config.data.augment.size),
        groups=optim.groups(model, config.optimizer),
        steps_per_epoch=micro // config.train.accumulation,
    )


def build_model(config: Config, classes: int) -> Network:
    """The network, its initial weights decided by the seed alone.

    Raises:
        ConfigError: an unknown model or option, or a combination that makes no sense.
    """
    if "num_classes" in config.model_options:
        raise ConfigError("model_options.num_classes comes from the shard set: remove it")
    torch.manual_seed(config.seed)
    try:
        return create_model(config.model, num_classes=classes, **config.model_options)
    except ValueError as error:
        raise ConfigError(f"model={config.model}: {error}") from None


def run(
    config: Config,
    directory: RunDirectory,
    display: Display,
    *,
    on_owned: Callable[[], None],
    stop_requested: Callable[[], bool],
    stop_after: int | None = None,
) -> Outcome:
    """Train, or go on training, in this run directory; every rank calls this.

    Args:
        on_owned: called once the directory belongs to this run, before anything is written there.
        stop_requested, stop_after: see `Trainer`.

    Raises:
        ValueError: what the user can mend.
        NonFiniteLoss: on all ranks.
    """
    world = World.detect()
    world.start()
    try:
        planned = plan(config, world.world_size)
        with _owned(directory, config, world):
            on_owned()
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
    tracker = _tracker(planned.config, directory, world)
    status: Status = "FAILED"
    try:
        trainer = _build(planned, directory, world, tracker, display, stop_requested)
        outcome = trainer.train(stop_after)
        if world.is_main and outcome is Outcome.FINISHED:
            _hand_over(trainer.store, directory, tracker)
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
) -> Trainer:
    config = planned.config
    model = build_model(config, len(planned.manifest.classes))
    model = model.to(world.device)
    average = WeightAverage(model, config.train.ema_decay) if config.train.ema_decay else None
    seed_everything(config.seed, world)
    engine = Engine(
        model,
        config,
        world,
        schedules.factor(config.schedule, planned.steps_per_epoch, config.train.epochs),
    )
    trainer = Trainer(
        config=config,
        world=world,
        model=model,
        engine=engine,
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
        ),
        store=CheckpointStore(directory.checkpoints, world, config.checkpoints.keep_last),
        evaluate=_Evaluation(planned, directory, world, model, average, display),
        sink=tracker,
        shared={"tracker": tracker},
        identity=planned.identity,
        run_dir=directory.path,
        stop_requested=stop_requested,
        on_step=display.stepped,
    )
    if checkpoint := trainer.store.newest():
        trainer.restore(checkpoint)
        log.info("resumed from %s", checkpoint.path)
    elif world.is_main:
        log.info("starting a new run in %s", directory.path)
    return trainer


class _Evaluation:
    """The evaluation after an epoch: of the averaged weights where there are any."""

    def __init__(
        self,
        planned: Plan,
        directory: RunDirectory,
        world: World,
        model: Network,
        average: WeightAverage | None,
        display: Display,
    ) -> None:
        self.planned = planned
        self.directory = directory
        self.world = world
        self.model = model
        self.average = average
        self.display = display
        self.loader = open_evaluation(planned.config, planned.manifest, world)

    def __call__(self, step: int) -> dict[str, float]:
        manifest, config = self.planned.manifest, self.planned.config
        summary, samples = evaluation.evaluate(
            self.average.network(self.model) if self.average else self.model,
            self.loader,
            self.world,
            self.planned.cost,
            manifest.evaluation.name,
            step,
            DTYPES[config.train.precision],
        )
        if self.world.is_main:
            evaluation.save(self.directory.evaluation_of(manifest), summary, samples)
            self.display.evaluated(summary)
        return summary.metrics()


def open_evaluation(config: Config, manifest: Manifest, world: World) -> Loader:
    """The evaluation split of a shard set, read as the configuration says."""
    return eval_loader(
        manifest,
        reader=config.data.reader,
        augment=config.data.augment,
        batch_size=config.data.eval_batch_size,
        world=world,
        workers=config.data.workers,
    )


def load_trained(planned: Plan, checkpoint: Checkpoint, device: torch.device) -> Network:
    """The network of a checkpoint, for evaluation: the averaged weights where there are any.

    Raises:
        CheckpointError: it is of another model or class map.
    """
    check_identity(checkpoint, planned.identity)
    model = build_model(planned.config, len(planned.manifest.classes))
    load_model(model, checkpoint.path, evaluated_weights(checkpoint))
    return model.to(device)


def evaluated_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors that evaluation uses, by name."""
    if "average" in checkpoint.states:
        average: dict[str, Tensor] = checkpoint.load("average")["network"]
        return average
    return checkpoint.load("model")


def _hand_over(
    store: CheckpointStore, directory: RunDirectory, tracker: Tracker | Untracked
) -> None:
    """Give the tracker what a reader of the run will want: report and best weights."""
    from pipeline.analysis import report

    report.write(directory)
    tracker.artifact(directory.report)
    best = store.best()
    assert best is not None, "the last epoch is always evaluated and saved"
    weights = {name: value.contiguous() for name, value in evaluated_weights(best).items()}
    save_file(weights, directory.weights, metadata={"step": str(best.step)})
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
    tracker = Tracker(directory.path, run_name=config.name, experiment=config.experiment)
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


def _batch_plan(config: Config, manifest: Manifest, world: World) -> BatchPlan:
    return BatchPlan(
        samples=manifest.train.samples,
        global_batch=config.train.batch_size,
        accumulation=config.train.accumulation,
        rank=world.rank,
        world_size=world.world_size,
        seed=config.seed,
        shard_sizes=tuple(shard.samples for shard in manifest.train.shards),
    )
