"""From decoded images to the network's input and what it should answer: one class per task."""

from __future__ import annotations

import torch

from data_prep.manifest import Manifest
from pipeline.data.augment import Normalise, Transform, turn, upload
from pipeline.data.loader import Decoded
from pipeline.data.noise import Noise
from pipeline.data.order import BatchPlan, Rows


class Labelled:
    """Classification: normalised images, and the labels of the set."""

    def __init__(self, transform: Transform, manifest: Manifest, device: torch.device) -> None:
        self._transform = transform
        self._device = device
        self._normalise = Normalise(
            manifest.channel_mean, manifest.channel_std, transform.size, device
        )

    def __call__(
        self, decoded: Decoded, epoch: int, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        images = _turned(decoded.images, self._transform, epoch, rows)
        labels = upload(torch.from_numpy(decoded.labels), self._device)
        return self._normalise(images, self._transform.colour(epoch, rows)), labels


class Noisy:
    """Denoising: grey images in 0..1 with noise, which may leave 0..1, and without."""

    def __init__(self, transform: Transform, noise: Noise, device: torch.device) -> None:
        self._transform = transform
        self._noise = noise
        self._device = device

    def __call__(
        self, decoded: Decoded, epoch: int, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        images = _turned(decoded.images, self._transform, epoch, rows)
        clean = images.permute(0, 3, 1, 2).float().div_(255)
        _, _, height, width = clean.shape
        if isinstance(self._transform.plan, BatchPlan):
            drawn = self._noise.of_training(epoch, rows, height, width)
        else:
            drawn = self._noise.of_evaluation(rows, height, width)
        return clean + upload(torch.from_numpy(drawn), self._device), clean


def _turned(images: torch.Tensor, transform: Transform, epoch: int, rows: Rows) -> torch.Tensor:
    turns = transform.turns(epoch, rows)
    return images if turns is None else turn(images, turns)
