"""A ReSet network the whole way: two phases, CIFAR-10.1 beside CIFAR-10, routes and report."""

import re
from pathlib import Path

import numpy as np
import pytest

from data_prep.sources.cifar10_1 import CLASSES, DATA, LABELS
from pipeline.recipes import load
from tests.data import shard_set
from tests.jobs.command import reprise


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reset")
    for split, count in (("train", 40), ("test", 20)):
        for number in range(count):
            file = folder / "images" / split / CLASSES[number % 10] / f"{number:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(shard_set.encode(shard_set.picture(number, 32, 32), "png"))
    source = folder / "published"
    source.mkdir()
    images = np.stack([shard_set.picture(100 + number, 32, 32) for number in range(20)])
    np.save(source / DATA, images)
    np.save(source / LABELS, np.arange(20) % 10)
    for arguments in (
        ["prep", "cifar", "--source", "images", "--out", "cifar10"],
        ["prep", "cifar10.1", "--source", "published", "--out", "cifar10.1"],
        ["verify", "cifar10.1"],
        [
            *("train", "reset/cifar10/gsm-controller", "init_from=null", "model=reset_3x2"),
            *("data.path=cifar10", "data.augment={size: 8, eval_resize: 8}", "data.reader=torch"),
            *("train.batch_size=20", "phases.0.steps=3", "train.log_every=1", "--run", "run"),
        ],
    ):
        done = reprise(*arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def test_a_second_test_set_stands_beside_the_first(finished: Path) -> None:
    answer = reprise("eval", "run", "--data", "cifar10.1", "--quiet", cwd=finished)
    assert answer.returncode == 0, answer.stderr
    assert "20 (test)" in answer.stdout
    assert reprise("report", "run", cwd=finished).returncode == 0
    page = (finished / "run" / "report.html").read_text()
    assert re.search(r"Gap to cifar10\.1-test: -?\d+\.\d\d points, \d+\.\d\d % there", page)
    for section in ('id="phases"', 'id="policies"', "Images with similar routes"):
        assert section in page
    assert "1 to 3" in page
    assert page.count('<table class="neighbours">') == 1
    assert page.count("<tr><td><img") == 6


def test_routes_are_written_with_their_keys(finished: Path) -> None:
    answer = reprise("embed", "run", "--quiet", cwd=finished)
    assert answer.returncode == 0, answer.stderr
    with np.load(finished / answer.stdout.strip(), allow_pickle=False) as found:
        routes, components = found["routes"], found["components"].tolist()
        assert len(set(found["keys"].tolist())) == 20
        assert sorted(found["labels"].tolist()) == sorted([*range(10)] * 2)
    assert routes.shape == (20, 2 * 4)
    assert components[:4] == [f"stages.0.pool/1/{unit}" for unit in (1, 2, 3, 4)]
    np.testing.assert_allclose(routes.reshape(20, 2, 4).sum(2), 1, rtol=1e-5)


def test_a_network_without_controllers_has_no_routes(finished: Path, tmp_path: Path) -> None:
    config = load("drnn/digits/dr_resnet16")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text(config.to_yaml())
    answer = reprise("embed", "other", cwd=tmp_path)
    assert answer.returncode == 2
    assert "model=dr_resnet16, which has no controllers" in answer.stderr


def test_the_plan_shows_the_phases(finished: Path) -> None:
    answer = reprise(
        *("train", "reset/cifar10/gst-relaxed-controller", "data.path=cifar10"),
        *("train.batch_size=20", "--dry-run"),
        cwd=finished,
    )
    assert "phase gumbel: controller for 5,000 steps, adam, staircase schedule" in answer.stdout
    assert "phase straight through: controller for at most 20,000 steps" in answer.stdout
