"""The step metrics of training: means over the steps between two points."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.distributed import World
from pipeline.models import Output


class Window:
    """Sums since the last point, kept on the device: to read a value would wait for it."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._batches = 0
        self._samples = 0

    def add(
        self, terms: Mapping[str, Tensor], metrics: Mapping[str, Tensor], output: Output
    ) -> None:
        """Count one micro-batch of this rank: loss terms, metrics, and who executed what."""
        values = torch.cat(
            [
                torch.stack([value.detach() for value in (*terms.values(), *metrics.values())]),
                # The routes of pools have all that they say in their policies.
                *(r.executed.float().mean(0) for r in output.routes if not output.policies),
                *(policy.weights.detach().mean(0).flatten() for policy in output.policies),
            ]
        )
        if self._sums is None:
            self._names = [*terms, *metrics]
            for route in output.routes if not output.policies else ():
                steps = range(1, route.executed.shape[1] + 1)
                self._names += [f"rate/{route.cell}/{step}" for step in steps]
            self._names += [f"score/{name}" for name in output.components]
            self._sums, self._terms = values, len(terms)
        else:
            self._sums = self._sums + values
        self._batches += 1
        self._samples += len(output.prediction)

    def point(self, world: World) -> dict[str, float]:
        """Means over the window and all ranks, `train/...`; collective. Empty without batches.

        `train/loss` is the sum of the loss terms, the task's metrics (such as `train/top1`) are
        those of the augmented samples, `train/rate/<cell>/<step>` the share of samples that
        executed a step of a recursive cell, at the noisy gates of training where it has one, and
        `train/score/<pool>/<iteration>/<unit>` the weight of a unit, the last of the zero unit.
        """
        if self._sums is None:
            return {}
        means = (world.sum(self._sums) / (self._batches * world.world_size)).tolist()
        point = {f"train/{name}": mean for name, mean in zip(self._names, means, strict=True)}
        seconds = time.perf_counter() - self._started
        return {
            "train/loss": sum(means[: self._terms]),
            **point,
            "train/images_per_second": self._samples * world.world_size / seconds,
        }
