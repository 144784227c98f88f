"""Execution rate of every gated cell and step: training, evaluation and target (DRNN Eq. 12)."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.analysis.contents import Run
from pipeline.analysis.figure import SERIES, Picture, drawing, markers, over_epochs, thin


@dataclass(frozen=True)
class Rate:
    """Shares, 0..1, of the samples that execute a step; None where nothing was recorded."""

    cell: str
    step: int  # from 1
    target: float
    training: float | None  # at the noisy gates, mean of the last epoch
    evaluation: float | None  # at the deterministic gates


def table(run: Run) -> list[Rate]:
    """Where the gates ended."""
    rows = []
    for cell, step, target in _gated_steps(run):
        epochs, rates = run.series(f"train/rate/{cell}/{step}")
        last = rates[epochs > epochs.max() - 1] if len(epochs) else rates
        evaluated = run.main.summary.rates.get(cell) if run.main else None
        rows.append(
            Rate(
                cell,
                step,
                target,
                float(last.mean()) if len(last) else None,
                evaluated[step - 1] if evaluated else None,
            )
        )
    return rows


def draw(run: Run) -> list[Picture]:
    """One picture per gated cell, a colour per step, from the tracked metrics.

    Training: thin line. Evaluation: points joined by a line. Target t^i: dashes.
    """
    steps: dict[str, list[tuple[int, float]]] = {}
    for cell, step, target in _gated_steps(run):
        if any(f"{prefix}/{cell}/{step}" in run.history for prefix in ("train/rate", "eval_rate")):
            steps.setdefault(cell, []).append((step, target))
    return [_cell(run, number, cell, of) for number, (cell, of) in enumerate(steps.items())]


def _cell(run: Run, number: int, cell: str, steps: list[tuple[int, float]]) -> Picture:
    picture = Picture(
        f"rate-{number}", f"Execution rate of each step of the cell {cell} over the epochs."
    )
    with drawing(picture) as axes:
        for step, target in steps:
            color = SERIES[(step - 1) % len(SERIES)]
            axes.axhline(target, color=color, linestyle=(0, (5, 3)), linewidth=1)
            axes.plot(
                *thin(*run.series(f"train/rate/{cell}/{step}")),
                color=color,
                linewidth=0.9,
                alpha=0.75,
            )
            epochs, rates = thin(*run.series(f"eval_rate/{cell}/{step}"))
            # Steps that lie on each other, as at 100 %, stay visible: the earlier is the wider.
            wider = (len(steps) - step) * 2.4 / len(steps)
            axes.plot(
                epochs, rates, color=color, linewidth=1.5 + wider, **markers(epochs, 3 + wider)
            )
        over_epochs(axes)
        axes.set(title=cell, ylabel="images executing, %", ylim=(-0.03, 1.05))
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100"])
    return picture


def _gated_steps(run: Run) -> list[tuple[str, int, float]]:
    """Cell, step from 1, and the step's target t^i."""
    return [
        (name, step, cell.target**step)
        for name, cell in run.cost.cells.items()
        if cell.target is not None
        for step in range(1, cell.steps + 1)
    ]
