"""What every task is, and what every evaluation finds whatever the task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from pipeline.data import Batch
from pipeline.distributed import World
from pipeline.models import Output

Part = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What one evaluation found; rates and steps at the deterministic gates of evaluation.

    A task adds its own results.
    """

    split: str
    step: int  # optimizer steps that made the weights
    samples: int
    mean_steps: float  # executed recursive steps per sample, all cells
    maximal_steps: int
    steps_histogram: tuple[int, ...]  # samples that executed 0, 1, 2, ... steps in all
    rates: dict[str, list[float]]  # recursive cell -> share of samples executing each step
    multiply_adds: float  # per sample of the training's size, as executed
    nominal_multiply_adds: int
    images_per_second: float  # all ranks, reading included, its start not
    step_choice: int | None = None  # number of steps asked of a cost-adjustable network

    @property
    def results(self) -> dict[str, float]:
        """The task's own results by name."""
        return {}

    @property
    def headline(self) -> str:
        """The results in a few words."""
        return ""

    @property
    def rows(self) -> list[tuple[str, str]]:
        """The results as a table: what, and the figure with its unit."""
        return []

    def metrics(self) -> dict[str, float]:
        """The numbers under the names that trackers show."""
        values = {f"eval/{name}": value for name, value in self.results.items()}
        values |= {
            "eval/mean_steps": self.mean_steps,
            "eval/multiply_adds": self.multiply_adds,
            "eval/images_per_second": self.images_per_second,
        }
        for cell, rates in self.rates.items():
            values |= {f"eval_rate/{cell}/{i + 1}": rate for i, rate in enumerate(rates)}
        if self.step_choice is not None:
            values |= {f"eval_steps/{self.step_choice}/{k}": v for k, v in self.results.items()}
        return values


class Samples:
    """Per-sample results in the order of the split, for a task to extend: a dataclass of arrays."""

    keys: np.ndarray  # (samples,) str
    steps: np.ndarray  # (samples, recursive cells) int64: executed steps of each cell

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, **vars(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        with np.load(path, allow_pickle=False) as stored:
            return cls(**stored)


class Task(ABC):
    """How outputs are judged, in training and in evaluation.

    `score` names the metric of an evaluation that decides which weights are the best: the higher
    the better.
    """

    score: ClassVar[str]
    summary: ClassVar[type[Summary]]
    samples: ClassVar[type[Samples]]

    @abstractmethod
    def loss_terms(
        self, output: Output, batch: Batch, world: World, progress: float = 0.0
    ) -> dict[str, Tensor]:
        """The weighted terms whose sum is the loss; each a scalar in fp32.

        `progress` is the fraction, 0..1, of the run's or phase's steps that are made.
        """

    @abstractmethod
    def training_metrics(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """What else to show of a micro-batch: name -> mean over its samples, without gradient."""

    @abstractmethod
    def results(self, output: Output, batch: Batch, before: int) -> dict[str, Any]:
        """Of an evaluated batch, what `conclude` needs; `before` it this rank evaluated so many."""

    @abstractmethod
    def conclude(
        self, parts: Sequence[Part], execution: Summary, keys: np.ndarray, steps: np.ndarray
    ) -> tuple[Summary, Samples]:
        """The evaluation as a whole, from the results of all batches in the order of the split."""


def joined(parts: Sequence[Part], name: str) -> np.ndarray:
    """One array of the parts' arrays of this name."""
    return np.concatenate([part[name] for part in parts])
