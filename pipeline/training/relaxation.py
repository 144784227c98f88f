"""Relaxed sharing in training: the pull of tied tensors, and how far apart they are.

*Towards Efficient Recurrent Visual Models*, Sec. 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import Config, ConfigError, Pull
from pipeline.models import Network
from pipeline.models.sharing import TiedSet
from pipeline.training import schedules

SAFE_ANGLE = 1.0  # degrees, below which consolidation does not degrade accuracy


@dataclass(frozen=True)
class Relaxation:
    """The tied sets of a network and the weight of their pull at each optimizer step."""

    sets: Sequence[TiedSet]
    weight: Callable[[int], float]

    def term(self, step: int) -> Tensor:
        """The loss term: weight x sum of the squared distances of all sets, scalar in fp32.

        Parameters are the same on all ranks, so that every rank adds the same gradients, whose mean
        over ranks and micro-batches is that of a single process.
        """
        return self.weight(step) * torch.stack([tied.spread() for tied in self.sets]).sum()

    def metrics(self, steps_done: int) -> dict[str, float]:
        """The weight at the last update, and the largest angle within each set, degrees."""
        angles = torch.stack([tied.angle() for tied in self.sets]).tolist()
        names = [f"angle/{tied.name}" for tied in self.sets]
        return {"pull": self.weight(steps_done - 1), **dict(zip(names, angles, strict=True))}


def of(config: Config, model: Network, total_steps: int) -> Relaxation | None:
    """None for a network that ties nothing."""
    if config.pull is None:
        return None
    return Relaxation(model.tied_sets(), schedules.pull(config.pull, total_steps))


def check(model: Network, pull: Pull | None) -> None:
    """Refuse tied tensors that nothing pulls together, and a pull of nothing.

    Raises:
        ConfigError: they are, or tensors of different shapes are tied.
    """
    try:
        tied = model.tied_sets()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if tied and pull is None:
        raise ConfigError(
            f"relaxed sharing ties {len(tied)} sets of tensors and nothing pulls them together: "
            "give pull={} for the paper's schedule, or model_options.sharing=raw"
        )
    if pull is not None and not tied:
        raise ConfigError(
            "pull is for the tied tensors of relaxed sharing and this network has none: leave pull "
            "out, or give model_options.sharing=relaxed"
        )
