"""Learning curves: loss terms, accuracy and learning rate over the epochs."""

from __future__ import annotations

import numpy as np

from pipeline.analysis.contents import Run
from pipeline.analysis.figure import (
    SERIES,
    Picture,
    drawing,
    legend_above,
    markers,
    over_epochs,
    thin,
)

_TERMS = {
    "train/loss": "training: sum",
    "train/cross_entropy": "training: cross entropy",
    "train/execution_rate": "training: execution rate",
    "eval/loss": "evaluation: cross entropy",
}


def draw(run: Run) -> list[Picture]:
    """One picture for each of the three that has points."""
    pictures = (_loss(run), _accuracy(run), _learning_rate(run))
    return [picture for picture in pictures if picture is not None]


def _loss(run: Run) -> Picture | None:
    found = {name: run.series(name) for name in _TERMS if name in run.history}
    if "train/execution_rate" not in found:
        # The only term is the sum: two curves would be one on top of the other.
        found.pop("train/loss", None)
    if not found:
        return None
    picture = Picture("loss", "Loss terms over the epochs, logarithmic scale.")
    with drawing(picture) as axes:
        for color, (name, (epochs, values)) in zip(SERIES, found.items(), strict=False):
            epochs, values = thin(epochs, values)
            marked = markers(epochs, 2.8) if name.startswith("eval") else {}
            axes.plot(epochs, values, color=color, label=_TERMS[name], **marked)
        axes.set(ylabel="loss, nats", yscale="log")
        over_epochs(axes)
        legend_above(axes, columns=2)
    return picture


def _accuracy(run: Run) -> Picture | None:
    names = [name for name in ("eval/top1", "eval/top5") if name in run.history]
    if not names:
        return None
    picture = Picture("accuracy", "Top-1 and top-5 accuracy of evaluation over the epochs.")
    with drawing(picture) as axes:
        for color, name in zip(SERIES, names, strict=False):
            epochs, values = thin(*run.series(name))
            label = f"top-{name[-1]}"
            axes.plot(epochs, 100 * values, color=color, label=label, **markers(epochs, 2.8))
        axes.set_ylabel("accuracy, %")
        over_epochs(axes)
        legend_above(axes)
    return picture


def _learning_rate(run: Run) -> Picture | None:
    groups = {name: run.series(name) for name in sorted(run.history) if name.startswith("lr/")}
    if not groups:
        return None
    picture = Picture("lr", "Learning rate of each parameter group over the epochs.")
    labels: dict[tuple[float, ...], list[str]] = {}
    for name, (_, values) in groups.items():
        labels.setdefault(tuple(values), []).append(name.removeprefix("lr/"))
    with drawing(picture) as axes:
        for color, (values, names) in zip(SERIES, labels.items(), strict=False):
            epochs, _ = groups[f"lr/{names[0]}"]
            axes.plot(*thin(epochs, np.array(values)), color=color, label=", ".join(names))
        axes.set_ylabel("learning rate")
        axes.set_ylim(bottom=0)
        over_epochs(axes)
        legend_above(axes)
    return picture
