"""Blocks switched off, and where representations go (Relaxed sharing, Sec. 4.3 and 4.4)."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jobs.trained import Ablate, Trajectories
from pipeline import configure
from pipeline.analysis import ablation, trajectories
from pipeline.analysis.levels import Block, blocks
from pipeline.data import Batch
from pipeline.models import create_model
from pipeline.models.norms import Step
from pipeline.tracking import Tracker
from tests.training.conftest import train

SIDE, N = 16, 24


def network(name="rs_3_all", **options):
    torch.manual_seed(0)
    model = create_model(name, **options)
    model(torch.randn(16, 3, SIDE, SIDE))  # statistics that are not those of the start
    return model.eval()


def batches(sizes=(10, 14)):
    torch.manual_seed(1)
    for size in sizes:
        images, labels = torch.randn(size, 3, SIDE, SIDE), torch.randint(10, (size,))
        yield Batch(images, labels, tuple(map(str, range(size))))


@pytest.mark.parametrize(
    ("name", "level", "expected"),
    [
        ("rs_3", 2, [("stages.1.1", 0), ("stages.1.2", 0), ("stages.1.3", 0)]),
        ("rs_3_all", 2, [("stages.1.1", 0), ("stages.1.1", 1), ("stages.1.1", 2)]),
        ("rs_3_all", 1, [("stages.0.0", 0), ("stages.0.0", 1), ("stages.0.0", 2)]),
        ("resnet20", 3, [("stages.2.1", 0), ("stages.2.2", 0)]),
        ("rc_r4", 2, [("stages.1.1", 0), ("stages.1.1", 1), ("stages.1.1", 2)]),
    ],
)
def test_blocks_are_what_the_identity_can_stand_for(name, level, expected):
    assert blocks(create_model(name), level, SIDE) == [Block(*place) for place in expected]


@pytest.mark.parametrize(
    ("name", "level", "message"),
    [
        ("rs_3", 4, "level 4: this network has the levels 1 to 3"),
        ("rs_3", 0, "level 0: this network has the levels 1 to 3"),
        ("dr_resnet16", 2, r"stages\.1\.1 is gated.*: give a run of .* without gates"),
        ("mobilenet_v2", 2, r"stages\.1\.0 has no shortcut.*: give a run of a residual network"),
        ("reset38", 2, "this network has no stages, and so no levels: give a run of a residual"),
    ],
)
def test_what_no_identity_can_stand_for_is_refused(name, level, message):
    with pytest.raises(ValueError, match=message):
        blocks(create_model(name), level, SIDE)


@pytest.mark.parametrize(
    ("name", "message"), [("rcnn160", "has no stages"), ("dr_resnet16", r"stages\.1\.1 is gated")]
)
def test_trajectories_need_levels_that_every_image_passes(name, message):
    with pytest.raises(ValueError, match=message):
        trajectories.collect(create_model(name), batches(), SIDE)


@torch.no_grad()
def as_told(model):
    """Batches whose labels are what the whole network says, so that every change is an error."""
    for batch in batches():
        yield Batch(batch.images, model(batch.images).logits.argmax(1), batch.keys)


@torch.no_grad()
def wrong_without(model, off, batch, survival):
    """The forward pass by hand, with steps of the middle level left out."""
    x = F.relu(model.norm(model.stem(batch.images)))
    for number, stage in enumerate(model.stages):
        for index, recursive in enumerate(stage):
            for step in range(recursive.steps):
                if number == 1 and index == 1 and step in off:
                    continue
                cell = recursive.cell
                weight = 1.0 if survival is None else recursive.router.survival[step]
                x = (cell.shortcut(x) + weight * cell.residual(x, Step(step))).relu()
    predicted = model.classifier(x.mean((2, 3))).argmax(1)
    return int((predicted != batch.labels).sum())


@pytest.mark.parametrize("death_rate", [None, 0.5])
def test_ablation_is_the_forward_pass_with_blocks_left_out(death_rate):
    model = network(death_rate=death_rate)
    told = [*as_told(model)]
    expected = {
        off: sum(wrong_without(model, off, batch, death_rate) for batch in told) / N
        for off in [(), (0,), (1,), (2,), (1, 2), (0, 1), (0, 1, 2)]
    }
    found = ablation.ablate(model, told, run="mine", level=2, size=SIDE, images=None)
    assert found.images == N
    assert found.top_to_bottom == [expected[off] for off in [(), (2,), (1, 2), (0, 1, 2)]]
    assert found.bottom_to_top == [expected[off] for off in [(), (0,), (0, 1), (0, 1, 2)]]
    assert found.single == [expected[off] for off in [(0,), (1,), (2,)]]
    assert expected[()] == 0
    assert len({*expected.values()}) > 2


def test_only_the_first_images_are_taken_where_so_many_are_asked_for():
    model = network()
    first, second = batches()
    wrong = wrong_without(model, (), first, None)
    wrong += wrong_without(model, (), Batch(second.images[:2], second.labels[:2], ()), None)
    found = ablation.ablate(model, batches(), run="mine", level=2, size=SIDE, images=12)
    assert found.images == 12
    assert found.single
    assert found.top_to_bottom[0] == wrong / 12


def test_trajectories_are_the_inputs_and_outputs_of_the_blocks(monkeypatch):
    monkeypatch.setattr(trajectories, "IMAGES", 12)
    model = network()
    points, labels = trajectories.collect(model, batches(), SIDE)
    first, second = batches()
    assert labels.tolist() == [*first.labels.tolist(), *second.labels[:2].tolist()]
    assert {level: found.shape for level, found in points.items()} == {
        1: (12, 4, 16 * 16 * 16),
        2: (12, 4, 32 * 8 * 8),
        3: (12, 4, 64 * 4 * 4),
    }
    with torch.no_grad():
        x = F.relu(model.norm(model.stem(first.images)))
        after = model.stages[0][0].cell(x, Step(0))
    np.testing.assert_allclose(points[1][:10, 0], x.flatten(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(points[1][:10, 1], after.flatten(1), rtol=1e-5, atol=1e-5)


def test_without_the_drift_the_mean_image_does_not_move():
    rng = np.random.default_rng(0)
    own = rng.normal(size=(20, 1, 40)) + 0.1 * rng.normal(size=(20, 6, 40)).cumsum(1)
    drift = np.linspace(0, 30, 6)[None, :, None] * rng.normal(size=40)
    points = (own + drift).astype(np.float32)
    moved = trajectories.project(points, drift=True).mean(0)
    assert np.abs(moved[-1] - moved[0]).max() > 50
    assert np.abs(trajectories.project(points, drift=False).mean(0)).max() < 1e-3
    assert np.array_equal(
        trajectories.project(points, drift=True), trajectories.project(points, drift=True)
    )


def test_both_are_drawn_from_a_run(shards, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Tracker, "start", lambda self: None)
    monkeypatch.setattr(Tracker, "finish", lambda self, status: True)
    values = {
        "name": "small",
        "model": "rs_3_all",
        "data": {
            "path": str(shards.root),
            "augment": {"crop": "random_resized", "size": SIDE, "eval_resize": SIDE},
        },
        "train": {"epochs": 1, "batch_size": 6},
    }
    for name in ("first", "second"):
        assert train(configure.build(values), tmp_path / name, stop_after=1) == 0
    with pytest.raises(ValueError, match="call `reprise ablate` on that run first"):
        Ablate(tmp_path / "first", level=2, beside=(tmp_path / "second",), quiet=True)()
    Ablate(tmp_path / "second", level=2, images=5, quiet=True)()
    drawn = Ablate(tmp_path / "first", level=2, beside=(tmp_path / "second",), quiet=True)()
    assert drawn.read_bytes().startswith(b"\x89PNG")
    found = ablation.Ablation.load(drawn.parent)
    assert (found.run, found.level, found.images) == ("first", 2, 18)
    picture = Trajectories(tmp_path / "first")()
    assert picture.read_bytes().startswith(b"\x89PNG")
    points = np.load(picture.with_suffix(".npz"))
    assert points["level-2"].shape == points["level-3-without-drift"].shape == (18, 4, 2)
    assert len(points["labels"]) == 18
