"""What a configuration will do, known and checked before any process or file is started."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data_prep.manifest import DENOISING, Manifest
from pipeline.config import Config, ConfigError, Phase
from pipeline.data import BatchPlan
from pipeline.distributed import World
from pipeline.models import Network, create_model, task_of
from pipeline.models.cost import Cost, measure_choices
from pipeline.models.shapes import ShapesOnly
from pipeline.training import optim, phases, relaxation, steps

STAGED = "REPRISE_STAGED"  # folders that hold copies of shards, looked into first


@dataclass(frozen=True)
class PlannedPhase:
    """One phase of a run: its own configuration, its parameter groups and its length."""

    phase: Phase
    config: Config
    groups: list[optim.Group]
    steps: int  # optimizer steps, at most


@dataclass(frozen=True)
class Plan:
    """The data, the cost for each number of steps, the phases and the length of a run.

    A run without phases is one. `costs` has one entry, under None, where the network has no choice
    of steps.
    """

    config: Config  # its learning rate is for its own batch
    manifest: Manifest
    costs: dict[int | None, Cost]
    phases: list[PlannedPhase]
    steps_per_epoch: int  # optimizer steps

    @property
    def groups(self) -> list[optim.Group]:
        """The parameter groups of the first phase."""
        return self.phases[0].groups

    @property
    def cost(self) -> Cost:
        """At the largest number of steps."""
        return list(self.costs.values())[-1]


def plan(config: Config, world_size: int) -> Plan:
    """Check everything that can be wrong with a configuration here and now.

    Raises:
        ValueError: the model or its options, the shard set, the task of either, the parameter
            groups, the numbers of steps, the phases, the pull, or a batch that the ranks cannot
            divide.
    """
    config = optim.scaled(config)
    manifest = open_set(config.data.path)
    check_task(config, manifest)
    _ = manifest.evaluation  # refuses a set that has none
    with ShapesOnly():
        model = build_model(config, len(manifest.classes))
    steps.check(model, config.steps)
    phases.check(model, config)
    relaxation.check(model, config.pull)
    micro = _batch_plan(config, manifest, World(world_size=world_size)).steps_per_epoch
    return Plan(
        config=config,
        manifest=manifest,
        costs=measure_choices(model, config.data.augment.size),
        phases=[
            _planned(model, config, phase, micro // config.train.accumulation)
            for phase in config.all_phases
        ],
        steps_per_epoch=micro // config.train.accumulation,
    )


def _planned(model: Network, config: Config, phase: Phase, steps_per_epoch: int) -> PlannedPhase:
    own = optim.scaled(config.during(phase))
    phases.prepare(model, config, phase)
    steps = phases.most_steps(phase, steps_per_epoch)
    return PlannedPhase(phase, own, optim.groups(model, own.optimizer), steps)


def open_set(path: Path) -> Manifest:
    """The manifest of the shard set at `path`, which knows where copies of its shards are.

    Where they are is no part of a configuration: a run may go on on another machine.
    """
    staged = tuple(Path(part) for part in os.environ.get(STAGED, "").split(os.pathsep) if part)
    return replace(Manifest.load(path), copies=staged)


def check_task(config: Config, manifest: Manifest) -> None:
    """Refuse a network, a shard set and a noise level that are not all for one task.

    Raises:
        ConfigError: they are not, or the network is unknown.
    """
    try:
        task = task_of(config.model)
    except ValueError as error:
        raise ConfigError(f"model={config.model}: {error}") from None
    if manifest.task != task:
        kind = "bsd" if task == DENOISING else "folder"
        raise ConfigError(
            f"model={config.model} is for {task} and {manifest.root} is a set for {manifest.task}: "
            f"give data.path of a set that `reprise prep {kind}` made, or a network for "
            f"{manifest.task}"
        )
    if task == DENOISING and config.data.sigma is None:
        raise ConfigError(
            f"model={config.model} removes noise and none is given: give its standard deviation, "
            "of 255, such as data.sigma=25"
        )
    if task != DENOISING and config.data.sigma is not None:
        raise ConfigError(
            f"data.sigma={config.data.sigma:g} with model={config.model}, which is for {task}: "
            "leave data.sigma out, or give a network for denoising, such as model=rc_r3_4"
        )


def build_model(config: Config, classes: int) -> Network:
    """The network, its initial weights decided by the seed alone.

    Raises:
        ConfigError: an unknown model or option, a combination that makes no sense, or a parameter
            that cannot be trained here.
    """
    if "num_classes" in config.model_options:
        raise ConfigError("model_options.num_classes comes from the shard set: remove it")
    counted = {} if config.task == DENOISING else {"num_classes": classes}
    torch.manual_seed(config.seed)
    try:
        model = create_model(config.model, **counted, **config.model_options)
    except ValueError as error:
        raise ConfigError(f"model={config.model}: {error}") from None
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise ConfigError(
                f"model={config.model}: the parameter {name} has no dimensions, and DeepSpeed "
                "cannot send it from rank to rank: give it the shape (1,)"
            )
    return model


def _batch_plan(config: Config, manifest: Manifest, world: World) -> BatchPlan:
    return BatchPlan(
        samples=manifest.train.samples,
        global_batch=config.train.batch_size,
        accumulation=config.train.accumulation,
        rank=world.rank,
        world_size=world.world_size,
        seed=config.seed,
        shard_sizes=tuple(shard.samples for shard in manifest.train.shards),
        repeats=config.data.repeats,
    )
