"""What the figures draw, read back from their axes."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from pipeline.analysis import (
    ablation,
    contents,
    cost_accuracy,
    learning_curves,
    policies,
    step_histogram,
    trajectories,
)
from pipeline.analysis.contents import Evaluation
from pipeline.training.relaxation import SAFE_ANGLE


@pytest.fixture(scope="module")
def run(make_run):
    return contents.read(make_run())


@pytest.fixture
def drawn(monkeypatch):
    """The figures, in the order in which they are saved."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **options):
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def curves(axes):
    """The points of each."""
    return [[(float(x), float(y)) for x, y in line.get_xydata()] for line in axes.lines]


def test_ablation_is_in_percent_and_blocks_count_from_one(tmp_path, drawn):
    """Relaxed sharing, Fig. 3."""
    found = ablation.Ablation("mine", 2, 10, [0.1, 0.3, 0.5], [0.1, 0.2, 0.5], [0.2, 0.4])
    ablation.draw(tmp_path / "ablation.png", [found])
    (figure,) = drawn
    assert [curves(axes) for axes in figure.axes] == [
        [[(0, 10), (1, 30), (2, 50)]],
        [[(0, 10), (1, 20), (2, 50)]],
        [[(1, 20), (2, 40)]],
    ]


def test_trajectories_are_where_they_are(tmp_path, drawn):
    """Relaxed sharing, Fig. 4 and 5: dots, and arrows from each to the next."""
    drifting = np.array([[[0, 1], [2, 5], [3, 3]]], np.float32)
    staying = drifting + 10
    projected = {(1, True): drifting, (1, False): staying}
    trajectories.draw(tmp_path / "trajectories.png", projected, np.array([0]), ["a"])
    (figure,) = drawn
    upper, lower = figure.axes
    for axes, (track,), word in ((upper, drifting, "with"), (lower, staying, "without")):
        assert axes.get_title(loc="left") == f"level 1, {word} the drift"
        assert np.array_equal(axes.lines[0].get_xydata(), track)
        (arrows,) = axes.collections
        assert np.array_equal(arrows.XY, track[:-1])
        assert np.array_equal(np.stack([arrows.U, arrows.V], 1), np.diff(track, axis=0))


def test_cost_and_accuracy_are_in_their_units(run, drawn):
    """RC Fig. 7: of several runs also relative to their own at the largest cost."""
    summary = replace(run.main.summary, step_choice=3, multiply_adds=200e6, top1=0.5)
    largest = replace(run.main, summary=summary)
    summary = replace(summary, step_choice=2, multiply_adds=100e6, top1=0.375)
    smaller = replace(largest, name=f"{largest.name}-2-steps", summary=summary)
    own = replace(run, evaluations=(largest, smaller))
    cost_accuracy.draw([own, own])
    absolute, relative = (figure.axes[0] for figure in drawn)
    assert curves(absolute) == [[(100, 37.5), (200, 50)]] * 2
    assert curves(relative) == [[(50, 75), (100, 100)]] * 2


def test_the_histogram_marks_the_mean_and_the_target(drawn):
    step_histogram.draw((1, 2, 3), mean=1.25, expected=1.75)
    mean, target = drawn[0].axes[0].lines
    assert set(mean.get_xdata()) == {1.25}
    assert mean.get_label() == "mean 1.25"
    assert set(target.get_xdata()) == {1.75}


def test_accuracy_is_in_percent(run, drawn):
    points = {"eval/top1": [(1, 0.25), (2, 0.75)], "epoch": [(1, 1.0), (2, 2.0)]}
    learning_curves.draw(replace(run, history=points))
    (figure,) = drawn
    assert curves(figure.axes[0]) == [[(1, 25), (2, 75)]]


def test_the_line_among_the_angles_is_where_consolidation_is_safe(run, drawn):
    """Relaxed sharing, Sec. 3.1."""
    points = {"angle/a": [(1, 80.0), (2, 0.5)], "epoch": [(1, 1.0), (2, 2.0)]}
    learning_curves.draw(replace(run, history=points))
    (figure,) = drawn
    *_, line = figure.axes[0].lines
    assert set(line.get_ydata()) == {SAFE_ANGLE} == {1}
    assert line.get_label() == "1 degree"


def test_scores_are_in_the_panel_of_their_pool_and_iteration(run, drawn):
    """ReSet Fig. 6."""
    pools, iterations, units = (0, 1), (1, 2), (1, 2)
    points = {
        f"train/score/stages.{pool}.pool/{iteration}/{unit}": [
            (1, pool + iteration / 10 + unit / 100)
        ]
        for pool in pools
        for iteration in iterations
        for unit in units
    }
    policies.evolution(replace(run, history=points | {"epoch": [(1, 1.0)]}))
    (figure,) = drawn
    heights = [[y for ((_, y),) in curves(axes)] for axes in figure.axes]
    assert heights == [
        pytest.approx([pool + iteration / 10 + unit / 100 for unit in units])
        for pool in pools
        for iteration in iterations
    ]


def test_deviations_are_those_of_the_images(run, drawn):
    """ReSet Fig. 4."""
    routes = np.array([[0.1, 0.45], [0.5, 0.25], [0.3, 0.35]], np.float32)
    names = np.array(["stages.0.pool/1/1", "stages.0.pool/1/2"])
    samples = replace(run.main.samples, routes=routes, components=names)
    policies.deviations(Evaluation("set-test", run.main.summary, samples))
    (figure,) = drawn
    bars = figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx(routes.std(0))


def test_a_run_that_has_only_begun_has_points_to_see(run, drawn):
    begun = replace(run, history={name: points[:1] for name, points in run.history.items()})
    learning_curves.draw(begun)
    lines = [line for figure in drawn for axes in figure.axes for line in axes.lines]
    assert len(lines) > 3
    assert all(line.get_marker() == "o" for line in lines)
