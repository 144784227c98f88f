"""Denoising: a clean image for a noisy one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.data import Batch
from pipeline.distributed import World
from pipeline.models import Output
from pipeline.tasks import task
from pipeline.tasks.task import Part, Task, joined

EXAMPLES = 3  # images that an evaluation keeps to be looked at: the first of the split
EXAMPLE_SIDE = 160  # pixels, cut from their middle: noise is not seen in an image made smaller
LEAST_ERROR = 1e-10  # an exact image has 100 dB, so that the mean over images is finite


@dataclass(frozen=True, kw_only=True)
class Summary(task.Summary):
    """Peak signal-to-noise ratios of one evaluation, in dB, means over the images."""

    psnr: float  # of the restored images
    noisy_psnr: float  # of what the network was given
    # Tells the file of this summary from one of classification, which has no such entry.
    task: Literal["denoising"] = "denoising"

    @property
    def gain(self) -> float:
        """What the network adds, dB."""
        return self.psnr - self.noisy_psnr

    @property
    def results(self) -> dict[str, float]:
        return {"psnr": self.psnr, "noisy_psnr": self.noisy_psnr}

    @property
    def headline(self) -> str:
        return f"PSNR {self.psnr:.2f} dB, of the noisy images {self.noisy_psnr:.2f} dB"

    @property
    def rows(self) -> list[tuple[str, str]]:
        return [
            ("PSNR", f"{self.psnr:.2f} dB"),
            ("of the noisy images", f"{self.noisy_psnr:.2f} dB"),
            ("gain", f"{self.gain:.2f} dB"),
        ]


@dataclass(frozen=True)
class Samples(task.Samples):
    """Per-sample results in the order of the split, and a few images to look at.

    `examples` (k, 3, height, width) uint8: the middle of the first k images clean, noisy, restored.
    """

    keys: np.ndarray  # str
    psnr: np.ndarray  # float64, dB
    noisy_psnr: np.ndarray  # float64, dB
    examples: np.ndarray
    steps: np.ndarray  # (samples, recursive cells) int64: executed steps of each cell


@dataclass(frozen=True)
class Denoising(Task):
    """Squared error of the restored images (RC Eq. 7); their PSNR decides."""

    score: ClassVar[str] = "eval/psnr"
    summary: ClassVar[type[task.Summary]] = Summary
    samples: ClassVar[type[task.Samples]] = Samples

    def loss_terms(
        self, output: Output, batch: Batch, world: World, progress: float = 0.0
    ) -> dict[str, Tensor]:
        """Half of |x + f(x) - y|^2, the sum over an image's pixels, mean over the images.

        RC Eq. 7 with the factors of the loss that its settings come from: Zhang et al., Beyond a
        Gaussian denoiser (2017), Eq. 1.
        """
        error = output.prediction.float() - batch.targets
        return {"squared_error": error.square().sum((1, 2, 3)).mean() / 2}

    def training_metrics(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        return {"psnr": psnr(output.prediction.detach(), batch.targets).float().mean()}

    def results(self, output: Output, batch: Batch, before: int) -> dict[str, Any]:
        views = torch.stack([batch.targets, batch.images, output.prediction], 1)[:, :, 0]
        return {
            "psnr": psnr(output.prediction, batch.targets).cpu().numpy(),
            "noisy_psnr": psnr(batch.images, batch.targets).cpu().numpy(),
            "examples": [_middle(view) for view in views[: max(EXAMPLES - before, 0)]],
        }

    def conclude(
        self, parts: Sequence[Part], execution: task.Summary, keys: np.ndarray, steps: np.ndarray
    ) -> tuple[Summary, Samples]:
        restored, noisy = joined(parts, "psnr"), joined(parts, "noisy_psnr")
        summary = Summary(
            **vars(execution), psnr=float(restored.mean()), noisy_psnr=float(noisy.mean())
        )
        examples = [view for part in parts for view in part["examples"]][:EXAMPLES]
        return summary, Samples(keys, restored, noisy, _of_one_size(examples), steps)


def psnr(images: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images clipped to [0, 1]: (N, C, H, W) -> (N,) float64.

    10 log10(1 / mean squared error), over the pixels of each image.
    """
    error = images.double().clamp(0, 1) - clean.double()
    return -10 * error.square().mean((1, 2, 3)).clamp(min=LEAST_ERROR).log10()


def _middle(views: Tensor) -> np.ndarray:
    """The middle of the same image in several forms, (k, H, W) in 0..1, as uint8."""
    height, width = (min(EXAMPLE_SIDE, side) for side in views.shape[1:])
    levels = (views.float().clamp(0, 1) * 255).round().byte()
    return _cut(levels.cpu().numpy(), height, width)


def _of_one_size(examples: Sequence[np.ndarray]) -> np.ndarray:
    height, width = (min(view.shape[axis] for view in examples) for axis in (1, 2))
    return np.stack([_cut(view, height, width) for view in examples])


def _cut(views: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (views.shape[1] - height) // 2, (views.shape[2] - width) // 2
    return views[:, top : top + height, left : left + width]
