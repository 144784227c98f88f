"""A ReSet network the whole way: two phases, CIFAR-10.1 beside CIFAR-10, routes and report."""

import re
from pathlib import Path

import numpy as np
import pytest

from data_prep.prepare import prepare
from data_prep.sources import open_source
from data_prep.sources.cifar10_1 import CLASSES, DATA, LABELS
from jobs import describe
from jobs.tasks import Train
from jobs.trained import Embed, Evaluate
from pipeline import recipes
from pipeline.analysis import report
from pipeline.run_directory import RunDirectory
from pipeline.tracking import Tracker
from pipeline.training.plan import plan
from tests.data import shard_set
from tests.jobs.command import PATIENCE, reprise
from tests.jobs.launchers import REPRISE, TORCHRUN, start


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, `run`, and of the sets `cifar10` and `cifar10.1`."""
    folder = tmp_path_factory.mktemp("reset")
    for split, count in (("train", 40), ("test", 20)):
        for number in range(count):
            file = folder / "images" / split / CLASSES[number % 10] / f"{number:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(shard_set.encode(shard_set.picture(number, 32, 32), "png"))
    source = folder / "published"
    source.mkdir()
    np.save(source / DATA, np.stack([shard_set.picture(100 + n, 32, 32) for n in range(20)]))
    np.save(source / LABELS, np.arange(20) % 10)
    prepare(open_source("cifar", folder / "images"), folder / "cifar10")
    prepare(open_source("cifar10.1", source), folder / "cifar10.1")
    small = ["data.augment={size: 8, eval_resize: 8}", "train.batch_size=20", "train.log_every=1"]
    config = recipes.load(
        "reset/cifar10/gsm-controller",
        [
            *("init_from=null", "model=reset_3x2", "phases.0.steps=3"),
            *(f"data.path={folder / 'cifar10'}", "data.reader=torch", *small),
        ],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "start", lambda self: None)
        patch.setattr(Tracker, "finish", lambda self, status: True)
        assert Train(config, folder / "run", quiet=True)() == 0
    return folder


def test_a_second_test_set_stands_beside_the_first(finished: Path) -> None:
    ((summary, _),) = Evaluate(finished / "run", data=finished / "cifar10.1", quiet=True)()
    assert (summary.samples, summary.split) == (20, "test")
    page = " ".join(report.write(RunDirectory(finished / "run")).read_text().split())
    assert re.search(r"Gap to [\w.-]*cifar10\.1-test: -?\d+\.\d\d points, \d+\.\d\d % there", page)
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


def test_of_several_ranks_one_writes_the_routes(finished: Path) -> None:
    process = start([*TORCHRUN, REPRISE, "embed", "run", "--out", "all.npz", "--quiet"], finished)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert output.count("all.npz") == 1, output
    with np.load(finished / "all.npz", allow_pickle=False) as found:
        assert len(set(found["keys"].tolist())) == 20  # of both ranks


def test_a_network_without_controllers_has_no_routes(tmp_path: Path) -> None:
    config = recipes.load("drnn/digits/dr_resnet16")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(ValueError, match="model=dr_resnet16, which has no controllers"):
        Embed(Evaluate(tmp_path))()


def test_the_plan_shows_the_phases(finished: Path) -> None:
    overrides = [f"data.path={finished / 'cifar10'}", "train.batch_size=20"]
    config = recipes.load("reset/cifar10/gst-relaxed-controller", overrides)
    shown = describe.plan(plan(config, world_size=1))
    assert "2 phases, epochs of 2 steps" in shown
    assert "phase gumbel: controller for 5,000 steps, adam, staircase schedule" in shown
    assert "phase straight through: controller for at most 20,000 steps" in shown
