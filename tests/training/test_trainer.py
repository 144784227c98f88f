"""What a run does when something is wrong, and what it records when nothing is."""

import functools
import json
import math
import re
import shutil
import unittest.mock
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_prep.manifest import Manifest
from data_prep.prepare import prepare
from data_prep.sources import open_source
from data_prep.stage import stage
from jobs.console import TrainingDisplay
from jobs.errors import Exit
from jobs.trained import Evaluate
from pipeline.config import Config
from pipeline.data import Loader
from pipeline.distributed import World
from pipeline.run_directory import RunDirectory
from pipeline.tracking import history
from pipeline.training import checkpoint
from pipeline.training import run as runs
from pipeline.training.checkpoint import CheckpointStore, read_state, write_state
from pipeline.training.plan import STAGED, plan
from pipeline.training.trainer import Progress
from tests.training.conftest import Tiny, digest, trace, train
from tests.training.processes import on_ranks

pytestmark = pytest.mark.usefixtures("journal_only")


@pytest.fixture
def finished(tiny: Tiny, tmp_path: Path) -> tuple[Config, Path]:
    config = tiny.config(
        **{
            "optimizer.groups": "{shared: {lr_factor: 0.5}, norm: {weight_decay: 0}}",
            "train.evaluate_every": 1,
            "train.ema_decay": 0.5,
        }
    )
    assert train(config, tmp_path / "run") == 0
    return config, tmp_path / "run"


def test_metrics_and_files_of_a_finished_run(finished: tuple[Config, Path]) -> None:
    config, run = finished
    points = history(run)
    epochs, steps = config.train.epochs, 4
    evaluated = [(steps * (epoch + 1)) for epoch in range(epochs)]
    assert [step for step, _ in points["eval/top1"]] == evaluated
    for name in ("train/loss", "train/cross_entropy", "train/execution_rate", "epoch"):
        assert [step for step, _ in points[name]] == sorted({*evaluated, 10}), name
    for loss, *terms in zip(
        *(points[f"train/{name}"] for name in ("loss", "cross_entropy", "execution_rate")),
        strict=True,
    ):
        assert loss[1] == pytest.approx(sum(value for _, value in terms), rel=1e-4)
    for lr, shared in zip(points["lr/rest"], points["lr/shared"], strict=True):
        assert shared[1] == pytest.approx(lr[1] / 2)
    for cell in ("stages.1.1", "stages.2.1"):
        first, second = (points[f"train/rate/{cell}/{step}"][0][1] for step in (1, 2))
        assert 1 >= first >= second >= 0
        assert f"eval_rate/{cell}/2" in points
    assert all(0 <= value <= 1 for _, value in points["train/top1"])
    assert (run / "report.html").stat().st_size > 1000
    directory = RunDirectory(run)
    assert directory.read_config() == config
    assert not (run / "owner.json").exists()


def test_the_weights_handed_over_are_the_averaged_ones_of_the_best_checkpoint(
    finished: tuple[Config, Path],
) -> None:
    _, run = finished
    best = CheckpointStore(run / "checkpoints", World(), 1).best()
    assert best is not None
    given, average = read_weights(run / "weights.safetensors"), best.load("average")["network"]
    assert given.keys() == average.keys()
    assert all(torch.equal(given[name], average[name]) for name in given)
    model = best.load("model")
    assert any(not torch.equal(given[name], model[name]) for name in given)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def test_the_average_follows_its_definition(tiny: Tiny, tmp_path: Path) -> None:
    decay = 0.9
    config = tiny.config(**{"train.ema_decay": decay, "checkpoints.every_steps": 1})
    config = config.model_copy(
        update={"checkpoints": config.checkpoints.model_copy(update={"keep_last": 9})}
    )
    assert train(config, tmp_path / "run", stop_after=4) == 0
    paths = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    states = [read_state(path / "model.safetensors") for path in paths[:3]]
    name = linear(states[0])
    expected = states[0][name]
    for state in states[1:]:
        expected = decay * expected + (1 - decay) * state[name]
    averaged = read_state(paths[2] / "average.safetensors")["network"][name]
    torch.testing.assert_close(averaged, expected)


def linear(state: dict[str, torch.Tensor]) -> str:
    return next(name for name, value in state.items() if value.ndim == 2)


def poisoned(batches: Any, rank: int, at: int) -> Any:
    def broken(self: Loader) -> Any:
        for number, batch in enumerate(batches(self)):
            if number == at and rank == 1:
                batch.images.fill_(math.nan)
            yield batch

    return broken


def run_into_nan(config: Config, run: Path, world: World) -> tuple[str, str]:
    """Train with NaN images on rank 1 at the third step: the error and the model's hash."""
    built: list[Any] = []
    build = runs._build

    def keep(*arguments: Any) -> Any:
        built.append(build(*arguments))
        return built[0]

    patched = poisoned(Loader.__iter__, world.rank, 2)
    with (
        unittest.mock.patch.object(Loader, "__iter__", patched),
        unittest.mock.patch.object(runs, "_build", keep),
        unittest.mock.patch.object(World, "detect", return_value=world),
        pytest.raises(RuntimeError) as caught,
    ):
        runs.run(
            config,
            RunDirectory(run),
            TrainingDisplay(bar=False),
            on_owned=lambda planned: None,
            stop_requested=lambda: False,
        )
    parameters = {name: p.detach() for name, p in built[0].model.named_parameters()}
    return f"{type(caught.value).__name__}: {caught.value}", digest(parameters)


def test_nan_on_one_rank_stops_all_before_the_update(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(**{"checkpoints.every_steps": 2})
    run = tmp_path / "run"
    found = on_ranks(functools.partial(run_into_nan, config, run), 2, tmp_path / "ranks")
    assert [error.split(":")[0] for error, _ in found] == ["NonFiniteLoss"] * 2
    assert "at step 2" in found[0][0]
    stored = CheckpointStore(run / "checkpoints", World(), 1).newest()
    assert stored is not None
    assert stored.step == 2
    model = stored.load("model")
    running = {name for name in model if name.rpartition(".")[2].startswith(("running", "num_"))}
    saved = digest({name: model[name] for name in model.keys() - running})
    assert {weights for _, weights in found} == {saved}
    dump = json.loads((run / "nonfinite-step-000000002.json").read_text())
    assert [len(rank["keys"]) for rank in dump["ranks"]] == [8, 8]
    assert "nan" in dump["ranks"][1]["loss"]


def test_a_diverging_run_ends_with_its_own_status(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(**{"optimizer.lr": 1e30, "schedule.name": "constant"})
    assert train(config, tmp_path / "run") == Exit.NON_FINITE
    assert list((tmp_path / "run").glob("nonfinite-step-*.json"))


def test_the_rate_that_is_recorded_is_the_one_that_was_applied(tiny: Tiny, tmp_path: Path) -> None:
    settings = {"schedule.name": "step", "schedule.milestones": "[1]", "train.epochs": 2}
    assert train(tiny.config(**settings), tmp_path / "run") == 0
    points = history(tmp_path / "run")["lr/rest"]
    assert points == [(4, pytest.approx(0.05)), (8, pytest.approx(0.005))]


def test_a_recursive_cell_without_gates_has_rates_too(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(**{"model": "r_resnet16", "train.log_every": 1})
    assert train(config, tmp_path / "run", stop_after=3) == 0
    points = history(tmp_path / "run")
    for cell in ("stages.1.1", "stages.2.1"):
        for step in (1, 2):
            assert points[f"train/rate/{cell}/{step}"] == [(n, 1.0) for n in (1, 2, 3)]


def test_weights_that_are_not_finite_replace_no_checkpoint(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"optimizer.lr": 3e38, "optimizer.weight_decay": 100, "schedule.name": "constant"}
    settings["checkpoints.every_steps"] = 1
    assert train(tiny.config(**settings), tmp_path / "run") == Exit.NON_FINITE
    assert "weights are not finite after step 1" in capsys.readouterr().err
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


CHANGED = {
    "class_map_sha256": (
        "0" * 64,
        f"{'0' * 12}, now .* with the classes it was trained on, in their",
    ),
    "model": ("resnet20", "resnet20, now dr_resnet16: use the model it was trained with, or start"),
    "channel_mean": ([0.0, 0.0, 0.0], r"\[0.0, .* now .*: give the shard set it was trained on"),
    "train_shards_sha256": ("0" * 64, f"{'0' * 12}, now .*: prepare the images with the seed and"),
}


@pytest.mark.parametrize("key", CHANGED)
def test_a_checkpoint_of_something_else_is_refused(
    tiny: Tiny, tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = tiny.config(), tmp_path / "run"
    assert train(config, run, stop_after=2) == 0
    value, words = CHANGED[key]
    edit(run, "identity", lambda state: state | {key: value})
    assert train(config, run) == Exit.USER_ERROR
    assert re.search(f"has {key} {words}", capsys.readouterr().err)


@pytest.mark.parametrize("settings", [{"seed": 1}, {"samples_per_shard": 16}], ids=str)
def test_the_same_images_prepared_otherwise_are_refused_for_training_alone(
    images: Path,
    tiny: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, int],
) -> None:
    """Their order is another, so that a resumed epoch would see some twice and some never."""
    data, moved = tmp_path / "set", tmp_path / "moved"
    shutil.copytree(tiny.shards, data)
    config, run = Tiny(data).config(), tmp_path / "run"
    assert train(config, run, stop_after=2) == 0
    data.rename(moved)
    prepare(open_source("folder", images), data, **({"samples_per_shard": 40} | settings))
    before, now = (Manifest.load(root).train.sha256[:12] for root in (moved, data))
    assert train(config, run) == Exit.USER_ERROR
    assert f"has train_shards_sha256 {before}, now {now}" in capsys.readouterr().err
    (summary, _), *_ = Evaluate(run, data, quiet=True)()
    assert summary.samples == 16


def test_a_set_may_move_and_be_staged(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, fast, run = tmp_path / "moved", tmp_path / "fast", tmp_path / "run"
    assert train(tiny.config(), run, stop_after=2) == 0
    shutil.copytree(tiny.shards, moved)
    stage(tiny.shards, fast)
    monkeypatch.setenv(STAGED, str(fast))
    config = Tiny(moved).config()
    RunDirectory(run).config_file.write_text(config.to_yaml())
    assert train(config, run, stop_after=4) == 0


def test_a_changed_configuration_is_refused_where_it_decides_the_training(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the run directory, by hand; to call it with another is refused in any case."""
    run = tmp_path / "run"

    def edited(**values: object) -> Config:
        config = tiny.config(**values)
        RunDirectory(run).config_file.write_text(config.to_yaml())
        return config

    assert train(tiny.config(), run, stop_after=2) == 0
    before = (run / "journal.jsonl").read_bytes()
    changed = {"train.epochs": 4, "optimizer.groups.norm.weight_decay": 0, "data.workers": 1}
    assert train(edited(**changed), run) == Exit.USER_ERROR
    message = capsys.readouterr().err
    assert "train.epochs=4 instead of 3" in message
    assert "optimizer.groups.norm.weight_decay=0.0 instead of None" in message
    assert "data.workers=" not in message
    assert (run / "journal.jsonl").read_bytes() == before  # a refusal is no end of the run
    free = {"data.workers": 1, "data.reader": "torch", "train.log_every": 3, "train.zero_stage": 1}
    assert train(edited(**free), run, stop_after=4) == 0


def test_a_checkpoint_of_another_shape_lists_the_keys(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = tiny.config(), tmp_path / "run"
    assert train(config, run, stop_after=2) == 0

    def other(state: dict[str, Any]) -> dict[str, Any]:
        name = linear(state)
        return {k: v for k, v in state.items() if k != name} | {"extra": torch.zeros(1)}

    edit(run, "model", other)
    assert train(config, run) == Exit.USER_ERROR
    message = capsys.readouterr().err
    assert "extra (unknown)" in message
    assert "(missing)" in message


def edit(run: Path, name: str, change: Any) -> None:
    """Change one state of the newest checkpoint, and make its hashes right again."""
    store = CheckpointStore(run / "checkpoints", World(), 3)
    newest = store.newest()
    assert newest is not None
    states = {state: newest.load(state) for state in newest.states}
    states[name] = change(states[name])
    own = states.pop("rank-00000")
    for path in newest.path.iterdir():
        path.unlink()
    newest.path.rmdir()
    store.save(newest.step, states, own)


def test_every_checkpoint_bad_refuses_to_start_again(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = tiny.config(), tmp_path / "run"
    assert train(config, run, stop_after=2) == 0
    for path in run.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(b"")
    assert train(config, run) == Exit.USER_ERROR
    assert "are damaged" in capsys.readouterr().err


def test_a_run_whose_checkpoints_are_gone_does_not_start_again(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scratch file systems remove what is old."""
    config, run = tiny.config(), tmp_path / "run"
    assert train(config, run, stop_after=2) == 0
    checkpoints = run / "checkpoints"
    for gone in (lambda: shutil.rmtree(checkpoints), lambda: None):  # the second finds it empty
        gone()
        assert train(config, run) == Exit.USER_ERROR
        message = capsys.readouterr().err
        assert f"{checkpoints} is empty, though this run had saved step 2" in message
        assert "from a backup, or start a new run with another --run folder" in message
    assert "loss" not in (run / "logs" / "rank-0.log").read_text().partition("resume with")[2]


def test_a_run_that_never_saved_starts_again(tiny: Tiny, tmp_path: Path) -> None:
    config, run = tiny.config(**{"optimizer.lr": 1e30, "schedule.name": "constant"}), tmp_path / "r"
    for _ in range(2):
        assert train(config, run) == Exit.NON_FINITE
    assert (run / "logs" / "rank-0.log").read_text().count("starting a new run") == 2


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(
    tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny.config(**{"checkpoints.every_steps": 2})
    assert train(config, tmp_path / "whole") == 0
    assert train(config, tmp_path / "run", stop_after=6) == 0
    (tmp_path / "run" / "checkpoints" / "step-000000006" / "engine.safetensors").write_bytes(b"x")
    assert train(config, tmp_path / "run") == 0
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")
    steps = [step for step, _ in history(tmp_path / "run")["train/loss"]]
    assert steps == sorted(set(steps))


def test_a_checkpoint_that_cannot_be_written_does_not_end_training(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_state

    def full(path: Path, state: Any) -> None:
        if ".partial-step-000000004" in str(path):
            raise OSError(28, "No space left on device")
        written(path, state)

    monkeypatch.setattr(checkpoint, "write_state", full)
    config = tiny.config(**{"checkpoints.every_steps": 2, "train.epochs": 2})
    assert train(config, tmp_path / "run") == 0
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints" / "step-000000004").exists()


def test_the_last_checkpoint_that_cannot_be_written_is_an_error(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, state: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_state", full)
    assert train(tiny.config(), tmp_path / "run", stop_after=2) == Exit.USER_ERROR


@pytest.mark.parametrize("supported", [True, False])
def test_a_precision_that_the_cpu_imitates_is_warned_of(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supported: bool
) -> None:
    monkeypatch.setattr("pipeline.training.run.has_kernels", lambda precision: supported)
    assert train(tiny.config(), tmp_path / "run", stop_after=1) == 0
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert ("train.precision=fp32 is faster here" in log) != supported


def test_the_digest_depends_on_the_order_of_keys() -> None:
    class Keys:
        def __init__(self, *keys: str) -> None:
            self.keys = keys

    def after(*batches: Keys) -> str:
        progress = Progress()
        for batch in batches:
            progress.count(batch)  # type: ignore[arg-type]
        return progress.keys_digest

    assert after(Keys("a", "b")) != after(Keys("b", "a"))
    assert after(Keys("a"), Keys("b")) != after(Keys("b"), Keys("a"))


def test_steps_per_epoch_come_from_the_manifest(tiny: Tiny) -> None:
    config = tiny.config(**{"train.accumulation": 2})
    planned = plan(config, world_size=2)
    assert planned.steps_per_epoch == Manifest.load(tiny.shards).train.samples // 16 == 4


def test_state_files_hold_no_pickle(finished: tuple[Config, Path]) -> None:
    _, run = finished
    files = [path for path in (run / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        if path.suffix == ".safetensors":
            read_state(path)
