"""The numbers behind the figures, and where the curves lie."""

import re
from dataclasses import replace

import numpy as np
import pytest

from pipeline import configure
from pipeline.analysis import (
    contents,
    execution_rates,
    figure,
    learning_curves,
    phases,
    step_histogram,
)
from pipeline.analysis.execution_rates import Rate


@pytest.fixture(scope="module")
def run(make_run):
    return contents.read(make_run())


def heights(svg: str, style: str) -> list[float]:
    """Vertical coordinates at which the paths with this in their style begin."""
    found = re.findall(r'<path d="M [\d.]+ ([\d.]+) L [^"]*"[^>]*style="([^"]*)"', svg)
    return [float(y) for y, given in found if style in given]


def test_deviation_is_that_of_the_images():
    images = [0, 0, 2, 3, 3, 3]
    assert step_histogram.deviation((2, 0, 1, 3)) == pytest.approx(np.std(images))


def test_expected_steps_are_the_sum_of_the_targets_powers(run):
    assert run.expected_steps == pytest.approx(2 * (0.7 + 0.7**2))


def test_steps_become_epochs(run):
    epochs, values = run.series("eval/top1")
    assert epochs.tolist() == [1, 2, 3]
    assert values.tolist() == pytest.approx([14 / 18] * 3)
    assert [part.tolist() for part in run.series("no/such")] == [[], []]


def test_rates_in_numbers(run):
    """Training: of the third epoch alone, that is of steps 50 and 60."""
    rows = execution_rates.table(run)
    rates = run.main.summary.rates
    cells = list(rates)
    assert rows == [
        Rate(cell, step, pytest.approx(0.7**step), pytest.approx(step / 10 + 0.055), rate)
        for cell in cells
        for step, rate in enumerate(rates[cell], 1)
    ]


def test_rates_before_any_evaluation(make_run):
    rows = execution_rates.table(contents.read(make_run(tracked=False, evaluated=False)))
    assert [(row.training, row.evaluation) for row in rows] == [(None, None)] * 4


def test_a_phase_begins_after_the_one_before(run):
    values = {"name": "mine", "model": "reset38", "data": {"path": "nowhere"}}
    values |= {"train": {"epochs": None, "batch_size": 6}}
    values |= {"phases": [{"name": name, "steps": 2} for name in ("first", "second", "third")]}
    history = {"phase": [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)], "eval/top1": [(2, 0.5), (4, 0.7)]}
    rows = phases.table(replace(run, config=configure.build(values), history=history))
    assert [(row.first_step, row.last_step, row.top1) for row in rows] == [
        (1, 2, 0.5),
        (3, 4, 0.7),
        (None, None, None),
    ]


def shares(svg: str, style: str) -> list[float]:
    """The same heights as shares of the axis from 0 to 100 %, whose grid lines lie alone."""
    grid = heights(svg, "var(--grid)")
    horizontal = [y for y in grid if grid.count(y) == 1]
    zero, hundred = max(horizontal), min(horizontal)
    return [(zero - y) / (zero - hundred) for y in heights(svg, style)]


def test_targets_are_drawn_at_their_height(run):
    pictures = execution_rates.draw(run)
    assert len(pictures) == 2
    assert shares(pictures[0].svg, "stroke-dasharray") == pytest.approx([0.7, 0.49], abs=0.005)


def test_evaluated_rate_is_drawn_at_its_height(run):
    picture = execution_rates.draw(run)[0]
    rate = next(iter(run.main.summary.rates.values()))[1]
    drawn = shares(picture.svg, "stroke: var(--series-2); stroke-width: 1.5; stroke-linecap")
    assert drawn == pytest.approx([rate], abs=0.005)


def test_many_points_become_means_of_neighbours():
    x = np.arange(10.0 * figure.POINTS)
    few, means = figure.thin(x, x**2)
    assert len(few) == figure.POINTS
    assert few[0] == np.arange(10).mean()
    assert means[0] == (np.arange(10.0) ** 2).mean()
    assert means[-1] == (x[-10:] ** 2).mean()
    same, _ = figure.thin(x[:5], x[:5])
    assert same.tolist() == [0, 1, 2, 3, 4]


def test_loss_terms_are_all_named(run):
    svg = learning_curves.draw(run)[0].svg
    names = ("all terms", "cross entropy", "execution rate", "cross entropy, evaluation")
    assert [name for name in names if f">{name}</text>" not in svg] == []


def test_one_loss_term_is_drawn_once(make_run):
    svg = learning_curves.draw(contents.read(make_run("resnet20")))[0].svg
    assert ">cross entropy</text>" in svg
    assert ">all terms</text>" not in svg


def test_equal_learning_rates_share_a_curve_and_small_numbers_stay(run):
    svg = learning_curves.draw(run)[2].svg
    assert ">gate, rest</text>" in svg
    assert ">0.0005</text>" in svg


def test_accuracy_is_drawn_in_percent(run):
    """Of 77.8 and 100 %, over three epochs."""
    ticks = re.findall(r">([\d.]+)</text>", learning_curves.draw(run)[1].svg)
    assert max(float(tick) for tick in ticks) == 100
