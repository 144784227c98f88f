"""The phases of a run: what each trained, when it ended, and what it reached."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.analysis.contents import Run
from pipeline.config import Phase


@dataclass(frozen=True)
class Passed:
    """One phase; `last_step` and `top1` are None for what has not come or was not evaluated."""

    phase: Phase
    scorer: str
    first_step: int | None
    last_step: int | None
    top1: float | None


def table(run: Run) -> list[Passed]:
    """In order; empty where the run has no phases."""
    steps: dict[int, list[int]] = {}
    for step, number in run.history.get("phase", []):
        steps.setdefault(round(number), []).append(step)
    evaluated = dict(run.history.get("eval/top1", []))
    rows = []
    first: int | None = 1
    for number, phase in enumerate(run.config.phases, start=1):
        last = max(steps[number]) if number in steps else None
        scorer = run.config.during(phase).scorer
        name = {"gumbel": f"gumbel, tau {scorer.temperature:g}", "top_k": f"top {scorer.k}"}
        rows.append(
            Passed(
                phase,
                name.get(scorer.name, scorer.name.replace("_", " ")),
                first if last is not None else None,
                last,
                evaluated.get(last) if last is not None else None,
            )
        )
        first = last + 1 if last is not None else None
    return rows
