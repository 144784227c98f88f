"""Training in phases: what is frozen stays bit by bit, and a resumed run goes on as if it had not
stopped."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep.manifest import Manifest
from jobs.errors import Exit
from pipeline import configure
from pipeline import evaluate as evaluation
from pipeline.config import Config, ConfigError, Convergence
from pipeline.distributed import World
from pipeline.models import CellRoute, Output, Policy, create_model
from pipeline.models.parts import freeze_all_but, select
from pipeline.models.scorers import Scorer
from pipeline.run_directory import RunDirectory
from pipeline.tracking import history
from pipeline.training import checkpoint
from pipeline.training import run as runs
from pipeline.training.checkpoint import read_state
from pipeline.training.phases import PolicyMovement
from pipeline.training.plan import plan
from pipeline.training.restore import trained_network
from tests.training.conftest import Tiny, trace, train

pytestmark = pytest.mark.usefixtures("journal_only")

ADAM = {"name": "adam", "lr": 0.01, "weight_decay": 0.1}
PHASES: list[dict[str, Any]] = [
    {"name": "softmax", "steps": 3},
    {
        "name": "controller",
        "steps": 3,
        "trains": ["controller"],
        "optimizer": ADAM,
        "schedule": {"name": "staircase", "gamma": 0.5, "every_steps": 2},
        "scorer": {"name": "gumbel", "temperature": 0.5},
        "loss": {"different_routes": {"first": 0.1}},
    },
    {
        "name": "units",
        "epochs": 0.75,
        "trains": ["units", "classifier"],
        "scorer": {"name": "straight_through"},
        "loss": {"skip_reward": 0.1, "decided_routes": 0.1},
        "draws": 2,
    },
]


def phased(tiny: Tiny, phases: list[dict[str, Any]] = PHASES, **overrides: Any) -> Config:
    values = tiny.config().model_dump(mode="json") | {"phases": phases}
    values |= {"model": "reset_3x2", "model_options": {"controller": "cnn"}}
    settings = {
        "train.epochs": "null",
        "train.evaluate_every": 9,
        "train.log_every": 1,
        "data.augment.size": 8,
        "schedule.name": "constant",
        **overrides,
    }
    return configure.build(values, [f"{key}={value}" for key, value in settings.items()])


def states(run: Path) -> dict[int, dict[str, Tensor]]:
    paths = sorted((run / "checkpoints").glob("step-*"))
    return {int(path.name[5:]): read_state(path / "model.safetensors") for path in paths}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_what_a_phase_does_not_train_stays_bit_by_bit(
    tiny: Tiny, tmp_path: Path, zero_stage: int
) -> None:
    every = {"checkpoints.every_steps": 1, "checkpoints.keep_last": 99}
    config = phased(tiny, **every, **{"train.zero_stage": zero_stage})
    assert train(config, tmp_path / "run") == 0
    saved = states(tmp_path / "run")
    assert list(saved) == list(range(1, 10))
    names = set(saved[1])
    everywhere = moved(saved[1], saved[2]) | moved(saved[2], saved[3])
    assert everywhere == names  # weights, norms and statistics of all parts
    controller = {name for name in names if ".controller." in name}
    assert any("running_mean" in name for name in controller)
    found = set[str]()
    for step in (3, 4, 5):
        found |= moved(saved[step], saved[step + 1])
    assert found == controller
    units = {name for name in names if ".units." in name and "stages.0" in name}
    last = moved(saved[6], saved[9])
    assert last == units | {"classifier.weight", "classifier.bias"}
    points = history(tmp_path / "run")
    assert points["phase"] == [(n, 1.0 + (n - 1) // 3) for n in range(1, 10)]
    assert [step for step, _ in points["eval/top1"]] == [3, 6, 9]
    assert {value for _, value in points["lr/gate"][3:5]} == {0.01}
    assert points["lr/gate"][5] == (6, pytest.approx(0.005))
    weights = [value for _, value in points["train/different_routes"]]
    assert len(weights) == 3
    assert weights[2] == 0.0  # lowered towards the end of the phase
    assert "train/skip_reward" in points
    best = checkpoint.find(RunDirectory(tmp_path / "run").checkpoints, best=True)
    assert best.step == 9  # of the last phase, whatever the others reached
    network = trained_network(config, Manifest.load(tiny.shards), best, torch.device("cpu"))
    assert network.scorer == Scorer("straight_through")


@pytest.mark.parametrize(
    ("stop_after", "settings"),
    [(3, {}), (5, {}), (8, {}), (5, {"train.zero_stage": 1, "train.ema_decay": 0.9})],
)
def test_a_run_in_phases_resumes_at_any_step(
    tiny: Tiny, tmp_path: Path, stop_after: int, settings: dict[str, Any]
) -> None:
    config = phased(tiny, **settings)
    assert train(config, tmp_path / "whole") == 0
    assert train(config, tmp_path / "halves", stop_after=stop_after) == 0
    assert train(config, tmp_path / "halves") == 0
    assert trace(tmp_path / "halves") == trace(tmp_path / "whole")


def test_a_stop_in_the_evaluation_that_ends_a_phase(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed run evaluates what the phase made of the network before it begins the next."""
    config, run = phased(tiny, **{"data.eval_batch_size": 4}), tmp_path / "run"
    assert train(config, tmp_path / "whole") == 0
    evaluate, count, at = runs._Evaluation.__call__, evaluation._Pace.count, [0]

    def begun(self: Any, step: int) -> Any:
        at.append(step)
        return evaluate(self, step)

    def counted(self: Any, images: int) -> None:
        count(self, images)
        if at[-1] == target:
            os.kill(os.getpid(), signal.SIGUSR2)

    monkeypatch.setattr(runs._Evaluation, "__call__", begun)
    monkeypatch.setattr(evaluation._Pace, "count", counted)
    for target in (3, 6, 9):
        assert train(config, run) == Exit.INTERRUPTED
        newest = checkpoint.find(run / "checkpoints")
        assert (newest.step, newest.evaluated) == (target, False)
    target = 0
    assert train(config, run) == 0
    assert trace(run) == trace(tmp_path / "whole")
    assert at[1:] == [3, 3, 6, 6, 9, 9]
    for name in ("eval/top1", "eval/loss", "train/loss", "phase"):
        assert history(run)[name] == history(tmp_path / "whole")[name]
    best = checkpoint.find(run / "checkpoints", best=True)
    assert (best.step, best.score) == history(run)["eval/top1"][-1]


def test_two_ranks_freeze_the_same_statistics(tiny: Tiny, tmp_path: Path) -> None:
    """Also over a resumption in the middle of the phase in which they are frozen."""
    every = {"checkpoints.every_steps": 1, "checkpoints.keep_last": 99, "train.zero_stage": 1}
    config = phased(tiny, PHASES[:2], **every)
    assert train(config, tmp_path / "run", nproc=2, stop_after=5) == 0
    assert train(config, tmp_path / "run", nproc=2) == 0
    saved = states(tmp_path / "run")
    assert moved(saved[3], saved[6]) == {name for name in saved[1] if ".controller." in name}


def test_a_phase_lasts_until_the_policy_converges(tiny: Tiny, tmp_path: Path) -> None:
    phases = [
        {"name": "loose", "steps": 50, "until": {"change": 0.99, "window": 2}},
        {"name": "rest", "steps": 2},
    ]
    config = phased(tiny, phases)
    assert train(config, tmp_path / "whole") == 0
    assert history(tmp_path / "whole")["phase"] == [*((n, 1) for n in (1, 2, 3, 4)), (5, 2), (6, 2)]
    assert train(config, tmp_path / "halves", stop_after=3) == 0
    assert train(config, tmp_path / "halves") == 0
    assert trace(tmp_path / "halves") == trace(tmp_path / "whole")


def policy(mean: list[list[float]]) -> Output:
    probabilities = torch.tensor([mean, mean])
    route = CellRoute(
        "unit", probabilities, probabilities > 0, None, Policy("p", *[probabilities] * 2)
    )
    return Output(torch.zeros(2, 1), (route,))


def test_convergence_is_the_largest_total_variation_between_windows() -> None:
    criterion = Convergence(change=0.1, window=2)
    movement = PolicyMovement(World())
    first = [[0.5, 0.5], [0.9, 0.1]]
    for mean, settled in [
        (first, False),
        (first, False),  # one window alone says nothing
        ([[0.5, 0.5], [0.6, 0.4]], False),
        (first, False),  # 0.75 after 0.9
        ([[0.5, 0.5], [0.8, 0.2]], False),
        ([[0.5, 0.5], [0.85, 0.15]], True),  # 0.825 after 0.75
    ]:
        movement.add(policy(mean))
        assert movement.settled(criterion) == settled


def test_phases_are_for_every_network(tiny: Tiny, tmp_path: Path) -> None:
    """Gates alone, in a network of DRNN."""
    phases = [{"name": "gates", "steps": 2, "trains": ["controller"]}]
    every = {"checkpoints.every_steps": 1, "model": "dr_resnet16", "model_options": "{}"}
    config = phased(tiny, phases, **every)
    assert train(config, tmp_path / "run") == 0
    saved = states(tmp_path / "run")
    assert moved(saved[1], saved[2]) == {name for name in saved[1] if ".router." in name}


def test_norms_of_paths_not_taken_stay_in_a_phase_too(tiny: Tiny, tmp_path: Path) -> None:
    """A cost-adjustable network, whose engine listens to gradients: closed and built again."""
    phases = [
        {"name": "norms", "steps": 2, "trains": ["norms"]},
        {"name": "classifier", "steps": 2, "trains": ["classifier"]},
    ]
    settings = {"model": "rc_r2", "model_options": "{steps: [1, 2]}", "data.augment.size": 16}
    settings |= {"steps.probabilities": "{1: 0.999, 2: 0.001}", "checkpoints.keep_last": 9}
    config = phased(tiny, phases, **settings, **{"checkpoints.every_steps": 1})
    assert train(config, tmp_path / "run") == 0
    saved = states(tmp_path / "run")
    assert moved(saved[1], saved[2]) == {name for name in saved[1] if ".norms.0." in name}
    assert moved(saved[2], saved[4]) == {"classifier.weight", "classifier.bias"}


def test_the_losses_of_several_draws_are_averaged(tiny: Tiny, tmp_path: Path) -> None:
    """Of a network that draws nothing all are the same, and so is their mean."""
    found = []
    for draws in (1, 3):
        phases = [{"name": "only", "steps": 1, "draws": draws}]
        config = phased(tiny, phases, model="resnet20", model_options="{}")
        assert train(config, tmp_path / str(draws)) == 0
        ((_, loss),) = history(tmp_path / str(draws))["train/loss"]
        found.append(loss)
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_parts_of_a_network() -> None:
    model = create_model("reset38")
    names = {name for name, _ in model.named_parameters()}
    positions = ["stem", "stage1", "stage2", "stage3", "classifier"]
    parts = [select(model, [part]).parameters for part in positions]
    assert sum(map(len, parts)) == len(names)
    assert set().union(*parts) == names
    assert select(model, ["all"]).parameters == names
    assert "stages.1.downsampling.conv.weight" in parts[2]
    controller, body = (select(model, [part]).parameters for part in ("controller", "body"))
    assert controller | body == names
    assert not controller & body
    assert select(model, ["controller"]).norms == frozenset()
    frozen = select(model, ["controller", "statistics"])
    assert "norm" in frozen.norms
    assert all(".controller." in name for name in frozen.parameters)
    freeze_all_but(model, select(model, ["units"]))
    model.eval().train()  # an evaluation in between changes nothing
    assert not model.norm.training
    assert model.stages[0].pool.units[0].norm1.norms[0].training


REFUSED = {
    "trains nothing": ({"trains": []}, "trains=.* has no parameters to train: give some of all, "),
    "statistics alone": ({"trains": ["statistics"]}, "has no parameters to train"),
    "no such part": ({"trains": ["contrller"]}, "'contrller' is no part of a network"),
    "no such stage": ({"trains": ["stage4"]}, "'stage4' selects nothing.*3 stages"),
    "no length": ({"steps": None}, "neither steps nor epochs: give its length in one of them"),
    "two lengths": ({"epochs": 2}, "steps=2 and epochs=2.0: give its length in one of them"),
    "temperature of zero": (
        {"scorer": {"name": "gumbel", "temperature": 0}},
        "temperature=0: logits are divided by it, so it must be greater than 0: give such as 0.5",
    ),
    "k of zero": ({"scorer": {"name": "top_k", "k": 0}}, "k=0 keeps no unit"),
    "k larger than the pool": (
        {"scorer": {"name": "top_k", "k": 4}},
        "scorer.k=4 is more than the 3 units of a pool.*: give 1 to 3",
    ),
    "an unknown key": ({"optimiser": {}}, "unknown key 'phases.0.optimiser'.*'phases.0.optimizer'"),
    "a weight that cannot decay": (
        {"loss": {"skip_reward": {"first": 1, "shape": "exponential"}}},
        "shape=exponential from 1 to 0: give first and last greater than 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_phase_that_makes_no_sense_is_refused_with_the_cure(tiny: Tiny, case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        plan(phased(tiny, [{"name": "only", "steps": 2} | changes]), world_size=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer.name": "gumbel"}, "scorer.name=gumbel with model=resnet20, which has no contr"),
        ({"loss.skip_reward": 0.1}, "loss.skip_reward with model=resnet20, which has no contr"),
        ({"phases.0.until": "{}"}, "until with model=resnet20, which has no controllers"),
        ({"phases.0.trains": "[controller]"}, "'controller' selects nothing in this network"),
    ],
)
def test_what_needs_controllers_is_refused_without(
    tiny: Tiny, changes: dict[str, Any], message: str
) -> None:
    phases = [{"name": "only", "steps": 2}]
    with pytest.raises(ConfigError, match=message):
        plan(phased(tiny, phases, model="resnet20", model_options="{}", **changes), world_size=1)


def test_epochs_and_phases_exclude_each_other(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs=2 with phases"):
        phased(tiny, **{"train.epochs": 2})
    with pytest.raises(ConfigError, match=r"train\.epochs=null without phases"):
        tiny.config(**{"train.epochs": "null"})
    with pytest.raises(ConfigError, match="give each a name of its own"):
        phased(tiny, [{"name": "a", "steps": 1}, {"name": "a", "steps": 1}])
    with pytest.raises(ConfigError, match="not one of the 3 entries"):
        phased(tiny, **{"phases.3.steps": 1})
