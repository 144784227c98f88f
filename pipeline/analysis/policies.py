"""What controllers learned: ReSet Fig. 4 (spread of the scores) and Fig. 6 (their evolution)."""

from __future__ import annotations

from itertools import groupby

from pipeline.analysis.contents import Evaluation, Run
from pipeline.analysis.figure import MUTED, SERIES, Picture, over_epochs, panels, thin
from pipeline.tasks.classification import Samples

_PREFIX = "train/score/"

# Pool, iteration and unit of a component, the latter two from 1.
Component = tuple[str, int, int]


def components(names: list[str]) -> list[Component]:
    """`<pool>/<iteration>/<unit>`, taken apart and sorted."""
    parts = [name.rsplit("/", 2) for name in names]
    return sorted((pool, int(iteration), int(unit)) for pool, iteration, unit in parts)


def units(found: list[Component]) -> int:
    """Of the largest pool, the zero unit among them."""
    return max(unit for _, _, unit in found)


def color(unit: int, of: int) -> str:
    """Of one of the units of a pool; the last is the zero unit."""
    return MUTED if unit == of else SERIES[(unit - 1) % len(SERIES)]


def evolution(run: Run) -> Picture | None:
    """Mean score of each unit over training: a row for each pool, a column for each iteration."""
    found = components([n.removeprefix(_PREFIX) for n in run.history if n.startswith(_PREFIX)])
    if not found:
        return None
    picture = Picture("policy", "Mean score of every unit over training, by pool and iteration.")
    pools = [(pool, list(members)) for pool, members in groupby(found, lambda c: c[0])]
    columns = max(iteration for _, iteration, _ in found)
    with panels(picture, len(pools), columns, 1.6 * columns + 0.9, 1.35 * len(pools) + 0.5) as grid:
        for (pool, members), row in zip(pools, grid, strict=True):
            last = max(unit for _, _, unit in members)
            for _, iteration, unit in members:
                epochs, scores = thin(*run.series(f"{_PREFIX}{pool}/{iteration}/{unit}"))
                row[iteration - 1].plot(epochs, scores, color=color(unit, last), linewidth=1.2)
            row[0].set_ylabel(f"stage {_stage(pool)}")
            for axes in row[members[-1][1] :]:
                axes.set_visible(False)
        for number, axes in enumerate(grid[0]):
            axes.set_title(f"iteration {number + 1}")
            axes.set_ylim(-0.03, 1.03)
        for axes in grid[-1]:
            over_epochs(axes)
    return picture


def deviations(evaluation: Evaluation) -> Picture | None:
    """Standard deviation of each component of the route vectors over the images."""
    samples = evaluation.samples
    if not isinstance(samples, Samples) or not len(samples.components):
        return None
    spread = dict(zip(samples.components.tolist(), samples.routes.std(0).tolist(), strict=True))
    found = components(list(spread))
    pools = [(pool, list(members)) for pool, members in groupby(found, lambda c: c[0])]
    picture = Picture(
        "deviations", "Standard deviation of every unit's score over the images, by iteration."
    )
    with panels(picture, 1, len(pools), max(3.2, 2.9 * len(pools)), 2.4) as grid:
        for (pool, members), axes in zip(pools, grid[0], strict=True):
            last = max(unit for _, _, unit in members)
            for unit in range(1, last + 1):
                bars = [(i, spread[f"{p}/{i}/{u}"]) for p, i, u in members if u == unit]
                axes.bar(
                    [iteration + (unit - (last + 1) / 2) * 0.8 / last for iteration, _ in bars],
                    [deviation for _, deviation in bars],
                    width=0.8 / last,
                    color=color(unit, last),
                )
            axes.set(title=f"stage {_stage(pool)}", xlabel="iteration")
            axes.set_xticks(sorted({iteration for _, iteration, _ in members}))
            axes.grid(visible=False, axis="x")
        grid[0][0].set_ylabel("standard deviation")
    return picture


def _stage(pool: str) -> int:
    """`stages.0.pool` is the pool of stage 1."""
    return int(pool.split(".")[1]) + 1
