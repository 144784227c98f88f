"""The configuration: what is refused and how that is said; its YAML form is the same thing."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import configure
from pipeline.config import ConfigError

BASE: dict[str, Any] = {
    "name": "small",
    "model": "resnet20",
    "data": {"path": "data/digits"},
    "train": {"epochs": 2, "batch_size": 8},
}

REFUSED = {
    "typo at the top": ("sead=1", ["unknown key 'sead'", "did you mean 'seed'"]),
    "typo in a section's name": ("trian.epochs=1", ["'trian'", "did you mean 'train'"]),
    "nested typo": ("train.epoch=3", ["'train.epoch'", "did you mean 'train.epochs'"]),
    "typo two levels down": (
        "data.augment.paddding=3",
        ["'data.augment.paddding'", "did you mean 'data.augment.padding'"],
    ),
    "typo in a section that is left out": (
        "init_from.pat=runs/a",
        ["'init_from.pat'", "did you mean 'init_from.path'", "init_from.path is missing"],
    ),
    "unknown fold": ("init_from={path: a, recursive: last}", ["init_from.recursive='last'"]),
    "typo near nothing": ("loss.zzz=1", ["'loss.zzz'", "loss.label_smoothing"]),
    "typo in a group": (
        "optimizer.groups.gate.lr_fctor=1",
        ["did you mean 'optimizer.groups.gate.lr_factor'"],
    ),
    "Nesterov's momentum with Adam": ("optimizer={name: adam, nesterov: true}", ["nesterov=false"]),
    "infinite rate": ("optimizer.lr=.inf", ["optimizer.lr=inf", "finite"]),
    "infinite norm": ("optimizer.clip_norm=.inf", ["optimizer.clip_norm=inf", "finite"]),
    "a beta over 1": ("optimizer.betas=[1.5, 0.9]", ["optimizer.betas.0=1.5", "less than 1"]),
    "crops larger than the image": ("data.augment.scale=[0.1, 7]", ["scale=(0.1, 7.0)", "most 1"]),
    "milestone before the start": (
        "schedule={name: step, milestones: [-1, 1]}",
        ["milestones=[-1.0, 1.0]", "above 0"],
    ),
    "truth for a number": ("train.epochs=true", ["train.epochs=true", "no value of this key"]),
    "truth for a rate": ("optimizer.lr=false", ["optimizer.lr=false", "no value of this key"]),
    "padding without crops": ("data.augment.padding=2", ["padding=2 with crop=none", "leave it"]),
    "areas without crops": ("data.augment.scale=[0.5, 1]", ["scale=(0.5, 1.0) with crop=none"]),
    "betas of SGD": ("optimizer.betas=[0.5, 0.9]", ["betas=(0.5, 0.9) with name=sgd"]),
    "momentum of Adam": ("optimizer={name: adam, momentum: 0.5}", ["momentum=0.5 with name=adam"]),
    "gamma of no step": ("schedule.gamma=0.2", ["gamma=0.2 with name=constant"]),
    "peak of no cycle": ("schedule={name: cosine, peak: 0.2}", ["peak=0.2 with name=cosine"]),
    "temperature without noise": ("scorer.temperature=0.5", ["temperature=0.5 with name=softmax"]),
    "k of softmax": ("scorer.k=2", ["k=2 with name=softmax", "no effect"]),
    "unknown role": ("optimizer.groups.gates.lr_factor=1", ["gates", "'gate'"]),
    "text for a number": ("train.epochs=many", ["train.epochs='many'", "integer"]),
    "fraction for an integer": ("train.batch_size=1.5", ["train.batch_size=1.5", "integer"]),
    "list for a number": ("optimizer.lr=[1]", ["optimizer.lr", "number"]),
    "value for a section": (
        "train=3",
        ["train=3: a section, give its keys: such as train.batch_size=VALUE", "epochs, batch_size"],
    ),
    "value for a section that is left out": (
        "init_from=runs/x",
        ["init_from='runs/x': a section", "init_from.path=VALUE", "of path, recursive"],
    ),
    "value for an entry": ("phases=[3]", ["phases.0=3: a section", "phases.0.name=VALUE"]),
    "value for a group": (
        "optimizer.groups.gate=3",
        ["optimizer.groups.gate=3: a section", "lr_factor"],
    ),
    "value for a dictionary": (
        "steps.probabilities=3",
        ["steps.probabilities=3: give such as {2: 0.5, 3: 0.5}"],
    ),
    "value for a list": (
        "schedule={name: step, milestones: 1}",
        ["schedule.milestones=1: give a list such as [1, 2]"],
    ),
    "value for a list of sections": ("phases=3", ["phases=3: give a list such as [{name: "]),
    "value for a range": ("data.augment.scale=1", ["give a list such as [0.08, 1.0]"]),
    "one beta": ("optimizer.betas=[0.9]", ["optimizer.betas: give 2 entries: such as [0.9, 0.99"]),
    "three betas": ("optimizer.betas=[0, 0, 0]", ["optimizer.betas: give 2 entries: such as [0.9"]),
    "half of a point": ("pull={points: [[0]]}", ["pull.points.0: give 2 entries"]),
    "a time with its unit": (
        "checkpoints.every_minutes=10m",
        ["checkpoints.every_minutes='10m'", "number", "(minutes, without the unit)"],
    ),
    "no epochs": (
        "train.epochs=null",
        ["train.epochs=null without phases: give a number of epochs, or phases"],
    ),
    "no value for a switch": ("train.compile=null", ["train.compile=null:"]),
    "epochs and phases": (
        "phases=[{name: a, epochs: 1}]",
        ["train.epochs=2 with phases", "train.epochs=null"],
    ),
    "phase without length": ("phases=[{name: a}]", ["phase 'a' has neither steps nor epochs"]),
    "phase of two lengths": (
        "phases=[{name: a, steps: 1, epochs: 1}]",
        ["phase 'a' has steps=1 and epochs=1.0: give its length in one of them"],
    ),
    "a key near nothing": ("base=1", ["unknown key 'base'; valid here: name, model"]),
    "section for a value": ("seed.deep=3", ["seed", "integer"]),
    "section below a value": ("name.deep=3", ["'name'", "not a section"]),
    "zero epochs": ("train.epochs=0", ["train.epochs=0", "greater than 0"]),
    "negative decay": ("optimizer.weight_decay=-1", ["optimizer.weight_decay=-1"]),
    "momentum of one": ("optimizer.momentum=1", ["optimizer.momentum=1", "less than 1"]),
    "unknown choice": ("train.precision=fp8", ["train.precision='fp8'", "'bf16'"]),
    "unknown optimizer": ("optimizer.name=lion", ["'lion'", "'adamw'"]),
    "ZeRO 2": ("train.zero_stage=2", ["train.zero_stage=2", "0 or 1"]),
    "milestones without step": (
        "schedule.milestones=[1]",
        ["milestones=[1.0] with name=constant", "give schedule.milestones=[]"],
    ),
    "step without milestones": (
        "schedule.name=step",
        ["name=step needs milestones: give such as [1, 2]", "schedule.name=constant"],
    ),
    "staircase without steps": ("schedule.name=staircase", ["name=staircase needs every_steps"]),
    "steps of no staircase": (
        "schedule.every_steps=3",
        ["every_steps=3 with name=constant", "give schedule.every_steps=null"],
    ),
    "small resize": ("data.augment.eval_resize=8", ["eval_resize=8", "eval_resize >= 32"]),
    "scale upside down": ("data.augment.scale=[1,0.5]", ["scale=(1.0, 0.5)"]),
    "scale from zero": ("data.augment.scale=[0,1]", ["0 < low"]),
    "half of the probability": ("steps.probabilities={2: 0.5}", ["sum to 0.5", "sum to 1"]),
    "no probability": ("steps.probabilities={2: 0, 3: 1}", ["greater than 0", "leave out"]),
    "probability of nan": ("steps.probabilities={2: .nan}", ["probabilities.2=nan", "finite"]),
    "steps by name": ("steps.probabilities={two: 1}", ["steps.probabilities.two", "integer"]),
    "unknown draw": ("steps.draw=two", ["steps.draw='two'", "'all'"]),
    "a pull that never rises": (
        "pull={points: [[0, 0.1], [1, 0.1]]}",
        ["pull: points=", "never rise", "give a higher weight later", "[[0, 1.0e-4], [1, 0.1]]"],
    ),
    "a pull that falls": ("pull={points: [[0, 0.1], [0.5, 0.01], [1, 0.001]]}", ["never rise"]),
    "one point of pull": ("pull={points: [[0, 0.1]]}", ["never rise"]),
    "no pull at first": ("pull={points: [[0, 0], [1, 0.1]]}", ["weights must be greater than 0"]),
    "pull beyond the end": ("pull={points: [[0, 1], [2, 3]]}", ["shares of training", "0 to 1"]),
    "pull out of order": ("pull={points: [[1, 1], [0, 3]]}", ["shares of training must rise"]),
    "unknown pull": ("pull={between: cubic}", ["pull.between='cubic'", "'exponential'"]),
    "typo in the pull": ("pull.point=[[0, 1]]", ["did you mean 'pull.points'"]),
    "no value": ("seed", ["'seed'", "key.path=value"]),
    "no key": ("=3", ["'=3'", "key.path=value"]),
    "broken YAML": ("seed=[1", ["'[1'", "not a YAML value"]),
    "nothing": ("train.epochs=", ["train.epochs"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_one_line_with_the_cure(case: str) -> None:
    override, words = REFUSED[case]
    configure.build(BASE)  # good without it
    with pytest.raises(ConfigError) as refused:
        configure.build(BASE, [override])
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["schedule.name=step", "schedule.milestones=[2,1]"],
        ["schedule.name=step", "schedule.milestones=[1,1]"],
        ["schedule.name=one_cycle", "schedule.warmup_epochs=1"],
        ["optimizer.nesterov=true", "optimizer.name=adam"],
        ["optimizer.nesterov=true", "optimizer.momentum=0"],
    ],
)
def test_refused_together(overrides: list[str]) -> None:
    with pytest.raises(ConfigError):
        configure.build(BASE, overrides)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs=0.*; .*'seeed'"):
        configure.build(BASE, ["train.epochs=0", "seeed=1"])


def test_what_is_missing_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"train\.batch_size is missing: give train\.batch_size=VALUE"
    ):
        configure.build({**BASE, "train": {"epochs": 8}})


def test_overrides_are_applied_in_order_and_leave_the_base_alone() -> None:
    before = configure.build(BASE)
    changed = configure.build(
        BASE, ["train.epochs=5", "train.epochs=7", "optimizer.groups.norm.weight_decay=0"]
    )
    assert changed.train.epochs == 7
    assert changed.optimizer.groups["norm"].weight_decay == 0
    assert configure.build(BASE) == before


def test_its_yaml_is_the_same_configuration(tmp_path: Path) -> None:
    overrides = [
        "schedule.name=step",
        "schedule.milestones=[0.5,1]",
        "optimizer.clip_norm=1e-3",
        "optimizer.groups.rest.lr_factor=0.5",
        "model_options.target_rate=0.7",
        "steps.probabilities={2: 0.25, 3: 0.75}",
        "checkpoints.every_minutes=null",
        "name='a: b'",
    ]
    built = configure.build(BASE, overrides)
    file = tmp_path / "config.yaml"
    file.write_text(built.to_yaml())
    assert configure.read(file) == built
    assert built.optimizer.clip_norm == 0.001
    assert configure.read(file, ["seed=4"]).seed == 4


def test_flat_names_every_value_as_overrides_do() -> None:
    overrides = ["optimizer.groups.norm.lr_factor=2", "steps.probabilities={3: 1}"]
    flat = configure.build(BASE, overrides).flat()
    assert flat["steps.probabilities.3"] == 1
    assert flat["data.path"] == "data/digits"
    assert flat["data.augment.padding"] == 4
    assert flat["optimizer.groups.norm.lr_factor"] == 2
    assert flat["model_options"] == {}
    assert not any(isinstance(value, dict) and value for value in flat.values())


def test_a_configuration_does_not_change() -> None:
    built = configure.build(BASE)
    with pytest.raises(ValueError, match="frozen"):
        built.train.epochs = 3


@pytest.mark.parametrize(
    "content", [b"", b"- a\n- b\n", b"just text", b"a: [1", b"\xff\xfe\x00", b"a: b: c"]
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "odd.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        configure.read(file)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_with_a_mistake_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(configure.build(BASE).to_yaml().replace("seed:", "sead:"))
    with pytest.raises(ConfigError) as refused:
        configure.read(file)
    assert str(refused.value).startswith(f"{file}: unknown key 'sead'")
    with pytest.raises(ConfigError, match=r"^unknown key 'sead'"):
        configure.read(file, ["seed=4"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        configure.read(tmp_path / "nowhere.yaml")


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text(configure.build(BASE).to_yaml() + "seed: 1\n")
    with pytest.raises(ConfigError, match=r"twice.yaml: .*the key 'seed' stands twice: keep one"):
        configure.read(file)


def test_a_section_that_is_left_out_can_be_filled_in() -> None:
    built = configure.build(
        configure.build(BASE).model_dump(mode="json"), ["init_from.path=runs/static"]
    )
    assert built.init_from is not None
    assert (built.init_from.path, built.init_from.recursive) == (Path("runs/static"), "mean")
