"""Where the representations of images go, block by block.

*Towards Efficient Recurrent Visual Models*, Sec. 4.4, Fig. 4 and 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.analysis.figure import saving
from pipeline.analysis.levels import blocks, levels, watch
from pipeline.data import Batch
from pipeline.models import Network

IMAGES = 100  # the first of the training split, which is shuffled when it is prepared
Floats = npt.NDArray[np.float32]


def collect(
    model: Network, batches: Iterable[Batch], size: int
) -> tuple[dict[int, Floats], npt.NDArray[np.int64]]:
    """The inputs and outputs of the blocks of each level, (images, blocks + 1, features); labels.

    `batches` are in order; their first `IMAGES` images, as evaluation sees them, are taken.

    Raises:
        ValueError: see `blocks`.
    """
    found = {level: blocks(model, level, size) for level in range(1, levels(model) + 1)}
    calls = watch(model, sorted({block.cell for level in found.values() for block in level}))
    points: dict[int, list[Floats]] = {level: [] for level in found}
    labels: list[int] = []
    with torch.inference_mode():
        for batch in batches:
            take = min(len(batch.keys), IMAGES - len(labels))
            model.eval()(batch.images[:take])
            labels += batch.labels[:take].tolist()
            for level, places in found.items():
                passed = [calls[place.cell][place.step] for place in places]
                track = [passed[0][0], *(after for _, after in passed)]
                points[level].append(
                    torch.stack([x.flatten(1).float() for x in track], 1).cpu().numpy()
                )
            for made in calls.values():
                made.clear()
            if len(labels) == IMAGES:
                break
    return {level: np.concatenate(parts) for level, parts in points.items()}, np.array(labels)


def project(points: Floats, *, drift: bool) -> Floats:
    """Principal components of all points of a level: (images, points, features) -> (..., 2).

    Without `drift`, the mean of the images is taken away from each of them at every block.
    """
    from sklearn.decomposition import PCA

    if not drift:
        points = points - points.mean(0, keepdims=True)
    plane = PCA(2, random_state=0).fit_transform(points.reshape(-1, points.shape[-1]))
    return np.asarray(plane, dtype=np.float32).reshape(*points.shape[:2], 2)


def save(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Write the points, for whoever wants to draw them otherwise."""
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def draw(
    path: Path,
    projected: dict[tuple[int, bool], Floats],
    labels: npt.NDArray[np.int64],
    classes: Sequence[str],
) -> None:
    """A column for each level; the upper row with the drift, the lower without.

    More classes than there are colours share them, and then the picture has no legend.
    """
    import matplotlib

    colours = matplotlib.colormaps["tab10" if labels.max() < 10 else "tab20"]
    numbers = sorted({level for level, _ in projected})
    with saving(path, rows=2, columns=len(numbers), width=4 * len(numbers), height=7.4) as (
        figure,
        panels,
    ):
        for (level, drift), tracks in projected.items():
            axes = panels[0 if drift else 1][numbers.index(level)]
            for track, label in zip(tracks, labels, strict=True):
                colour = colours(int(label) % colours.N)
                x, y = track.T
                axes.quiver(
                    x[:-1],
                    y[:-1],
                    np.diff(x),
                    np.diff(y),
                    angles="xy",
                    scale_units="xy",
                    scale=1,
                    width=0.0018,
                    headwidth=6,
                    headlength=7,
                    headaxislength=6,
                    color=colour,
                    alpha=0.6,
                )
                axes.plot(x, y, linestyle="", marker=".", markersize=2.5, color=colour)
            axes.set(title=f"level {level}, {'with' if drift else 'without'} the drift")
            axes.set(xticks=[], yticks=[])
            axes.autoscale_view()
        if labels.max() < colours.N:
            for label in sorted(set(labels.tolist())):
                dot = {"linestyle": "", "marker": ".", "color": colours(label)}
                panels[0][0].plot([], [], label=classes[label], **dot)
            figure.legend(loc="outside lower left", ncols=10)
