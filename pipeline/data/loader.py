"""What both readers have in common: batches, the position in them, and the step to the network."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.augment import Transform
from pipeline.data.order import BatchPlan, Plan, Rows


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch: what the network gets, and what it should answer.

    Classification: `images` (n, 3, size, size) float32, normalised, channels last in memory;
    `targets` (n,) int64, the labels. Denoising: `images` (n, 1, height, width) float32, noisy;
    `targets` the same images clean, in 0..1. All on the rank's device and owned by whoever holds
    the batch. `keys`: n sample keys.
    """

    images: torch.Tensor
    targets: torch.Tensor
    keys: tuple[str, ...]

    @property
    def labels(self) -> torch.Tensor:
        """The targets of classification by their usual name."""
        return self.targets


@dataclass(frozen=True)
class Decoded:
    """What a reader makes of a micro-batch: crop, resize and flip done, the rest not yet.

    `images` (n, height, width, 3) uint8, for denoising of one grey channel; `labels` (n,).
    """

    images: torch.Tensor
    labels: npt.NDArray[np.int64]
    keys: tuple[str, ...]


class Finish(Protocol):
    """The last part of the way to the network's input, with what it should answer to it."""

    def __call__(
        self, decoded: Decoded, epoch: int, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and targets of a `Batch`."""


class Reader(Protocol):
    """Reads, decodes, crops, resizes and flips the batches of a plan."""

    def batches(self, epoch: int, first_step: int) -> Generator[Decoded, None, None]:
        """The batches of an epoch from a step on; closing the iterator stops all work on them.

        Raises ValueError naming shard, key and offset of a sample that cannot be used.
        """

    def close(self) -> None:
        """Let go of what the reader keeps from one pass to the next."""


class Loader:
    """Batches of a plan in its order, and the position in them.

    The position counts the batches that were handed out; work ahead of that does not count, so a
    loader that is set to a position continues bit by bit as one that never stopped.
    """

    def __init__(
        self,
        plan: Plan,
        transform: Transform,
        reader: Reader,
        finish: Finish,
    ) -> None:
        self.plan = plan
        self._transform = transform
        self._reader = reader
        self._finish = finish
        self._epoch = 0
        self._step = 0
        # Weak, so that a pass that its consumer drops ends at once.
        self._running: weakref.ref[Generator[Batch, None, None]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Micro-steps; in training the same on all ranks."""
        return self.plan.steps_per_epoch

    @property
    def samples(self) -> int:
        """Training: of the whole set. Evaluation: of this rank."""
        return self.plan.samples

    @property
    def position(self) -> tuple[int, int]:
        """Epoch, and the micro-step in it that comes next."""
        return self._epoch, self._step

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue before micro-step `step` of `epoch`; ValueError where there is none."""
        epoch, step = state["epoch"], state["step"]
        if epoch < 0 or not 0 <= step < max(self.steps_per_epoch, 1):
            raise ValueError(
                f"data position epoch {epoch}, step {step} does not exist: an epoch has "
                f"{self.steps_per_epoch} micro-steps; use the batch size, accumulation and shard "
                "set of the run that wrote it"
            )
        self.close()
        self._epoch, self._step = epoch, step

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch in training, the whole set in evaluation.

        One pass at a time: to begin another ends the one before.
        """
        self._end_pass()
        if not isinstance(self.plan, BatchPlan):
            self._epoch, self._step = 0, 0
        batches = self._rest()
        self._running = weakref.ref(batches)
        return batches

    def close(self) -> None:
        """Stop reading: no thread, process or open file is left; a further pass starts anew."""
        self._end_pass()
        self._reader.close()

    def _end_pass(self) -> None:
        running = self._running() if self._running is not None else None
        if running is not None:
            running.close()
        self._running = None

    def _rest(self) -> Generator[Batch, None, None]:
        epoch = self._epoch
        batches = self._reader.batches(epoch, self._step)
        try:
            for decoded in batches:
                images, targets = self._finish(decoded, epoch, self.plan.rows(epoch, self._step))
                batch = Batch(images, targets, decoded.keys)
                self._advance()
                yield batch
        finally:
            batches.close()

    def _advance(self) -> None:
        self._step += 1
        if self._step == self.steps_per_epoch:
            self._epoch, self._step = self._epoch + 1, 0
