"""The curve of a cost-adjustable network: which points it has, and where they are drawn."""

import re
from dataclasses import replace

import pytest

from pipeline import evaluate
from pipeline.analysis import contents, cost_accuracy, report
from pipeline.analysis.cost_accuracy import Point

COSTS = {2: 100e6, 3: 180e6, 4: 200e6}
TOP1 = {2: 0.72, 3: 0.76, 4: 0.8}


def adjustable(make_run, shards, name="first", model="rc_r2", choices=(2, 3, 4), top1=TOP1):
    """A run with an evaluation at each number of steps."""
    directory = make_run(model, name=name)
    own = directory.evaluation_of(shards)
    summary, samples = evaluate.load(own)
    for steps in choices:
        found = replace(summary, step_choice=steps, top1=top1[steps], multiply_adds=COSTS[steps])
        fewer = None if steps == max(choices) else steps
        evaluate.save(directory.evaluation_of(shards, fewer_steps=fewer), found, samples)
    return directory


def test_points_are_those_of_the_evaluations(make_run, shards):
    run = contents.read(adjustable(make_run, shards))
    assert cost_accuracy.points(run) == [
        Point(2, 100e6, 0.72, 0.5, pytest.approx(0.9)),
        Point(3, 180e6, 0.76, 0.9, pytest.approx(0.95)),
        Point(4, 200e6, 0.8, 1.0, 1.0),
    ]
    assert run.main.summary.step_choice == 4


def test_points_of_other_weights_and_other_sets_are_left_out(make_run, shards):
    directory = adjustable(make_run, shards)
    folder = directory.evaluation_of(shards, fewer_steps=2)
    summary, samples = evaluate.load(folder)
    evaluate.save(folder, replace(summary, step=summary.step - 1), samples)
    other = directory.evaluation / f"{directory.evaluation_of(shards).name}2-3-steps"
    evaluate.save(other, replace(summary, step_choice=3, top1=0.1), samples)
    points = cost_accuracy.points(contents.read(directory))
    assert [(point.steps, point.top1) for point in points] == [(3, 0.76), (4, 0.8)]


def test_networks_without_choice_have_no_curve(make_run):
    for model in ("resnet20", "dr_resnet16"):
        run = contents.read(make_run(model))
        assert cost_accuracy.points(run) == cost_accuracy.draw([run]) == []
    assert cost_accuracy.points(contents.read(make_run(evaluated=False))) == []


def ticks(svg: str) -> list[float]:
    return [float(text) for text in re.findall(r">([\d.]+)</text>", svg)]


def test_one_run_is_drawn_in_its_own_units(make_run, shards):
    (picture,) = cost_accuracy.draw([contents.read(adjustable(make_run, shards))])
    curve = re.search(
        r'<path d="M ([\d.]+) ([\d.]+) L ([\d.]+) ([\d.]+) L ([\d.]+) ([\d.]+)[^>]*series-1',
        picture.svg,
    )
    x1, y1, x2, y2, x3, y3 = map(float, curve.groups())
    assert (x2 - x1) / (x3 - x1) == pytest.approx(0.8, abs=0.01)
    assert (y1 - y2) / (y1 - y3) == pytest.approx(0.5, abs=0.01)
    assert {2, 3, 4} <= set(ticks(picture.svg)), "points are named by their steps"


def test_a_baseline_is_drawn_beside_it_relative_to_its_own_largest(make_run, shards):
    own = contents.read(adjustable(make_run, shards))
    worse = {2: 0.4, 3: 0.6, 4: 0.8}
    exits = adjustable(make_run, shards, "exits", "rc_early_exit", top1=worse)
    pictures = cost_accuracy.draw([own, contents.read(exits)])
    assert [picture.name for picture in pictures] == ["cost-accuracy", "cost-accuracy-relative"]
    for picture in pictures:
        assert "var(--series-1)" in picture.svg
        assert "var(--series-2)" in picture.svg
    assert max(ticks(pictures[1].svg)) == 100
    assert cost_accuracy.points(contents.read(exits))[0].top1_share == pytest.approx(0.5)


def test_a_run_without_curve_beside_it_is_refused(make_run, shards):
    own = contents.read(adjustable(make_run, shards))
    plain = contents.read(make_run("resnet20", name="plain"))
    for runs in ([own, plain], [plain, own]):
        with pytest.raises(ValueError, match=r"plain has no cost-accuracy curve.*RUN --steps"):
            cost_accuracy.draw(runs)


def test_the_page_shows_curve_and_numbers(make_run, shards):
    directory = adjustable(make_run, shards)
    page = report.write(directory).read_text()
    assert 'id="costs"' in page
    assert page.count("cost-accuracy") > 0
    rows = re.findall(r"<tr><td>first</td><td>(\d)</td><td>([\d.]+)\s%</td>", page)
    assert rows == [("2", "72.00"), ("3", "76.00"), ("4", "80.00")]
    headline = page.split('id="accuracy"')[0]
    assert "80.00\N{NO-BREAK SPACE}%" in headline, "it is of the largest number of steps"
    beside = adjustable(make_run, shards, "exits", "rc_early_exit")
    both = report.write(directory, [beside]).read_text()
    assert len(re.findall(r"<tr><td>exits</td>", both)) == 3
    key = re.findall(r'series-(\d)\)"></i>(\w+)</span>', both.split('id="costs"')[1])
    assert key[:2] == [("1", "first"), ("2", "exits")]
    assert 'id="costs"' not in report.write(make_run()).read_text()
