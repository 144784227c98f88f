"""What the images of a set add up to: exact integers, so that no order or grouping matters."""

import bisect
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.images import CheckedImage

Channels = tuple[float, float, float]
SIDES = (32, 64, 128, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024)
"""Where the bins of the images' shorter sides begin, in pixels; one more lies before them."""


@dataclass
class Facts:
    """Counts per class id, the range of image sizes and the histogram of RGB values.

    ``histogram`` has 256 counts each for red, green and blue, ``sides`` the images by their shorter
    side. Facts of parts of a set are summed with ``add``.
    """

    counts: list[int]
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(768, np.int64))
    sides: list[int] = field(default_factory=lambda: [0] * (len(SIDES) + 1))
    heights: tuple[int, int] | None = None
    widths: tuple[int, int] | None = None

    def count(self, image: CheckedImage, label: int) -> None:
        """Take one image in."""
        self.counts[label] += 1
        self.sides[bisect.bisect(SIDES, min(image.height, image.width))] += 1
        if image.histogram is not None:
            self.histogram += image.histogram
        self.heights = _widened(self.heights, image.height)
        self.widths = _widened(self.widths, image.width)

    def add(self, other: "Facts") -> None:
        """Take the images of ``other`` in."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.histogram += other.histogram
        self.sides = [a + b for a, b in zip(self.sides, other.sides, strict=True)]
        self.heights = _span(self.heights, other.heights)
        self.widths = _span(self.widths, other.widths)

    def to_json(self) -> dict[str, Any]:
        return self.__dict__ | {"histogram": self.histogram.tolist()}

    @classmethod
    def of_json(cls, content: dict[str, Any]) -> "Facts":
        return cls(
            content["counts"],
            np.array(content["histogram"], np.int64),
            content["sides"],
            _pair(content["heights"]),
            _pair(content["widths"]),
        )

    @property
    def image_size(self) -> tuple[int, int, int, int]:
        """(min height, max height, min width, max width) in pixels; needs at least one image."""
        assert self.heights is not None, "no image was counted"
        assert self.widths is not None, "no image was counted"
        return (*self.heights, *self.widths)

    def channel_statistics(self) -> tuple[Channels, Channels]:
        """Mean and standard deviation of the pixels per channel, in 0..1."""
        red, green, blue = (_mean_and_std(c.tolist()) for c in self.histogram.reshape(3, 256))
        return (red[0], green[0], blue[0]), (red[1], green[1], blue[1])


def _pair(values: list[int] | None) -> tuple[int, int] | None:
    return None if values is None else (values[0], values[1])


def _widened(span: tuple[int, int] | None, value: int) -> tuple[int, int]:
    if span is None:
        return value, value
    if span[0] <= value <= span[1]:
        return span
    return min(span[0], value), max(span[1], value)


def _span(first: tuple[int, int] | None, second: tuple[int, int] | None) -> tuple[int, int] | None:
    if first is None or second is None:
        return first or second
    return min(first[0], second[0]), max(first[1], second[1])


def _mean_and_std(histogram: list[int]) -> tuple[float, float]:
    pixels = sum(histogram)
    total = sum(value * count for value, count in enumerate(histogram))
    squares = sum(value * value * count for value, count in enumerate(histogram))
    variance = (pixels * squares - total * total) / (pixels * pixels)
    return total / (255 * pixels), math.sqrt(variance) / 255
