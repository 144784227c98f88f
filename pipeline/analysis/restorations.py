"""Clean, noisy and restored: the middle of a few images of a denoising run (RC Fig. 4)."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from pipeline.analysis.contents import Evaluation
from pipeline.analysis.examples import data_uri
from pipeline.tasks import denoising


@dataclass(frozen=True)
class Restoration:
    """One image in three forms, as data URIs; the ratios, in dB, are of the whole image."""

    key: str
    clean: str
    noisy: str
    restored: str
    noisy_psnr: float
    psnr: float


def restorations(evaluation: Evaluation) -> list[Restoration]:
    """The images that the evaluation kept, in the order of the split."""
    samples = evaluation.samples
    assert isinstance(samples, denoising.Samples)
    shown = []
    for number, views in enumerate(samples.examples):
        clean, noisy, restored = (data_uri(Image.fromarray(view)) for view in views)
        noisy_psnr, psnr = float(samples.noisy_psnr[number]), float(samples.psnr[number])
        key = str(samples.keys[number])
        shown.append(Restoration(key, clean, noisy, restored, noisy_psnr, psnr))
    return shown
