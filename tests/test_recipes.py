"""Recipes: every one builds, plans and trains; what they are is recorded and compared."""

import hashlib
from pathlib import Path

import pytest
import yaml

from pipeline import recipes
from pipeline.config import ConfigError
from pipeline.models import create_model, list_models
from pipeline.recipes import RECIPES
from pipeline.training.plan import plan
from tests.training.conftest import train

GOLDEN = Path(__file__).parent / "golden" / "recipes.yaml"
SECTION_4_1 = {
    "train.epochs": 350,
    "train.batch_size": 256,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.1,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 5e-4,
    "schedule.name": "step",
    "schedule.milestones": [150, 250],
    "schedule.gamma": 0.1,
    "schedule.warmup_epochs": 0,
    "data.augment.crop": "pad",
    "data.augment.padding": 4,
    "data.augment.flip": True,
    "data.augment.size": 32,
    "loss.execution_rate": 1,
    "loss.label_smoothing": 0,
}


def describe(name: str) -> dict[str, object]:
    """What is recorded of a recipe."""
    config = recipes.load(name)
    classes = {"num_classes": 10} if config.task == "classification" else {}
    model = create_model(config.model, **classes, **config.model_options)
    return {
        "model": config.model,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "config_sha256": hashlib.sha256(config.to_yaml().encode()).hexdigest(),
        "reported": RECIPES[name].reported,
    }


def test_they_are_what_was_recorded() -> None:
    """A change of a recipe, or of a default it relies on, must be meant: then record it anew."""
    assert {name: describe(name) for name in RECIPES} == yaml.safe_load(GOLDEN.read_text())


def test_every_network_has_a_recipe() -> None:
    trained = {RECIPES[name].config().model for name in RECIPES if name.startswith("drnn/cifar10/")}
    assert trained == set(list_models("*resnet*"))


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("drnn/cifar10/")])
def test_the_schedule_is_the_papers(name: str) -> None:
    flat = recipes.load(name).flat()
    assert {key: flat[key] for key in SECTION_4_1} == SECTION_4_1
    gated = flat["model"].startswith("dr_")
    assert flat.get("model_options.target_rate") == (0.7 if gated else None)
    assert flat["name"] == name


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if r.config().data.sigma is None])
def test_a_recipe_trains(name: str, shards: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    small = [f"data.path={shards}", "train.batch_size=8", "data.reader=torch", "data.workers=0"]
    config = recipes.load(name, small)
    planned = plan(config, world_size=2)
    assert planned.steps_per_epoch == 8
    assert sum(group.parameters for group in planned.groups) == planned.cost.parameters
    if planned.cost.parameters < 300_000:
        assert train(config, tmp_path / "run", stop_after=2) == 0
        written = recipes.load(str(tmp_path / "run" / "config.yaml"))
        assert written == config


def test_a_file_is_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "own.yml"
    file.write_text(recipes.load("drnn/digits/dr_resnet16").to_yaml())
    assert recipes.load(str(file)) == recipes.load("drnn/digits/dr_resnet16")
    assert recipes.load(str(file), ["seed=3"]).seed == 3


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("drnn/cifar10/dr_resnet161", "drnn/cifar10/dr_resnet16"),
        ("drnn/cifar/dr_resnet40", "drnn/cifar10/dr_resnet40"),
        ("dr_resnet16", "dr_resnet16"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '.*{meant}'.*reprise recipes"):
        recipes.load(name)
