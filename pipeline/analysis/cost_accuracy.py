"""Accuracy of a cost-adjustable network over what it costs (RC Tables 4 and 5, Fig. 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.analysis.contents import Run
from pipeline.analysis.figure import SERIES, Picture, drawing


@dataclass(frozen=True)
class Point:
    """One network at one number of steps; shares are of its own values at the largest number."""

    steps: int
    multiply_adds: float  # per image
    top1: float  # fraction, 0..1
    cost_share: float
    top1_share: float


Curve = tuple[str, list[Point]]  # with the name of the run


def points(run: Run) -> list[Point]:
    """Ascending in steps, of the run's own shard set and its newest weights; empty without any."""
    if run.main is None or run.main.summary.step_choice is None:
        return []
    largest = run.main.summary
    best = largest.results["top1"]
    found = {
        evaluation.summary.step_choice: evaluation.summary
        for evaluation in run.evaluations
        if evaluation.summary.step == largest.step
        and evaluation.name
        in (run.main.name, f"{run.main.name}-{evaluation.summary.step_choice}-steps")
    }
    return [
        Point(
            steps,
            summary.multiply_adds,
            summary.results["top1"],
            summary.multiply_adds / largest.multiply_adds,
            summary.results["top1"] / best if best else 0.0,
        )
        for steps, summary in sorted(found.items(), key=lambda item: item[0] or 0)
        if steps is not None
    ]


def draw(runs: Sequence[Run]) -> list[Picture]:
    """The curves of all runs over multiply-adds; of several runs also the relative ones of Fig. 7.

    Colours are in the order of the runs; the page names them, since names of runs may be long.

    Nothing where the first run has fewer than two points.

    Raises:
        ValueError: there are several runs, and one of them has fewer than two points.
    """
    curves = [(run.name, points(run)) for run in runs]
    lacking = [name for name, curve in curves if len(curve) < 2]
    if len(runs) == 1 and lacking:
        return []
    if lacking:
        raise ValueError(
            f"the run {lacking[0]} has no cost-accuracy curve: take cost-adjustable networks "
            "(rc_r2, rc_r4, rc_early_exit) and evaluate them with `reprise eval RUN --steps N,N`"
        )
    pictures = [_absolute(curves)]
    return [*pictures, _relative(curves)] if len(curves) > 1 else pictures


def _absolute(curves: list[Curve]) -> Picture:
    picture = Picture("cost-accuracy", "Top-1 accuracy over multiply-adds per image.")
    with drawing(picture) as axes:
        for number, (_, curve) in enumerate(curves):
            color = SERIES[number % len(SERIES)]
            cost = [point.multiply_adds / 1e6 for point in curve]
            top1 = [100 * point.top1 for point in curve]
            axes.plot(cost, top1, color=color, marker="o", markersize=4)
            for point, x, y in zip(curve, cost, top1, strict=True):
                axes.annotate(str(point.steps), (x, y), xytext=(4, -11), textcoords="offset points")
        axes.set(xlabel="multiply-adds per image, millions", ylabel="top-1 accuracy, %")
        axes.margins(0.12)
    return picture


def _relative(curves: list[Curve]) -> Picture:
    picture = Picture(
        "cost-accuracy-relative",
        "Accuracy over multiply-adds, both as shares of a network's own at its largest cost.",
    )
    with drawing(picture) as axes:
        for number, (_, curve) in enumerate(curves):
            color = SERIES[number % len(SERIES)]
            cost = [100 * point.cost_share for point in curve]
            top1 = [100 * point.top1_share for point in curve]
            axes.plot(cost, top1, color=color, marker="o", markersize=4)
        axes.set(xlabel="relative multiply-adds, %", ylabel="relative accuracy, %")
        axes.margins(0.12)
    return picture
