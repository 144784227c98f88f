"""Histogram of the steps that images executed in all cells together (DRNN Fig. 8)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.analysis.figure import INK, MUTED, SERIES, Picture, drawing, legend_above

_MOST_COUNTS = 16  # bars that have room for their count
_ROOM = 0.12  # above the highest bar, for its count, as a share of the bar


def deviation(histogram: Sequence[int]) -> float:
    """Standard deviation, over the images, of the number of steps; `histogram[k]` took k steps."""
    images = sum(histogram)
    mean = sum(k * n for k, n in enumerate(histogram)) / images
    return math.sqrt(sum(n * (k - mean) ** 2 for k, n in enumerate(histogram)) / images)


def draw(histogram: Sequence[int], mean: float, expected: float) -> Picture:
    """Images by number of steps; `expected` is the mean with every gate at its target."""
    picture = Picture(
        "steps",
        "Number of images by executed steps: "
        + ", ".join(f"{n} images took {k}" for k, n in enumerate(histogram) if n),
    )
    with drawing(picture, 5.2, 3) as axes:
        bars = axes.bar(range(len(histogram)), histogram, width=0.8, color=SERIES[0], alpha=0.85)
        if len(histogram) <= _MOST_COUNTS:
            counts = [f"{n:,}" if n else "" for n in histogram]
            axes.bar_label(bars, counts, padding=2, color=MUTED, fontsize=9)
        below_counts = 1 / (1 + _ROOM)
        axes.axvline(mean, ymax=below_counts, color=INK, label=f"mean {mean:.2f}")
        axes.axvline(
            expected,
            ymax=below_counts,
            color=SERIES[1],
            linestyle=(0, (5, 3)),
            label=f"with gates at target {expected:.2f}",
        )
        axes.grid(visible=False, axis="x")
        axes.locator_params(axis="x", integer=True)
        axes.set(xlabel="executed steps, all cells", ylabel="images", xlim=(-0.6, None))
        axes.margins(y=_ROOM)
        legend_above(axes)
    return picture
