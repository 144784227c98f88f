"""The report of a run: one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.files import write_atomically
from data_prep.manifest import CLASSIFICATION
from pipeline.analysis import (
    contents,
    cost_accuracy,
    examples,
    execution_rates,
    learning_curves,
    neighbours,
    phases,
    policies,
    restorations,
    step_histogram,
)
from pipeline.analysis.contents import Run
from pipeline.config import Config
from pipeline.run_directory import BEST, RunDirectory
from pipeline.tasks.classification import Samples

# Where a run's files are and how fast they are read does not decide what it learns.
_MATTERS_NOT = ("data.path", "data.reader", "data.workers", "data.eval_batch_size", "experiment")


def write(directory: RunDirectory, beside: Sequence[RunDirectory] = ()) -> Path:
    """Write the page of a run, finished or not, into its directory.

    The same run directory gives the same bytes. What cannot be shown is named on the page.
    `beside` are runs whose cost-accuracy curves are drawn beside this one's (RC Fig. 7).

    Raises:
        ConfigError: this is not a run directory.
        ValueError: the configuration names a model that does not exist here, or a run beside it
            has no such curve.
    """
    page = render(contents.read(directory), [contents.read(other) for other in beside])
    write_atomically(directory.report, page.encode())
    return directory.report


def render(run: Run, beside: Sequence[Run] = ()) -> str:
    """The page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pipeline", "analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "millions": _millions}
    environment.filters |= {
        "decibels": "{:.2f}\N{NO-BREAK SPACE}dB".format,
        "thousands": "{:,.0f}".format,
    }
    return environment.get_template("report.html").render(
        run=run,
        config=run.config,
        quote=quoted(run.config),
        curves=learning_curves.draw(run),
        costs=cost_accuracy.draw([run, *beside]),
        cost_tables=[(one.name, cost_accuracy.points(one)) for one in [run, *beside]],
        rates=execution_rates.draw(run),
        rate_table=execution_rates.table(run),
        most_steps=max((cell.steps for cell in run.cost.cells.values()), default=0),
        phases=phases.table(run),
        length=_length(run.config),
        gap=_gap(run),
        **_policies(run),
        **_executed_steps(run),
        **(_examples(run) if run.config.task == CLASSIFICATION else _restorations(run)),
    )


@dataclass(frozen=True)
class Quote:
    """The figure of the paper whose recipe a run follows.

    `changes` are the settings in which the run differs: (key, the run's, the recipe's).
    """

    figure: str
    changes: list[tuple[str, Any, Any]]


def quoted(config: Config) -> Quote | None:
    """None where the run's recipe has no figure in a paper."""
    from pipeline.recipes import RECIPES

    recipe = RECIPES.get(config.name)
    if recipe is None or not recipe.reported:
        return None
    own, original = config.flat(), recipe.config().flat()
    changes = [
        (key, own.get(key), original.get(key))
        for key in {**original, **own}
        if own.get(key) != original.get(key) and key not in _MATTERS_NOT
    ]
    return Quote(recipe.reported, changes)


def _length(config: Config) -> str:
    epochs = config.train.epochs
    if epochs is not None:
        return f"{epochs} epoch{'' if epochs == 1 else 's'}"
    return f"{len(config.phases)} phase{'' if len(config.phases) == 1 else 's'}"


def _gap(run: Run) -> list[tuple[str, float, float]]:
    """Sets of the same task beside the run's own: name, top-1, and what is lost to it.

    CIFAR-10.1 beside CIFAR-10 is what ReSet's tables call the gap.
    """
    if run.config.task != CLASSIFICATION or len(run.evaluations) < 2:
        return []
    own, *others = [(found.name, found.summary) for found in run.evaluations]
    return [
        (name, summary.results["top1"], own[1].results["top1"] - summary.results["top1"])
        for name, summary in others
        if summary.step_choice == own[1].step_choice and not name.endswith(BEST)
    ]


def _policies(run: Run) -> dict[str, Any]:
    """ReSet's Fig. 4 to 6; all empty for a network without controllers."""
    found: dict[str, Any] = {"evolution": policies.evolution(run), "deviations": None}
    found |= {"neighbours": [], "no_neighbours": "", "score_units": 0}
    if run.main is None:
        return found
    found["deviations"] = policies.deviations(run.main)
    if found["deviations"] is None:
        return found
    samples = run.main.samples
    assert isinstance(samples, Samples)
    names: list[str] = samples.components.tolist()
    found["score_units"] = policies.units(policies.components(names))
    try:
        found["neighbours"] = neighbours.draw(run, run.main)
    except (OSError, ValueError) as error:
        found["no_neighbours"] = str(error)
    return found


def _executed_steps(run: Run) -> dict[str, Any]:
    if run.main is None or not run.gated:
        return {"steps": None, "deviation": None}
    summary = run.main.summary
    return {
        "steps": step_histogram.draw(
            summary.steps_histogram, summary.mean_steps, run.expected_steps
        ),
        "deviation": step_histogram.deviation(summary.steps_histogram),
    }


def _examples(run: Run) -> dict[str, Any]:
    """The columns of images, `most_rows` above and below the line, or why there are none."""
    nothing = {"columns": [], "most_rows": 0, "no_images": ""}
    if run.main is None:
        return nothing
    try:
        columns = examples.columns(run, run.main)
    except (OSError, ValueError) as error:
        return nothing | {"no_images": str(error)}
    few = "" if columns else "No category has two images to compare."
    rows = max((len(column.easiest) for column in columns), default=0)
    return {"columns": columns, "most_rows": rows, "no_images": few}


def _restorations(run: Run) -> dict[str, Any]:
    """The images of denoising; `most_rows` is of the columns that it has not."""
    shown = restorations.restorations(run.main) if run.main else []
    return {"restorations": shown, "most_rows": 0}


# A line never breaks between a figure and its unit.
def _percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def _millions(multiply_adds: float) -> str:
    return f"{multiply_adds / 1e6:,.2f}\N{NO-BREAK SPACE}M"
