"""A denoising run from plan to page: what is refused, that it resumes exactly, what it shows."""

import re
import shutil
from pathlib import Path

import pytest

from jobs import describe
from jobs.trained import Evaluate
from pipeline import configure
from pipeline.analysis import report
from pipeline.config import Config, ConfigError
from pipeline.run_directory import RunDirectory
from pipeline.tasks import denoising
from pipeline.tracking import history
from pipeline.training.checkpoint import find
from pipeline.training.plan import plan
from tests.training.conftest import trace, train

pytestmark = pytest.mark.usefixtures("journal_only")


@pytest.fixture
def tiny_denoiser(bsd_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """16 images twice an epoch in batches of 8: four steps an epoch, two epochs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    values = {
        "name": "tiny",
        "model": "rc_r3_2",
        "data": {
            "path": str(bsd_shards),
            "sigma": 25,
            "repeats": 2,
            "augment": {"crop": "pad", "padding": 0, "size": 24, "flip": True, "rotate": True},
        },
        "optimizer": {"name": "adam", "lr": 0.002, "groups": {"shared": {"lr_factor": 0.5}}},
        "train": {"epochs": 2, "batch_size": 8, "log_every": 1},
    }
    return configure.build(values)


def changed(base: Config, *overrides: str) -> Config:
    return configure.build(base.model_dump(mode="json"), overrides)


@pytest.mark.parametrize("sigma", ["0", "-5", "nan", ".inf", "text"])
def test_a_noise_level_that_is_none_is_refused(tiny_denoiser: Config, sigma: str) -> None:
    with pytest.raises(ConfigError, match=r"data.sigma=.*(greater than 0|finite|valid number)"):
        changed(tiny_denoiser, f"data.sigma={sigma}")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.augment.photometric=true", "augment.photometric=true with sigma=25: .*leave it out"),
        ("data.augment.eval_resize=64", "augment.eval_resize=64 with sigma=25: .*leave it out"),
        ("data.repeats=0", "data.repeats=0"),
    ],
)
def test_what_makes_no_sense_for_denoising_is_refused(
    tiny_denoiser: Config, override: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        changed(tiny_denoiser, override)


def test_network_set_and_noise_must_be_of_one_task(tiny_denoiser: Config, shards: Path) -> None:
    labelled = f"data.path={shards}"
    cases = {
        (
            labelled,
        ): "model=rc_r3_2 is for denoising and .* is a set for classification: .*prep bsd",
        ("model=resnet20", "optimizer.groups={}", "data.sigma=null"): (
            "model=resnet20 is for classification and .* is a set for denoising: .*prep folder"
        ),
        ("data.sigma=null",): "model=rc_r3_2 removes noise and none is given: .*data.sigma=25",
        (labelled, "model=resnet20", "optimizer.groups={}"): (
            "data.sigma=25 with model=resnet20, .*: leave data.sigma out, or .*rc_r3_4"
        ),
    }
    for overrides, words in cases.items():
        with pytest.raises(ConfigError, match=words):
            plan(changed(tiny_denoiser, *overrides), 1)
    assert plan(tiny_denoiser, 1).steps_per_epoch == 4


@pytest.mark.parametrize(
    "variant", [[], ["data.reader=torch", "data.workers=0", "train.precision=bf16"]], ids=str
)
def test_it_resumes_in_the_middle_of_an_epoch_bit_by_bit(
    tiny_denoiser: Config, tmp_path: Path, variant: list[str]
) -> None:
    wanted = changed(tiny_denoiser, *variant)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(wanted, whole) == 0
    assert train(wanted, halves, stop_after=6) == 0
    stopped = trace(halves)
    assert train(wanted, halves) == 0
    assert trace(halves) == trace(whole)
    assert trace(halves).weights != stopped.weights


def test_two_ranks_train_and_evaluate(tiny_denoiser: Config, tmp_path: Path) -> None:
    wanted = changed(tiny_denoiser, "train.zero_stage=1", "train.epochs=1")
    assert train(wanted, tmp_path / "run", nproc=2) == 0
    ((summary, _),) = Evaluate(tmp_path / "run", quiet=True)()
    assert isinstance(summary, denoising.Summary)
    (told,) = history(tmp_path / "run")["eval/psnr"]
    assert told == (4, pytest.approx(summary.psnr, abs=1e-4))


@pytest.fixture
def finished(tiny_denoiser: Config, tmp_path: Path) -> Path:
    assert train(tiny_denoiser, tmp_path / "run") == 0
    return tmp_path / "run"


def test_metrics_of_a_run(finished: Path) -> None:
    points = history(finished)
    assert [step for step, _ in points["eval/psnr"]] == [4, 8]
    assert [step for step, _ in points["train/psnr"]] == list(range(1, 9))
    assert points["train/loss"] == points["train/squared_error"]
    (_, first), (_, second) = points["eval/noisy_psnr"]
    assert first == second
    for lr, shared in zip(points["lr/rest"], points["lr/shared"], strict=True):
        assert shared[1] == pytest.approx(lr[1] / 2)
    assert not [name for name in points if "top1" in name or "cross_entropy" in name]
    best = find(finished / "checkpoints", best=True)
    assert best.score == max(value for _, value in points["eval/psnr"])


def test_evaluation_of_another_split_and_of_another_set(
    finished: Path, bsd_shards: Path, shards: Path, tmp_path: Path
) -> None:
    ((own, folder),) = Evaluate(finished, quiet=True)()
    assert (own.split, own.samples, folder.name) == ("test", 5, "bsd-test")
    ((further, folder),) = Evaluate(finished, split="set12", quiet=True)()
    assert (further.split, further.samples, folder.name) == ("set12", 2, "bsd-set12")
    table = describe.summary(further)
    assert re.search(r"images +2 \(set12\)\nPSNR +\d+\.\d\d dB\nof the noisy images +2\d", table)
    assert "top-1" not in table
    shutil.copytree(bsd_shards, tmp_path / "again")
    ((again, folder),) = Evaluate(finished, data=Path("again"), quiet=True)()
    assert again.metrics()["eval/psnr"] == own.metrics()["eval/psnr"]
    assert folder.name == "again-test"
    with pytest.raises(ConfigError, match=r"is for denoising and .* is a set for classification"):
        Evaluate(finished, data=shards, quiet=True)()
    with pytest.raises(ValueError, match=r"no split 'val' .*use \['set12', 'test', 'train'\]"):
        Evaluate(finished, split="val", quiet=True)()


def test_the_page_is_of_denoising(finished: Path) -> None:
    ((further, _),) = Evaluate(finished, split="set12", quiet=True)()
    page = report.write(RunDirectory(finished)).read_text()
    text = " ".join(re.sub(r"<[^>]+>", " ", page.split("<main>")[1]).split())
    (_, last) = history(finished)["eval/psnr"][-1]
    (_, noisy) = history(finished)["eval/noisy_psnr"][-1]
    assert f"{last:.2f} dB PSNR, mean over 5 test images" in text
    assert f"{noisy:.2f} dB PSNR of the noisy images, sigma 25 of 255" in text
    assert f"bsd-set12 8 2 {further.metrics()['eval/psnr']:.2f} dB" in text
    assert ">training patches</text>" in page
    assert ">half the squared error of a patch</text>" in page
    assert page.count('src="data:image/png') == 3 * denoising.EXAMPLES
    assert "test-00000000" in text
    for word in ("top-1", "Accuracy", "classes", "cross entropy", "category", "gates", "hardest"):
        assert word not in text, word
    assert len(page) < 1_000_000
    first = report.write(RunDirectory(finished)).read_bytes()
    assert report.write(RunDirectory(finished)).read_bytes() == first


def test_a_page_before_the_first_evaluation(tiny_denoiser: Config, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "begun")
    directory.claim(tiny_denoiser)
    directory.release()
    page = report.write(directory).read_text()
    assert page.count("Not evaluated yet") == 2
    assert "<img" not in page
    shutil.rmtree(tmp_path / "begun")


def test_the_page_needs_no_shard_set(finished: Path, tmp_path: Path, bsd_shards: Path) -> None:
    file = finished / "config.yaml"
    file.write_text(file.read_text().replace(str(bsd_shards), str(tmp_path / "gone")))
    page = report.write(RunDirectory(finished)).read_text()
    assert page.count('src="data:image/png') == 3 * denoising.EXAMPLES
    assert "holds no manifest.json" in page
