"""Which numbers of steps are trained: drawn alike on all ranks, and exact when resumed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline import configure
from pipeline.config import Config, ConfigError, Steps
from pipeline.distributed import World
from pipeline.models import Network, create_model
from pipeline.models.norms import BatchNorm
from pipeline.tracking import history
from pipeline.training import steps
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.engine import Engine
from pipeline.training.plan import plan
from tests.training.conftest import Tiny, trace, train
from tests.training.processes import on_ranks

R2 = Steps(probabilities={4: 0.5, 2: 0.2, 3: 0.3})
SETTINGS = {
    "model": "rc_r2",
    "steps.probabilities": "{2: 0.2, 3: 0.3, 4: 0.5}",
    "data.augment": "{crop: pad, size: 16}",
    "data.reader": "torch",
    "data.workers": 0,
}


def drawn(count: int, seed: int = 0, micro_batch: int = 0) -> list[int | None]:
    found = [steps.taken(R2, seed, step, micro_batch) for step in range(count)]
    assert all(len(numbers) == 1 and numbers[0][1] == 1.0 for numbers in found)
    return [numbers[0][0] for numbers in found]


def test_one_number_is_drawn_by_its_probability() -> None:
    shares = np.bincount(drawn(4000), minlength=5) / 4000  # type: ignore[arg-type]
    assert shares == pytest.approx([0, 0, 0.2, 0.3, 0.5], abs=0.025)


def test_the_draw_depends_on_seed_step_and_micro_batch_alone() -> None:
    assert drawn(50) == drawn(50)
    torch.manual_seed(99)
    assert drawn(50) == drawn(50)
    assert drawn(50) != drawn(50, seed=1)
    assert drawn(50) != drawn(50, micro_batch=1)
    runs = [n for n in range(49) if drawn(50)[n] == drawn(50)[n + 1]]
    assert 5 < len(runs) < 40, "neighbouring steps must not depend on each other"


def test_all_numbers_with_their_probabilities_as_weights() -> None:
    every = R2.model_copy(update={"draw": "all"})
    assert steps.taken(every, 0, 7, 0) == [(2, 0.2), (3, 0.3), (4, 0.5)]


def test_without_a_choice_nothing_is_drawn() -> None:
    assert steps.taken(Steps(), 0, 7, 0) == [(None, 1.0)]


@pytest.mark.parametrize(
    ("model", "probabilities", "message"),
    [
        ("rc_r2", {}, r"takes 2, 3, 4 steps.*steps.probabilities=\{2: 0.333, 3: 0.333, 4: 0.334\}"),
        ("rc_r2", {2: 0.5, 3: 0.5}, r"takes 2, 3, 4 steps: give each"),
        ("rc_r2", {2: 0.5, 3: 0.2, 5: 0.3}, r"takes 2, 3, 4 steps: give each"),
        ("resnet20", {2: 1.0}, r"\{2: 1.0\}: this network always takes the same steps: remove"),
    ],
)
def test_probabilities_are_those_of_the_networks_numbers(
    model: str, probabilities: dict[int, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        steps.check(create_model(model), Steps(probabilities=probabilities))


def test_the_example_of_a_refusal_is_accepted() -> None:
    model = create_model("rc_r2", steps=[1, 2, 3, 4, 5, 6, 7])
    with pytest.raises(ConfigError) as refused:
        steps.check(model, Steps())
    example = str(refused.value).rpartition("steps.probabilities=")[2]
    base = {"name": "a", "model": "rc_r2", "data": {"path": "x"}}
    base |= {"train": {"epochs": 1, "batch_size": 1}}
    steps.check(model, configure.build(base, [f"steps.probabilities={example}"]).steps)


# -- the update ------------------------------------------------------------------------------------

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 10
ARRANGEMENTS = [(stage, accumulation) for stage in (0, 1) for accumulation in (1, 2)]


def build(
    stage: int, accumulation: int, world: World, name: str = "sgd", steps: Any = (2, 3)
) -> Engine:
    """An engine over R_2 with statistics that stay, so that a batch is the sum of its parts."""
    settings = {
        "name": "steps",
        "model": "rc_r2",
        "data": {"path": "unused"},
        "optimizer": {"name": name, "lr": 0.05, "weight_decay": 0.1, "clip_norm": 1.0},
        "train": {
            "epochs": 1,
            "batch_size": 8,
            "zero_stage": stage,
            "accumulation": accumulation,
        },
    }
    torch.manual_seed(0)
    model = create_model("rc_r2", steps=list(steps))
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eval()
    return Engine(model, configure.build(settings), world, lambda step: 1.0)


def update(engine: Engine, world: World, numbers: tuple[int, ...], accumulation: int) -> None:
    """One optimizer step whose micro-batches take these numbers of steps."""
    size = 8 // (world.world_size * accumulation)
    for micro in range(accumulation):
        assert engine.micro_batch == micro
        first = (micro * world.world_size + world.rank) * size
        part = slice(first, first + size)
        logits = engine.forward(IMAGES[part], numbers[micro % len(numbers)]).logits
        engine.backward(F.cross_entropy(logits, LABELS[part]))
        engine.step()


def values(model: Network) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def after_three_updates(world: World) -> dict[Any, Any]:
    """Weights and moments after updates of 2, 3 and 2 steps, in every arrangement."""
    world.start()
    found: dict[Any, Any] = {}
    for name in ("sgd", "adamw"):
        for stage, accumulation in ARRANGEMENTS:
            engine = build(stage, accumulation, world, name)
            for number in (2, 3, 2):
                update(engine, world, (number,), accumulation)
            found[name, stage, accumulation] = values(engine.model), engine.state_dict()["moments"]
    return found


def test_two_ranks_make_the_updates_of_one_in_every_arrangement(tmp_path: Path) -> None:
    alone = after_three_updates(World())
    for found in [alone, *on_ranks(after_three_updates, 2, tmp_path / "ranks")]:
        for (name, *arrangement), result in found.items():
            tolerance = {"rtol": 1e-3, "atol": 1e-5 if name == "sgd" else 2e-3}
            message = f"{name}, {arrangement}: {{}}".format
            torch.testing.assert_close(result, alone[name, 0, 1], **tolerance, msg=message)


def idle_names(model: Network, steps: int) -> set[str]:
    model.zero_grad()
    model(IMAGES, steps).logits.sum().backward()
    return {name for name, value in model.named_parameters() if value.grad is None}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize(("stage", "accumulation"), ARRANGEMENTS)
def test_paths_that_were_not_taken_stay_as_they_are(
    stage: int, accumulation: int, name: str
) -> None:
    world = World()
    world.start()
    engine = build(stage, accumulation, world, name)
    for numbers in ((3,), (2,), (3, 2), (2, 2)):
        taken = numbers if accumulation > 1 else numbers[:1]
        idle = set.intersection(
            *(idle_names(create_model("rc_r2", steps=[2, 3]), number) for number in taken)
        )
        before, moments = values(engine.model), engine.state_dict()["moments"]
        update(engine, world, numbers, accumulation)
        after, later = values(engine.model), engine.state_dict()["moments"]
        for key, value in after.items():
            assert torch.equal(value, before[key]) == (key in idle), key
            for kind in later:
                if later[kind][key].ndim and key in idle:
                    old = moments[kind][key] if moments else torch.zeros_like(value)
                    assert torch.equal(later[kind][key], old), (kind, key)


def test_a_state_goes_on_where_some_paths_were_never_taken() -> None:
    world = World()
    world.start()
    first = build(0, 1, world)
    update(first, world, (2,), 1)
    second = build(1, 1, world)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    for engine in (first, second):
        update(engine, world, (3,), 1)
    torch.testing.assert_close(values(second.model), values(first.model), rtol=1e-6, atol=1e-8)


# -- whole runs ------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("journal_only")


def adjustable(tiny: Tiny, **overrides: Any) -> Config:
    return tiny.config(**{**SETTINGS, "train.epochs": 2, "train.evaluate_every": 1, **overrides})


@pytest.mark.parametrize(
    "variant",
    [
        {"train.zero_stage": 0},
        {"train.zero_stage": 1, "train.accumulation": 2},
        {"steps.draw": "all", "train.ema_decay": 0.9},
    ],
    ids=str,
)
def test_a_stopped_run_goes_on_bit_by_bit(
    tiny: Tiny, tmp_path: Path, variant: dict[str, Any]
) -> None:
    settings = adjustable(tiny, **variant)
    assert train(settings, tmp_path / "whole") == 0
    assert train(settings, tmp_path / "halves", stop_after=3) == 0
    assert train(settings, tmp_path / "halves") == 0
    assert trace(tmp_path / "halves") == trace(tmp_path / "whole")


def test_two_ranks_draw_the_same_and_resume(tiny: Tiny, tmp_path: Path) -> None:
    settings = adjustable(tiny, **{"train.zero_stage": 1})
    assert train(settings, tmp_path / "whole", nproc=2) == 0
    assert train(settings, tmp_path / "halves", nproc=2, stop_after=3) == 0
    assert train(settings, tmp_path / "halves", nproc=2) == 0
    assert trace(tmp_path / "halves") == trace(tmp_path / "whole")


def test_the_numbers_drawn_are_those_recorded(tiny: Tiny, tmp_path: Path) -> None:
    settings = adjustable(tiny, **{"train.log_every": 1, "train.accumulation": 2})
    assert train(settings, tmp_path / "run", stop_after=6) == 0
    points = history(tmp_path / "run")
    for step in range(6):
        numbers = [steps.taken(settings.steps, 0, step, micro)[0][0] for micro in (0, 1)]
        for index in (1, 2, 3, 4):
            rate = dict(points[f"train/rate/stages.1.0/{index}"])[step + 1]
            assert rate == sum(number >= index for number in numbers if number) / 2


def test_all_steps_at_once_minimise_the_weighted_sum(tiny: Tiny, tmp_path: Path) -> None:
    """The loss of the first step, before any update, by hand."""
    settings = adjustable(tiny, **{"steps.draw": "all", "train.log_every": 1})
    assert train(settings, tmp_path / "run", stop_after=1) == 0
    from pipeline.data import train_loader
    from pipeline.training.plan import build_model

    planned = plan(settings, 1)
    loader = train_loader(
        planned.manifest, reader="torch", augment=settings.data.augment, global_batch=16,
        accumulation=1, world=World(), seed=0, workers=0,
    )  # fmt: skip
    batch = next(iter(loader))
    model = build_model(settings, len(planned.manifest.classes)).train()
    expected = sum(
        weight * F.cross_entropy(model(batch.images, number).logits, batch.labels).item()
        for number, weight in settings.steps.probabilities.items()
    )
    recorded = history(tmp_path / "run")["train/loss"][0][1]
    assert recorded == pytest.approx(expected, rel=1e-4)


def test_each_number_of_steps_is_evaluated_and_the_largest_decides(
    tiny: Tiny, tmp_path: Path
) -> None:
    settings = adjustable(tiny, **{"train.epochs": 2})
    assert train(settings, tmp_path / "run") == 0
    points = history(tmp_path / "run")
    for number in (2, 3, 4):
        assert [step for step, _ in points[f"eval_steps/{number}/loss"]] == [4, 8]
    assert points["eval_steps/4/top1"] == points["eval/top1"]
    assert points["eval_steps/4/loss"] == points["eval/loss"]
    assert points["eval_steps/2/loss"] != points["eval/loss"]
    folders = sorted(path.name for path in (tmp_path / "run" / "evaluation").iterdir())
    main = folders[0]
    assert folders == [main, f"{main}-2-steps", f"{main}-3-steps"]
    best = CheckpointStore(tmp_path / "run" / "checkpoints", World(), 1).best()
    assert best is not None
    assert best.score == max(value for _, value in points["eval_steps/4/top1"])
