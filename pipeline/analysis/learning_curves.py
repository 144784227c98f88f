"""Learning curves: loss terms, accuracy or PSNR, learning rate and angles over the epochs."""

from __future__ import annotations

from pipeline.analysis.contents import Run
from pipeline.analysis.figure import (
    INK,
    SERIES,
    Picture,
    drawing,
    legend_above,
    markers,
    over_epochs,
    thin,
)

_TERMS = {
    "train/loss": "all terms",
    "train/cross_entropy": "cross entropy",
    "train/execution_rate": "execution rate",
    "train/different_routes": "different routes",
    "train/decided_routes": "decided routes",
    "train/skip_reward": "skip reward not taken",
    "train/pull": "pull of tied weights",
    "train/squared_error": "half the squared error of a patch",
    "eval/loss": "cross entropy, evaluation",
}
_ACCURACIES = {
    "eval/top1": "top-1",
    "eval/top5": "top-5",
    "train/top1": "top-1, training",
}
_RATIOS = {
    "eval/psnr": "restored",
    "eval/noisy_psnr": "noisy",
    "train/psnr": "training patches",
}


def draw(run: Run) -> list[Picture]:
    """One picture for each that has points."""
    pictures = (_loss(run), _accuracy(run), _ratio(run), _learning_rate(run), _angles(run))
    return [picture for picture in pictures if picture is not None]


def _loss(run: Run) -> Picture | None:
    found = {name: run.series(name) for name in _TERMS if name in run.history}
    if sum(name.startswith("train/") for name in found) == 2:
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
        axes.set(ylabel="loss", yscale="log")
        over_epochs(axes)
        legend_above(axes, columns=2)
    return picture


def _accuracy(run: Run) -> Picture | None:
    picture = Picture("accuracy", "Accuracy over the epochs.")
    return _results(run, picture, _ACCURACIES, "accuracy, %", factor=100)


def _ratio(run: Run) -> Picture | None:
    picture = Picture("psnr", "Peak signal-to-noise ratio over the epochs.")
    return _results(run, picture, _RATIOS, "PSNR, dB")


def _results(
    run: Run, picture: Picture, labels: dict[str, str], unit: str, factor: int = 1
) -> Picture | None:
    """The metrics that have points; `factor` takes them to the unit."""
    found = {name: run.series(name) for name in labels if name in run.history}
    if not found:
        return None
    with drawing(picture) as axes:
        for color, (name, (epochs, values)) in zip(SERIES, found.items(), strict=False):
            epochs, values = thin(epochs, values)
            marked = markers(epochs, 2.8) if name.startswith("eval") else {}
            axes.plot(epochs, factor * values, color=color, label=labels[name], **marked)
        axes.set_ylabel(unit)
        over_epochs(axes)
        legend_above(axes, columns=2)
    return picture


def _learning_rate(run: Run) -> Picture | None:
    groups = {name: run.series(name) for name in sorted(run.history) if name.startswith("lr/")}
    if not groups:
        return None
    # Groups without a factor of their own have the same curve.
    curves: dict[bytes, list[str]] = {}
    for name, (_, values) in groups.items():
        curves.setdefault(values.tobytes(), []).append(name)
    picture = Picture("lr", "Learning rate of each parameter group over the epochs.")
    with drawing(picture) as axes:
        for color, names in zip(SERIES, curves.values(), strict=False):
            label = ", ".join(name.removeprefix("lr/") for name in names)
            axes.plot(*thin(*groups[names[0]]), color=color, label=label)
        axes.set_ylabel("learning rate")
        axes.set_ylim(bottom=0)
        over_epochs(axes)
        legend_above(axes)
    return picture


def _angles(run: Run) -> Picture | None:
    """Relaxed sharing: below one degree, consolidation does not cost accuracy (Sec. 3.1)."""
    sets = [name for name in run.history if name.startswith("angle/")]
    if not sets:
        return None
    picture = Picture(
        "angles", "Largest angle between the weights of each tied set, logarithmic scale."
    )
    with drawing(picture) as axes:
        for number, name in enumerate(sets):
            axes.plot(*thin(*run.series(name)), color=SERIES[number % len(SERIES)], linewidth=1)
        axes.axhline(1, color=INK, linestyle=(0, (5, 3)), linewidth=1, label="1 degree")
        axes.set(ylabel="angle in each tied set, degrees", yscale="log")
        over_epochs(axes)
        legend_above(axes)
    return picture
