"""Recipes: every one builds, plans and trains; what they are is recorded and compared."""

import hashlib
from pathlib import Path

import pytest
import torch
import yaml

from pipeline import recipes
from pipeline.config import ConfigError, Pull
from pipeline.models import create_model, list_models
from pipeline.recipes import RECIPES
from pipeline.tracking import Tracker
from pipeline.training.plan import plan
from pipeline.training.trainer import Trainer
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
    with torch.device("meta"):
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


def test_every_dynamic_recursive_network_has_a_recipe() -> None:
    trained = {recipe.config().model for recipe in RECIPES.values()}
    assert set(list_models("dr_*")) <= trained


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("drnn/cifar10/")])
def test_the_schedule_is_the_papers(name: str) -> None:
    flat = recipes.load(name).flat()
    expected = SECTION_4_1 | ({"optimizer.lr": 0.03} if flat["model"] == "rcnn160" else {})
    assert {key: flat[key] for key in SECTION_4_1} == expected
    gated = flat["model"].startswith(("dr_", "aig_"))
    assert flat.get("model_options.target_rate") == (0.7 if gated else None)
    assert flat["name"] == name


def test_recurrent_convolution_trains_as_its_paper_says() -> None:
    """RC Sec. 3.3: half the learning rate for what is shared, clipped gradients."""
    found = [name for name in RECIPES if name.startswith(("rc/cifar", "rc/digits"))]
    assert len(found) == 35
    for name in found:
        flat = recipes.load(name).flat()
        assert flat["name"] == name
        assert flat["optimizer.clip_norm"] == 1.0
        model = create_model(flat["model"])
        shares = "shared" in model.roles().values()
        assert flat.get("optimizer.groups.shared.lr_factor") == (0.5 if shares else None), name
        assert flat["data.path"] == f"data/{name.split('/')[1]}"
        assert flat["train.epochs"] == (8 if name.endswith("-short") else 200)


def test_every_row_of_recurrent_convolution_has_a_recipe() -> None:
    trained = {RECIPES[name].config().model for name in RECIPES if name.startswith("rc/cifar")}
    assert trained == set(list_models("rc_*")) - {
        *list_models("rc_?3_*"),
        "rc_s2_1",
    }  # the same network as rc_r2_1
    figures = {name: recipe.reported for name, recipe in RECIPES.items()}
    assert figures["rc/cifar10/rc_r2_1"] == "14.46 % error, Table 1"
    assert figures["rc/cifar100/rc_s2_4_half"] == "31.54 % error, Table 1"
    assert figures["rc/cifar100/rc_r2_4-no-norm"] == "38.56 % error, Table 2"
    assert figures["rc/cifar10/rc_r2_4-shared-norm"] == "21.00 % error, Table 2"
    assert figures["rc/cifar100/rc_r4"].startswith("25.83 / 25.54 / 25.29 % error at 1 / 2 / 3")


@pytest.mark.parametrize(
    ("name", "probabilities", "draw"),
    [
        ("rc/cifar10/rc_r2", {2: 0.2, 3: 0.3, 4: 0.5}, "one"),
        ("rc/cifar100/rc_r2", {2: 0.2, 3: 0.3, 4: 0.5}, "one"),
        ("rc/digits/rc_r2-short", {2: 0.2, 3: 0.3, 4: 0.5}, "one"),
        ("rc/cifar100/rc_r4", {1: 0.2, 2: 0.3, 3: 0.5}, "one"),
        ("rc/cifar100/rc_early_exit", {2: 0.2, 3: 0.3, 4: 0.5}, "all"),
    ],
)
def test_numbers_of_steps_are_drawn_as_in_section_5_3(
    name: str, probabilities: dict[int, float], draw: str
) -> None:
    steps = recipes.load(name).steps
    assert (steps.probabilities, steps.draw) == (probabilities, draw)


# Relaxed sharing, Tables 1 to 3: parameters and error, %.
SHARING = {
    "rs_18": (1_732_010, 6.67),
    "rs_18_middle-relaxed": (1_437_098, 6.67),
    "rs_18_middle": (1_437_098, 7.78),
    "rs_18_middle_minimal": (1_434_026, 7.23),
    "rs_18_all-relaxed": (179_114, 10.63),
    "rs_18_all": (179_114, 12.04),
    "rs_18_all_minimal": (168_266, 11.18),
    "rs_3": (363_146, 8.26),
    "rs_3_all-relaxed": (169_610, 10.06),
    "rs_3_all": (169_610, 10.29),
    "rs_3_all_minimal": (168_266, 11.25),
}


@pytest.mark.parametrize("row", [*SHARING, "rs_18-no-drop", "rs_18_middle-relaxed-no-drop"])
def test_a_row_of_relaxed_sharing_is_a_recipe(row: str, shards: Path) -> None:
    """Sec. 4: 500 epochs of batch 128, lr 0.1 divided by 10 at 250 and 375, Nesterov, flips."""
    name = f"relaxed/cifar10/{row}"
    config = recipes.load(name)
    flat = config.flat()
    expected = {
        "name": name,
        "train.epochs": 500,
        "train.batch_size": 128,
        "optimizer.lr": 0.1,
        "optimizer.momentum": 0.9,
        "optimizer.nesterov": True,
        "optimizer.weight_decay": 1e-4,
        "schedule.milestones": [250, 375],
        "schedule.gamma": 0.1,
        "data.augment.crop": "none",
        "data.augment.flip": True,
        "model_options.death_rate": None if "no-drop" in row else 0.5,
        "model_options.sharing": "relaxed" if "relaxed" in row else None,
    }
    assert {key: flat.get(key) for key in expected} == expected
    assert config.pull == (Pull() if "relaxed" in row else None)
    if row in SHARING:
        parameters, error = SHARING[row]
        assert RECIPES[name].reported.startswith(f"{error:.2f} % error, Table")
        # The tiny set has four classes, of 64 features and a bias, where the paper has ten.
        planned = plan(recipes.load(name, [f"data.path={shards}", "train.batch_size=8"]), 1)
        assert planned.cost.parameters == parameters - 6 * 65


IMAGENET = [name for name in RECIPES if name.startswith("drnn/imagenet/")]


@pytest.mark.parametrize("name", IMAGENET)
def test_the_schedule_on_imagenet_is_the_papers(name: str) -> None:
    """Section 4.2, and Table 3's last row."""
    config = recipes.load(name)
    found = (
        config.optimizer.lr,
        config.optimizer.weight_decay,
        config.train.epochs,
        config.schedule.milestones,
    )
    expected = {
        "mobilenet_v2": (0.01, 1e-4, 400, (200, 300)),
        "dr_mobilenet_v2": (0.01, 1e-4, 400, (200, 300)),
        "r_resnet53_long": (0.01, 5e-4, 180, (100, 130, 160)),
        "r_resnet53_shared_norm": (0.01, 1e-4, 100, (30, 60, 90)),
    }
    row = name.removeprefix("drnn/imagenet/")
    assert found == expected.get(row, (0.1, 1e-4, 100, (30, 60, 90)))
    assert (config.optimizer.name, config.optimizer.momentum) == ("sgd", 0.9)
    assert (config.train.batch_size, config.optimizer.lr_batch) == (256, 256)
    augment = config.data.augment
    assert (augment.crop, augment.size, augment.eval_resize) == ("random_resized", 224, 256)
    assert augment.flip
    assert augment.photometric
    assert config.name == name


def test_the_rows_of_table_3_differ_in_what_is_ablated() -> None:
    rows = ["r_resnet53_shared_norm", "r_resnet53", "dr_resnet53_per_step_norm", "dr_resnet53"]
    found = []
    for row in rows:
        config = recipes.load(f"drnn/imagenet/{row}")
        with torch.device("meta"):
            model = create_model(config.model, **config.model_options)
        cell = model.get_submodule("stages.2.1")
        found.append((type(cell.cell.norm1).__name__, type(cell.router).__name__))
    assert found == [
        ("SharedNorm", "FixedRouter"),
        ("PerStepNorm", "FixedRouter"),
        ("PerStepNorm", "Gate"),
        ("GatedPerStepNorm", "Gate"),
    ]


def test_a_larger_batch_scales_the_rate_and_warms_up(shards: Path) -> None:
    """Goyal et al. (2017): the rate is for 256 samples."""
    small = [f"data.path={shards}", "data.augment.size=32"]

    def planned(*overrides: str) -> tuple[float, float, float]:
        found = plan(recipes.load("drnn/imagenet/dr_resnet35", [*small, *overrides]), 1)
        rates = {group.lr for group in found.groups}
        assert len(rates) == 1
        return rates.pop(), found.config.optimizer.lr, found.config.schedule.warmup_epochs

    assert planned("train.batch_size=64") == pytest.approx((0.025, 0.025, 0))
    assert planned("train.batch_size=64", "optimizer.lr_batch=64") == (0.1, 0.1, 0)
    assert planned("train.batch_size=64", "optimizer.lr_batch=32") == (0.2, 0.2, 5)
    warmed = planned("train.batch_size=64", "optimizer.lr_batch=32", "schedule.warmup_epochs=2")
    assert warmed == (0.2, 0.2, 2)
    assert planned("train.batch_size=64", "optimizer.lr_batch=null") == (0.1, 0.1, 0)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("drnn/")])
def test_a_recipe_of_drnn_trains(name: str, shards: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Tracker, "start", lambda self: None)
    monkeypatch.setattr(Tracker, "finish", lambda self, status: True)
    monkeypatch.setattr(Trainer, "_save", lambda *_, **__: None)  # hundreds of megabytes each
    small = [f"data.path={shards}", "data.reader=torch", "data.workers=0", "train.batch_size=8"]
    config = recipes.load(name, [*small, *(["data.augment.size=32"] if name in IMAGENET else [])])
    if name not in IMAGENET:
        planned = plan(config, world_size=2)
        assert planned.steps_per_epoch == 8
        assert sum(group.parameters for group in planned.groups) == planned.cost.parameters
        if planned.cost.parameters >= 300_000:
            return
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
