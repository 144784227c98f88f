"""Which samples are in which batch: pure functions of the seed, the epoch and the step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

# Shuffled as one piece: large enough to mix a dozen shards' classes, small enough that reads stay
# within a few open files.
SHUFFLE_WINDOW = 8192


def generator(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """Random numbers that depend on these values alone.

    `purpose` separates streams, so that one more kind of augmentation changes no other draw.
    """
    key = (*purpose.encode(), 0, *position)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


@lru_cache(maxsize=2)
def epoch_order(shard_sizes: tuple[int, ...], seed: int, epoch: int) -> Ids:
    """All sample ids, (samples,), in the order in which an epoch visits them; read-only.

    Shards are permuted, then samples are shuffled within windows along that sequence.
    """
    random = generator(seed, "order", epoch)
    starts = np.concatenate(([0], np.cumsum(shard_sizes))).astype(np.int64)
    shards = random.permutation(len(shard_sizes))
    order = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in shards])
    for start in range(0, len(order), SHUFFLE_WINDOW):
        random.shuffle(order[start : start + SHUFFLE_WINDOW])
    order.flags.writeable = False
    return order


class Rows(NamedTuple):
    """One rank's micro-batch."""

    samples: Ids
    rows: Ids  # the places these samples take in the batch of the optimizer step
    optimizer_step: int  # in the epoch


@dataclass(frozen=True)
class BatchPlan:
    """The batches of one rank in training.

    `global_batch` is over all ranks and all `accumulation` micro-batches of an optimizer step.
    Optimizer step k takes places [k * B, (k + 1) * B) of the epoch's order whatever the number of
    ranks; what is left at the epoch's end is not visited in that epoch. An epoch visits every
    sample `repeats` times, which are told apart by their steps and places alone.

    Raises ValueError where the global batch cannot be divided, or exceeds the samples.
    """

    samples: int
    global_batch: int
    accumulation: int
    rank: int
    world_size: int
    seed: int
    shard_sizes: tuple[int, ...]
    repeats: int = 1

    def __post_init__(self) -> None:
        assert self.samples == sum(self.shard_sizes)
        parts = self.accumulation * self.world_size
        if self.global_batch % parts:
            raise ValueError(
                f"global batch of {self.global_batch} cannot be divided among "
                f"{self.world_size} ranks x {self.accumulation} accumulation steps: "
                f"give a multiple of {parts}, such as {-(-self.global_batch // parts) * parts}"
            )
        if self._visits < self.global_batch:
            raise ValueError(
                f"global batch of {self.global_batch} exceeds the {self._visits} training "
                f"samples: give a batch size of at most {self._visits}"
            )

    @property
    def _visits(self) -> int:
        return self.samples * self.repeats

    @property
    def batch_size(self) -> int:
        """Of a micro-batch on one rank."""
        return self.global_batch // (self.accumulation * self.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Micro-steps, the same on all ranks."""
        return self._visits // self.global_batch * self.accumulation

    def rows(self, epoch: int, step: int) -> Rows:
        optimizer_step, micro = divmod(step, self.accumulation)
        first = (micro * self.world_size + self.rank) * self.batch_size
        rows = np.arange(first, first + self.batch_size)
        order = epoch_order(self.shard_sizes * self.repeats, self.seed, epoch)
        visits = order[optimizer_step * self.global_batch + rows]
        return Rows(visits % self.samples, rows, optimizer_step)


@dataclass(frozen=True)
class EvaluationPlan:
    """The batches of one rank in evaluation: a contiguous part of the set, in order.

    The parts of all ranks are disjoint and cover the set; they may differ by one sample, so ranks
    may differ in their number of batches, and a rank may have none.
    """

    set_size: int
    batch_size: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"evaluation batch size {self.batch_size}: give at least 1")

    @property
    def first(self) -> int:
        return self.set_size * self.rank // self.world_size

    @property
    def samples(self) -> int:
        return self.set_size * (self.rank + 1) // self.world_size - self.first

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.batch_size)

    def rows(self, epoch: int, step: int) -> Rows:
        del epoch  # every evaluation is the same
        rows = np.arange(step * self.batch_size, min((step + 1) * self.batch_size, self.samples))
        return Rows(self.first + rows, rows, step)


Plan = BatchPlan | EvaluationPlan
