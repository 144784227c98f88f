"""The noise that denoising removes: a pure function of the seed and the place of a sample."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.config import Config
from pipeline.data.order import Rows, generator

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Noise:
    """White Gaussian noise of one level; `sigma` is its standard deviation, of 255.

    Every image has a generator of its own, so that neither the number of ranks nor where a run was
    resumed changes what is drawn for it. Noise is in the units of images in 0..1, and is not
    clipped there.
    """

    sigma: float
    seed: int

    @classmethod
    def of(cls, config: Config) -> Noise | None:
        """None where the task is not denoising."""
        return None if config.data.sigma is None else cls(config.data.sigma, config.seed)

    def of_training(self, epoch: int, rows: Rows, height: int, width: int) -> Floats:
        """(n, 1, height, width), anew for each epoch, step and place in its batch."""
        positions = ((epoch, rows.optimizer_step, int(row)) for row in rows.rows)
        return self._draw("noise", positions, height, width)

    def of_evaluation(self, rows: Rows, height: int, width: int) -> Floats:
        """(n, 1, height, width), always the same for a sample of the split."""
        return self._draw("evaluation", ((int(s),) for s in rows.samples), height, width)

    def _draw(
        self, purpose: str, positions: Iterable[tuple[int, ...]], height: int, width: int
    ) -> Floats:
        draws = [
            generator(self.seed, purpose, *position).standard_normal((1, height, width), np.float32)
            for position in positions
        ]
        return np.stack(draws) * np.float32(self.sigma / 255)
