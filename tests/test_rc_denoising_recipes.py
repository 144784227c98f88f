"""The recipes of the RC paper for denoising: its settings, and that each can be trained."""

import itertools
from pathlib import Path

import pytest

from data_prep.manifest import Manifest
from pipeline import recipes
from pipeline.data import BatchPlan
from pipeline.models import list_models
from pipeline.recipes import RECIPES, rc_denoising
from pipeline.training.plan import plan
from pipeline.training.schedules import factor
from tests.training.conftest import train

NAMES = list(rc_denoising.RECIPES)
SHORT = [name for name in NAMES if name.endswith("-short")]
FULL = [name for name in NAMES if name not in SHORT]
SETTINGS = {
    "train.epochs": 50,
    "train.batch_size": 128,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.1,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 1e-4,
    "data.augment.crop": "pad",
    "data.augment.padding": 0,
    "data.augment.size": 40,
    "data.augment.flip": True,
    "data.augment.rotate": True,
    "data.augment.photometric": False,
}


def test_every_network_and_noise_level_has_a_recipe() -> None:
    wanted = {
        f"rc/denoising/{network.removeprefix('rc_')}-sigma{sigma}"
        for network in list_models("rc_*3_*")
        for sigma in (15, 25, 50)
    }
    ablation = {
        f"rc/denoising/r3_4-{norm}-sigma{sigma}"
        for norm in ("none", "shared")
        for sigma in (15, 25, 50)
    }
    assert set(FULL) == wanted | ablation
    assert SHORT == ["rc/denoising/r3_1-sigma25-short", "rc/denoising/r3_4-sigma25-short"]


def test_the_figures_are_those_of_table_3() -> None:
    figures = {
        name.removeprefix("rc/denoising/"): RECIPES[name].reported
        for name in NAMES
        if RECIPES[name].reported
    }
    assert figures == {
        "r3_4-sigma15": "31.61 dB, Table 3",
        "r3_4-sigma25": "29.07 dB, Table 3",
        "r3_4-sigma50": "26.06 dB, Table 3",
        "r3_4-none-sigma15": "31.36 dB, Table 3",
        "r3_4-none-sigma25": "28.78 dB, Table 3",
        "r3_4-none-sigma50": "25.77 dB, Table 3",
        "r3_4-shared-sigma15": "no convergence, Table 3",
        "r3_4-shared-sigma25": "no convergence, Table 3",
        "r3_4-shared-sigma50": "17.54 dB, Table 3",
    }


@pytest.mark.parametrize("name", FULL)
def test_the_settings_are_the_papers(name: str) -> None:
    config = recipes.load(name)
    flat = config.flat()
    assert {key: flat[key] for key in SETTINGS} == SETTINGS
    assert flat["name"] == name
    assert f"sigma{flat['data.sigma']:g}" in name
    network, norm = flat["model"].removeprefix("rc_"), flat.get("model_options.norm")
    assert name.split("/")[2].startswith(f"{network}-{norm}-" if norm else f"{network}-sigma")
    shares = network in ("r3_2", "r3_3", "r3_4")
    assert flat.get("optimizer.groups.shared.lr_factor") == (0.5 if shares else None)
    # 204,800 patches an epoch of the 400 images: 1,600 batches.
    batches = BatchPlan(400, 128, 1, 0, 1, 0, (400,), config.data.repeats)
    assert batches.steps_per_epoch == 1600
    rate = factor(config.schedule, 1600, 1600 * 50)
    rates = [0.1 * rate(1600 * epoch) for epoch in range(50)]
    assert rates[0] == 0.1
    assert rates[-1] == pytest.approx(1e-4)
    for before, after in itertools.pairwise(rates):
        assert after / before == pytest.approx(1e-3 ** (1 / 49))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_accepted(name: str, bsd_shards: Path) -> None:
    planned = plan(recipes.load(name, [f"data.path={bsd_shards}", "data.repeats=64"]), 2)
    assert planned.steps_per_epoch == 16 * 64 // planned.config.train.batch_size
    assert sum(group.parameters for group in planned.groups) == planned.cost.parameters


@pytest.mark.parametrize("name", ["r3_4-sigma50", "s3_2-sigma15", "r3_4-none-sigma25"])
def test_a_recipe_trains(
    name: str, bsd_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    small = ["train.batch_size=4", "data.reader=torch", "data.workers=0"]
    config = recipes.load(f"rc/denoising/{name}", [f"data.path={bsd_shards}", *small])
    assert train(config, tmp_path / "run", stop_after=2) == 0
    assert recipes.load(str(tmp_path / "run" / "config.yaml")) == config


def test_a_short_recipe_gains_six_decibels(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R_3^1 on the real images, for a tenth of its training, on Set12."""
    from data_prep.prepare import prepare
    from data_prep.sources import open_source
    from jobs.trained import Evaluate

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    prepare(open_source("bsd", shared_data / "bsd-denoise.tar"), tmp_path / "bsd", workers=1)
    assert Manifest.load(tmp_path / "bsd").train.samples == 400
    settings = ["data.path=bsd", "train.epochs=1", "data.repeats=3", "train.evaluate_every=9"]
    config = recipes.load("rc/denoising/r3_1-sigma25-short", settings)
    assert train(config, tmp_path / "run", stop_after=149) == 0
    ((summary, _),) = Evaluate(tmp_path / "run", split="set12", quiet=True)()
    assert summary.metrics()["eval/psnr"] - summary.metrics()["eval/noisy_psnr"] > 6
