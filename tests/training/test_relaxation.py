"""Relaxed sharing in training: the pull over time and ranks, angles, and the end: consolidation."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from jobs.trained import Consolidate, Evaluate
from pipeline import configure, tracking
from pipeline.analysis import report
from pipeline.config import ConfigError, Pull
from pipeline.distributed import World
from pipeline.models import Network, create_model
from pipeline.models.norms import BatchNorm
from pipeline.run_directory import RunDirectory
from pipeline.training import checkpoint, consolidation, relaxation, schedules
from pipeline.training.engine import Engine
from pipeline.training.plan import plan
from tests.training.conftest import Tiny, digest, trace, train
from tests.training.processes import on_ranks

RELAXED = {
    "model": "rs_3_middle",
    "data.augment": "{size: 16}",
    "model_options.sharing": "relaxed",
    "pull": "{points: [[0, 0.01], [1, 2]]}",
}


def test_the_pull_grows_exponentially() -> None:
    """Sec. 4: from 1e-4 to 1e-1 over training."""
    weight = schedules.pull(Pull(), 101)
    assert [weight(step) for step in (0, 50, 100)] == pytest.approx([1e-4, 10**-2.5, 1e-1])


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ("exponential", [1, 1, 10, 100, 100]),
        ("linear", [1, 1, 50.5, 100, 100]),
        ("steps", [1, 1, 1, 100, 100]),
    ],
)
def test_any_schedule_of_the_pull(between: Any, expected: list[float]) -> None:
    """Constant before the first point and after the last."""
    weight = schedules.pull(Pull(points=((0.2, 1), (0.6, 100)), between=between), 101)
    assert [weight(step) for step in (0, 20, 40, 60, 100)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model_options.sharing": "relaxed"}, "ties 4 sets of tensors and nothing.*pull={}"),
        ({"pull": "{}"}, "pull is for the tied tensors.*leave pull out"),
        ({"optimizer.groups.tied.lr_factor": 2}, "groups.tied selects no parameter"),
        (
            {"model_options.sharing": "relaxed", "pull": "{}", "optimizer.groups": "{shared: {}}"},
            "groups.shared selects no parameter.*tied, gate, norm, rest",
        ),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(
    overrides: dict[str, Any], message: str, tiny: Tiny
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tiny.config(**overrides), 1)


CASES = [("all", 0), ("all", 1), ("pull", 1)]


def test_two_ranks_pull_as_one(tmp_path: Path) -> None:
    alone = steps(World())
    for rank in on_ranks(steps, 2, tmp_path / "ranks"):
        for case in CASES:
            torch.testing.assert_close(rank[case], alone[case], rtol=1e-4, atol=2e-6)
    for name, update in alone["pull", 1].items():
        torch.testing.assert_close(update, expected_pull(name), rtol=1e-4, atol=1e-7, msg=name)


def steps(world: World) -> dict[tuple[str, int], dict[str, Tensor]]:
    world.start()
    return {case: one_step(*case, world) for case in CASES}


def relaxed_network() -> Network:
    torch.manual_seed(10)
    return create_model("r_resnet16", sharing="relaxed")


def expected_pull(name: str) -> Tensor:
    """Of an update at lr 1: half of it for tied weights, whose factor is 0.5."""
    for tied in relaxed_network().tied_sets():
        if name in tied.members:
            mean = torch.stack([*tied.members.values()]).mean(0)
            return 0.5 * 2 * 0.25 * (tied.members[name] - mean).detach()
    return torch.zeros(())


def one_step(terms: str, zero_stage: int, world: World) -> dict[str, Tensor]:
    """How one optimizer step of two micro-batches changes each parameter."""
    model = relaxed_network()
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eval()
    values = {
        "name": "step",
        "model": "r_resnet16",
        "data": {"path": "unused"},
        "optimizer": {"lr": 1.0, "momentum": 0.0, "groups": {"tied": {"lr_factor": 0.5}}},
        "pull": {"points": [[0, 0.25], [1, 1]]},
        "train": {"epochs": 1, "batch_size": 16, "accumulation": 2, "zero_stage": zero_stage},
    }
    built = configure.build(values)
    engine = Engine(model, built, world, lambda step: 1.0)
    found = relaxation.of(built, model, 10)
    assert found is not None
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    size = 8 // world.world_size
    for micro in range(2):
        part = slice(8 * micro + size * world.rank, 8 * micro + size * (world.rank + 1))
        logits = engine.forward(images[part]).logits
        task = F.cross_entropy(logits, labels[part]) if terms == "all" else 0 * logits.sum()
        engine.backward(task + found.term(0))
        engine.step()
    after = {name: before[name] - value.detach() for name, value in model.named_parameters()}
    return {name: value if value.any() else torch.zeros(()) for name, value in after.items()}


def test_a_run_pulls_logs_angles_and_consolidates(
    tiny: Tiny, tmp_path: Path, journal_only: None
) -> None:
    run = tmp_path / "run"
    assert train(tiny.config(**RELAXED), run) == 0
    history = tracking.history(run)
    pulls = [0.01 * 200 ** (step / 11) for step in (3, 7, 9, 11)]
    assert [value for _, value in history["pull"]] == pytest.approx(pulls)
    for conv in ("conv1", "conv2"):
        angles = [value for _, value in history[f"angle/stages.1.1.{conv}"]]
        assert angles == sorted({*angles}, reverse=True)
    losses = {name: history[f"train/{name}"][-1][1] for name in ("loss", "cross_entropy", "pull")}
    assert losses["loss"] == pytest.approx(losses["cross_entropy"] + losses["pull"], rel=1e-5)

    # What the end of training wrote is an ordinary run of the raw network ...
    made = RunDirectory(run).consolidated
    shared = made.read_config()
    assert shared.model_options == {}
    assert shared.pull is None
    [(summary, _)] = Evaluate(made.path, quiet=True)()
    assert summary.results["top1"] == history["consolidated/top1"][0][1]
    log = (run / "logs" / "rank-0.log").read_text()
    assert "degrees apart: top-1" in log
    assert "before, top-1" in log

    page = RunDirectory(run).report.read_text()
    assert "Largest angle between the weights of each tied set" in page
    assert f"{100 * summary.results['top1']:.2f} % top-1 accuracy after" in " ".join(page.split())
    assert re.search(r"parameters, consolidated; \d+,\d+ in training", page)
    assert report.write(made).read_text()

    # ... which another call of the training leaves alone, with what was made of it since, ...
    since = made.evaluation / "since"
    since.mkdir()
    assert train(tiny.config(**RELAXED), run) == 0
    assert since.is_dir()

    # ... which the command writes again, to the last bit, and which cannot be trained on.
    before = digest(checkpoint.find(made.checkpoints).load("model"))
    first, second, angle, path = Consolidate(run, quiet=True)()
    assert path == made.path
    assert digest(checkpoint.find(made.checkpoints).load("model")) == before
    assert first.results["top1"] == history["eval/top1"][-1][1]
    assert second.results["top1"] == summary.results["top1"]
    assert angle == pytest.approx(max(history[f"angle/stages.1.1.conv{n}"][-1][1] for n in (1, 2)))
    with pytest.raises(ConfigError, match="evaluated and not trained on: give the run"):
        made.claim(shared)
    assert train(shared, made.path) == 2
    assert not made.logs.exists()


def test_settings_of_tied_tensors_become_those_of_shared_ones(tiny: Tiny) -> None:
    built = tiny.config(**RELAXED, **{"optimizer.groups": "{tied: {lr_factor: 0.5}, norm: {}}"})
    groups = built.optimizer.groups
    made = consolidation.shared(built)
    assert made.optimizer.groups == {"shared": groups["tied"], "norm": groups["norm"]}
    plan(made, 1)


def test_a_resumed_run_pulls_as_one_that_never_stopped(
    tiny: Tiny, tmp_path: Path, journal_only: None
) -> None:
    relaxed = tiny.config(**RELAXED, **{"model_options.death_rate": 0.5})
    assert train(relaxed, tmp_path / "whole") == 0
    assert train(relaxed, tmp_path / "parts", stop_after=5) == 0
    assert train(relaxed, tmp_path / "parts") == 0
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")


@pytest.mark.parametrize(
    ("model", "sets", "more"),
    [
        ("dr_resnet16", 4, {"train.zero_stage": 1}),
        ("rc_r2", 4, {"steps.probabilities": "{2: 0.2, 3: 0.3, 4: 0.5}"}),
    ],
)
def test_the_cells_of_other_papers_train_relaxed(
    model: str, sets: int, more: dict[str, Any], tiny: Tiny, tmp_path: Path, journal_only: None
) -> None:
    built = tiny.config(**RELAXED | more | {"model": model, "train.log_every": 1})
    assert train(built, tmp_path / "run", stop_after=2) == 0
    history = tracking.history(tmp_path / "run")
    angles = [name for name in history if name.startswith("angle/")]
    assert len(angles) == sets
    for name in angles:
        (_, first), (_, second) = history[name]
        assert second < first


def test_a_run_that_ties_nothing_has_nothing_to_consolidate(
    tiny: Tiny, tmp_path: Path, journal_only: None
) -> None:
    assert train(tiny.config(), tmp_path / "run", stop_after=1) == 0
    with pytest.raises(ConfigError, match=r"ties nothing.*sharing=relaxed"):
        Consolidate(tmp_path / "run", quiet=True)()
    assert not RunDirectory(tmp_path / "run").consolidated.path.exists()
