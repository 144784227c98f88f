"""ReSet's recipes: every row of its tables, and what the paper says of each."""

from itertools import pairwise

import pytest
import torch

from pipeline import recipes
from pipeline.config import Config, Phase
from pipeline.models import create_model
from pipeline.recipes import RECIPES
from pipeline.training import phases

NAMES = [name for name in RECIPES if name.startswith("reset/")]


def recipe(name: str) -> Config:
    return recipes.load(f"reset/cifar10/{name}")


def test_every_row_has_a_recipe() -> None:
    figures = [recipe.reported for name, recipe in RECIPES.items() if name in NAMES]
    rows = [sum(figure.endswith(f"Table {n}") for figure in figures) for n in (1, 2, 3)]
    assert rows == [6, 20, 5]
    assert RECIPES["reset/cifar10/sm-entr"].reported == "92.1 / 85.1 %, Table 2"
    assert RECIPES["reset/cifar10/hybrl-071"].reported == "35.3 / 30.4 %, Table 2"
    assert RECIPES["reset/cifar10/reset_3x2"].reported == "86.5 / 78.4 %, Table 3"


@pytest.mark.parametrize("name", NAMES)
def test_its_phases_fit_its_network(name: str) -> None:
    config = recipes.load(name)
    assert config.name == name
    with torch.device("meta"):
        model = create_model(config.model, **config.model_options)
    phases.check(model, config)
    trained = {phases.selection(model, phase).parameters for phase in config.all_phases}
    assert all(trained)
    if config.init_from:
        start = config.init_from.path.name.removeprefix("reset-").removesuffix("-seed0")
        assert f"reset/{start.replace('-', '/', 1)}" in RECIPES


def test_from_scratch_is_he_et_al() -> None:
    config = recipe("sm")
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (0.1, 1e-4)
    assert (config.train.batch_size, config.train.epochs) == (128, 164)
    assert [390 * epoch for epoch in config.schedule.milestones] == pytest.approx(
        [32_000, 48_000], rel=0.002
    )
    adam = recipe("sm-adam")
    assert (adam.optimizer.name, adam.optimizer.lr) == ("adam", 1e-3)
    assert (adam.schedule.gamma, adam.schedule.every_steps) == (0.95, 1000)


def test_a_controller_alone_is_section_5_1() -> None:
    for name, kind in (("sm-controller", None), ("sm-controller-cnn", "cnn")):
        config = recipe(name)
        (phase,) = config.phases
        assert config.model_options.get("controller") == kind
        assert (phase.trains, phase.steps, config.train.batch_size) == (("controller",), 5000, 128)
        assert phase.optimizer is not None
        assert (phase.optimizer.name, phase.optimizer.lr) == ("adam", 1e-3)
        assert phase.optimizer.weight_decay > 0
        assert phase.optimizer.clip_norm


def test_the_relaxation_has_the_steps_of_section_5_3() -> None:
    config = recipe("hybrl-088")
    assert config.init_from  # 1: a trained softmax network

    def scores(phase: Phase) -> tuple[str, tuple[str, ...]]:
        return config.during(phase).scorer.name, phase.trains

    gumbel, through, reward = config.phases
    assert scores(gumbel) == ("gumbel", ("controller",))  # 2 and 3
    assert gumbel.steps == 5000  # 4
    assert scores(through) == ("straight_through", ("controller",))  # 5
    assert through.until is not None  # 6
    assert config.during(reward).loss.skip_reward.first > 0  # 7 and 8
    rewards = [recipe(f"hybrl-{time}").phases[2] for time in ("088", "079", "071")]
    sizes = [phase.loss.skip_reward.first for phase in rewards if phase.loss]
    assert sizes == sorted(set(sizes))  # the cheaper network had the larger reward


def test_the_entropy_is_lowered_towards_the_end() -> None:
    weight = recipe("sm-entr").loss.different_routes
    assert weight.first > weight.last == 0


def test_layers_are_unfrozen_from_the_last_to_the_first() -> None:
    parts = [phase.trains for phase in recipe("incremental").phases]
    assert parts[0] == ("classifier",)
    assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(parts))
    assert parts[-1] == ("classifier", "stage3", "stage2", "stage1", "stem")


def test_two_phases_take_turns() -> None:
    turns = [phase.trains for phase in recipe("two_phase").phases]
    assert turns[::2] == [("body",)] * 16
    assert turns[1::2] == [("controller",)] * 16
    assert sum(phase.steps or 0 for phase in recipe("two_phase").phases) == 64_000
