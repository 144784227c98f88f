"""The configuration of a run: complete, validated when built, and the same thing as a recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

Role = Literal["shared", "tied", "gate", "norm", "rest"]
TaskName = Literal["classification", "denoising"]


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key, the value and the cure."""


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, field: ValidationInfo) -> Any:
        annotation = cls.model_fields[field.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("true and false are no value of this key")
        return value

    def _refuse_idle(self, names: str, because: str) -> None:
        """Raises ValueError where a key that has no effect here is not at its default."""
        for name in names.split():
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(
                    f"{name}={value} with {because} has no effect: leave it out, or at {default}"
                )


class Augmentation(_Section):
    """What is done to images; one description that both readers follow."""

    crop: Literal["none", "pad", "random_resized"] = "none"
    size: int = Field(default=32, gt=0, description="side of the input, pixels")
    padding: int = Field(
        default=4, ge=0, description="zero padding on each side for crop=pad, pixels"
    )
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    rotate: bool = Field(default=False, description="by 0, 90, 180 or 270 degrees")
    photometric: bool = False
    eval_resize: int | None = Field(
        default=None, gt=0, description="pixels, before the centre crop"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Augmentation:
        if self.eval_resize is not None and self.eval_resize < self.size:
            raise ValueError(
                f"eval_resize={self.eval_resize} is smaller than the centre crop size={self.size}: "
                f"give eval_resize >= {self.size}"
            )
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(f"{name}=({low}, {high}) must be 0 < low <= high")
        if self.scale[1] > 1:
            raise ValueError(f"scale={self.scale}: shares of an image's area are at most 1")
        if self.crop != "pad":
            self._refuse_idle("padding", f"crop={self.crop}")
        if self.crop != "random_resized":
            self._refuse_idle("scale ratio", f"crop={self.crop}")
        return self


class Data(_Section):
    path: Path = Field(description="folder of a prepared shard set")
    reader: Literal["dali", "torch"] = "dali"
    workers: int = Field(default=2, ge=0, description="decoding threads or processes per rank")
    eval_batch_size: int = Field(
        default=256, gt=0, description="per rank; denoising takes whole images one by one"
    )
    repeats: int = Field(
        default=1, gt=0, description="visits of each training image per epoch, with own crops"
    )
    sigma: float | None = Field(
        default=None,
        gt=0,
        description="standard deviation of the noise to remove, of 255; makes the task denoising",
    )
    augment: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        augment = self.augment
        if self.sigma is None or (augment.eval_resize is None and not augment.photometric):
            return self
        odd = "photometric=true" if augment.photometric else f"eval_resize={augment.eval_resize}"
        raise ValueError(
            f"augment.{odd} with sigma={self.sigma:g}: denoising takes grey images as they are; "
            "leave it out"
        )


class InitFrom(_Section):
    """Weights that a new run starts from: of the same network, or of its static form."""

    path: Path = Field(description="a finished run, its weights.safetensors, or torchvision's .pth")
    recursive: Literal["mean", "first"] = Field(
        default="mean", description="of the cells that a recursive cell replaces"
    )
    classifier: Literal["copied", "fresh"] = Field(
        default="copied", description="fresh: as from scratch, for other classes"
    )


class ParameterGroup(_Section):
    """How the parameters of one role differ from the rest."""

    lr_factor: float = Field(default=1.0, gt=0)
    weight_decay: float | None = Field(default=None, ge=0, description="None: as the optimizer's")


_Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(_Section):
    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    lr_batch: int | None = Field(
        default=None,
        gt=0,
        description="global batch that lr is for: it grows and shrinks with train.batch_size, a "
        "larger batch warms up; None: lr is for any",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="SGD only")
    nesterov: bool = False
    betas: tuple[_Beta, _Beta] = Field(default=(0.9, 0.999), description="Adam and AdamW only")
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(
        default=None, gt=0, description="global L2 norm of the gradient"
    )
    groups: dict[Role, ParameterGroup] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Optimizer:
        self._refuse_idle("betas" if self.name == "sgd" else "momentum", f"name={self.name}")
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError(
                f"nesterov=true needs name=sgd and momentum > 0, and here are name={self.name} and "
                f"momentum={self.momentum:g}: give nesterov=false"
            )
        return self


class Schedule(_Section):
    """Factor on every group's learning rate as a function of the progress, in epochs."""

    name: Literal["constant", "step", "staircase", "cosine", "one_cycle"] = "constant"
    warmup_epochs: float = Field(default=0.0, ge=0, description="linear, up to the rate")
    milestones: tuple[float, ...] = Field(
        default=(), description="epochs, for step", examples=[[1, 2]]
    )
    gamma: float = Field(default=0.1, gt=0, description="factor at each milestone, for step")
    every_steps: int | None = Field(
        default=None, gt=0, description="optimizer steps from one factor to the next, for staircase"
    )
    peak: float = Field(default=0.3, gt=0, lt=1, description="fraction of training, for one_cycle")

    @model_validator(mode="after")
    def _consistent(self) -> Schedule:
        if self.name == "step" and not self.milestones:
            raise ValueError(
                "name=step needs milestones: give such as [1, 2], or schedule.name=constant for a "
                "rate that stays"
            )
        if self.name != "step" and self.milestones:
            raise ValueError(
                f"milestones={list(self.milestones)} with name={self.name}: only name=step takes "
                "them: give schedule.milestones=[], or name=step"
            )
        if self.name == "staircase" and self.every_steps is None:
            raise ValueError("name=staircase needs every_steps: give such as 1000")
        if self.name != "staircase" and self.every_steps is not None:
            raise ValueError(
                f"every_steps={self.every_steps} with name={self.name}: only name=staircase takes "
                "them: give schedule.every_steps=null, or name=staircase"
            )
        if self.name not in ("step", "staircase"):
            self._refuse_idle("gamma", f"name={self.name}")
        if self.name != "one_cycle":
            self._refuse_idle("peak", f"name={self.name}")
        if list(self.milestones) != sorted({m for m in self.milestones if m > 0}):
            raise ValueError(f"milestones={list(self.milestones)} must increase from above 0")
        if self.name == "one_cycle" and self.warmup_epochs:
            raise ValueError("one_cycle warms up by itself: set warmup_epochs=0")
        return self


class Weight(_Section):
    """Weight of a loss term, from the first to the last step of the run or of a phase.

    A plain number is a weight that stays.
    """

    first: float = Field(default=0.0, ge=0)
    last: float = Field(default=0.0, ge=0)
    shape: Literal["linear", "exponential"] = "linear"

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return {"first": value, "last": value} if plain else value

    @model_validator(mode="after")
    def _consistent(self) -> Weight:
        if self.shape == "exponential" and not (self.first and self.last):
            raise ValueError(
                f"shape=exponential from {self.first:g} to {self.last:g}: give first and last "
                "greater than 0, or shape=linear"
            )
        return self

    def at(self, progress: float) -> float:
        """The weight once this fraction, 0..1, of the steps is made."""
        if self.shape == "exponential":
            return float(self.first * (self.last / self.first) ** progress)
        return self.first + (self.last - self.first) * progress


class Loss(_Section):
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    execution_rate: float = Field(default=1.0, ge=0, description="weight of DRNN Eq. 12")
    different_routes: Weight = Field(default=Weight(), description="lambda_1 of ReSet Eq. 13")
    decided_routes: Weight = Field(default=Weight(), description="lambda_2 of ReSet Eq. 13")
    skip_reward: Weight = Field(default=Weight(), description="R of ReSet Eq. 9")


class Scorer(_Section):
    """From the logits of ReSet's controllers to the weights of the units."""

    name: Literal["softmax", "gumbel", "straight_through", "top_k"] = "softmax"
    temperature: float = Field(default=1.0, description="tau, for gumbel and straight_through")
    k: int = Field(default=1, description="units that keep their weight, for top_k")

    @model_validator(mode="after")
    def _consistent(self) -> Scorer:
        if not self.temperature > 0 or math.isinf(self.temperature):
            raise ValueError(
                f"temperature={self.temperature:g}: logits are divided by it, so it must be "
                "greater than 0: give such as 0.5, or name=straight_through for one unit alone"
            )
        if self.k < 1:
            raise ValueError(f"k={self.k} keeps no unit: give 1 or more")
        if self.name not in ("gumbel", "straight_through"):
            self._refuse_idle("temperature", f"name={self.name}")
        if self.name != "top_k":
            self._refuse_idle("k", f"name={self.name}")
        return self


class Steps(_Section):
    """What a cost-adjustable network trains with (RC Sec. 4.2)."""

    probabilities: dict[int, float] = Field(
        default={},
        description="of each number of steps that the network can take",
        examples=[{2: 0.5, 3: 0.5}],
    )
    draw: Literal["one", "all"] = Field(
        default="one",
        description="per micro-batch: one number, by its probability (RC Alg. 2), or all of them, "
        "losses weighted by the probabilities",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Steps:
        values = self.probabilities.values()
        if any(not value > 0 for value in values):
            raise ValueError(
                f"probabilities={self.probabilities} must be greater than 0: leave out numbers of "
                "steps that are not to be trained"
            )
        if values and not math.isclose(math.fsum(values), 1, abs_tol=1e-6):
            raise ValueError(
                f"probabilities={self.probabilities} sum to {math.fsum(values):g}: they must sum "
                "to 1"
            )
        return self


class Convergence(_Section):
    """The policy has converged: its mean over a window of steps no longer moves.

    Compared are the mean probabilities of the units in one window and in the window before, for
    each iteration of each pool: half the sum of their absolute differences, the largest of all.
    """

    change: float = Field(default=0.01, gt=0, lt=1, description="that counts as no movement")
    window: int = Field(default=100, gt=0, description="optimizer steps")


_PARTS = "all, controller, body, units, norms, statistics, stem, stage1, stage2, ..., classifier"


class Phase(_Section):
    """A part of training: what trains, how, and for how long. None: as the run.

    `trains` names parts of the network; the others receive no update and no weight decay. The
    statistics of a norm move where its parameters train; `statistics` lets all of them move.
    """

    name: str
    trains: tuple[str, ...] = Field(default=("all",), description=_PARTS)
    steps: int | None = Field(default=None, gt=0, description="optimizer steps")
    epochs: float | None = Field(default=None, gt=0)
    until: Convergence | None = Field(
        default=None, description="ends the phase earlier; steps or epochs are then the most"
    )
    optimizer: Optimizer | None = None
    schedule: Schedule | None = Field(default=None, description="epochs from the phase's start")
    loss: Loss | None = None
    scorer: Scorer | None = None
    draws: int = Field(default=1, gt=0, description="passes of each batch, losses averaged")

    @model_validator(mode="after")
    def _consistent(self) -> Phase:
        if (self.steps is None) == (self.epochs is None):
            both = f"steps={self.steps} and epochs={self.epochs}"
            raise ValueError(
                f"phase {self.name!r} has {both if self.steps else 'neither steps nor epochs'}: "
                "give its length in one of them"
            )
        odd = [p for p in self.trains if not re.fullmatch(r"stage[1-9]\d*", p)]
        odd = [p for p in odd if p not in _PARTS.split(", ")]
        if odd:
            raise ValueError(
                f"phase {self.name!r} trains={list(self.trains)}: {odd[0]!r} is no part of a "
                f"network: give some of {_PARTS}"
            )
        if not set(self.trains) - {"statistics"}:
            raise ValueError(
                f"phase {self.name!r} trains={list(self.trains)} has no parameters to train: "
                f"give some of {_PARTS}"
            )
        return self


class Pull(_Section):
    """Weight of the pull of tied tensors to their mean over training (relaxed sharing)."""

    points: tuple[tuple[float, float], ...] = Field(
        default=((0.0, 1e-4), (1.0, 1e-1)),
        description="(share of training, weight at it), in order; constant before and after",
    )
    between: Literal["exponential", "linear", "steps"] = Field(
        default="exponential", description="how the weight goes from one point to the next"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Pull:
        shares, weights = [p[0] for p in self.points], [p[1] for p in self.points]
        if shares != sorted(set(shares)) or not all(0 <= share <= 1 for share in shares):
            raise ValueError(
                f"points={list(self.points)}: shares of training must rise from 0 to 1"
            )
        if not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"points={list(self.points)}: weights must be greater than 0")
        if not any(after > before for before, after in pairwise(weights)):
            raise ValueError(
                f"points={list(self.points)} never rise, so that tied tensors are not brought "
                "together: give a higher weight later, such as [[0, 1.0e-4], [1, 0.1]]"
            )
        return self


class Train(_Section):
    epochs: int | None = Field(default=None, gt=0, description="None: as long as the phases")
    batch_size: int = Field(gt=0, description="global: all ranks, all accumulation steps")
    accumulation: int = Field(default=1, gt=0, description="micro-batches per optimizer step")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    zero_stage: Literal[0, 1] = 0
    compile: bool = Field(
        default=False,
        description="fuse a step's kernels with torch.compile: a minute at the start, more "
        "images/s then; gates draw other noise from the same seed",
    )
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    evaluate_every: int = Field(default=1, gt=0, description="epochs")
    log_every: int = Field(
        default=10, gt=0, description="optimizer steps; a point of a metric is the mean over them"
    )


class Checkpoints(_Section):
    every_steps: int | None = Field(default=None, gt=0)
    every_minutes: float | None = Field(default=10.0, gt=0, description="minutes, without the unit")
    keep_last: int = Field(default=2, gt=0, description="the best is kept besides")


class Config(_Section):
    """Everything that decides a run. Its YAML form is a recipe."""

    name: str = Field(description="the recipe's")
    model: str
    model_options: dict[str, Any] = {}
    init_from: InitFrom | None = Field(default=None, description="None: from scratch")
    data: Data
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    loss: Loss = Loss()
    steps: Steps = Steps()
    scorer: Scorer = Scorer()
    phases: tuple[Phase, ...] = Field(
        default=(),
        description="in order; none: one of train.epochs",
        examples=[[{"name": "all", "epochs": 2}]],
    )
    pull: Pull | None = Field(default=None, description="of relaxed sharing, None without it")
    train: Train
    checkpoints: Checkpoints = Checkpoints()
    experiment: str = "reprise"
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _lasts(self) -> Config:
        names = [phase.name for phase in self.phases]
        if self.train.epochs is None and not names:
            raise ValueError("train.epochs=null without phases: give a number of epochs, or phases")
        if self.train.epochs is not None and names:
            raise ValueError(
                f"train.epochs={self.train.epochs} with phases, which have lengths of their own: "
                "give train.epochs=null"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"phases {names}: give each a name of its own")
        return self

    @property
    def all_phases(self) -> tuple[Phase, ...]:
        """The phases; one of the whole training where none are given."""
        return self.phases or (Phase(name="training", epochs=self.train.epochs),)

    def during(self, phase: Phase) -> Config:
        """The configuration with the phase's own sections in the place of the run's."""
        own = {name: getattr(phase, name) for name in ("optimizer", "schedule", "loss", "scorer")}
        return self.model_copy(update={k: v for k, v in own.items() if v is not None})

    @property
    def task(self) -> TaskName:
        """Noise to remove is what makes the task denoising."""
        return "classification" if self.data.sigma is None else "denoising"

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def flat(self) -> dict[str, Any]:
        """One level, keys joined with dots, as trackers and overrides name them."""
        return _flatten(self.model_dump(mode="json"))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = {str(number): entry for number, entry in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
