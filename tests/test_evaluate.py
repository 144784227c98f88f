"""Evaluation against the definitions, for any number of ranks."""

import functools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_prep import files
from data_prep.manifest import Manifest
from pipeline import evaluate as evaluation
from pipeline.config import Augmentation
from pipeline.data import Batch, eval_loader
from pipeline.distributed import World
from pipeline.models import Network, Output, create_model
from pipeline.models.cost import measure
from pipeline.models.norms import BatchNorm
from pipeline.models.routers import Gate
from pipeline.tasks import task
from tests.data import shard_set
from tests.training.processes import on_ranks


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """64 test images in uneven shards of 33 and 31."""
    return shard_set.build(tmp_path_factory.mktemp("set"), train=(8,), test=(33, 31))


def network() -> Network:
    """Gates that disagree about the images."""
    torch.manual_seed(3)
    model = create_model("dr_resnet16")
    for module in model.modules():
        if isinstance(module, Gate):
            torch.nn.init.normal_(module.hidden.weight, std=3.0)
            torch.nn.init.normal_(module.scores.weight, std=3.0)
            torch.nn.init.zeros_(module.scores.bias)
    return model


def evaluated(manifest: Manifest, world: World) -> tuple[evaluation.Summary, evaluation.Samples]:
    model = network()
    loader = eval_loader(
        manifest, reader="torch", augment=Augmentation(), batch_size=10, world=world, workers=0
    )
    found = evaluation.evaluate(model, loader, world, measure(model), "test", 7)
    assert model.training
    return found


@pytest.fixture(scope="module")
def alone(manifest: Manifest) -> tuple[evaluation.Summary, evaluation.Samples]:
    return evaluated(manifest, World())


@pytest.mark.parametrize(("classes", "top5"), [(5, None), (6, 5 / 6)])
def test_the_best_five_count_where_there_are_more_classes(classes: int, top5: float | None) -> None:
    logits = torch.arange(float(classes)).expand(classes, -1)  # the first class is never among five
    keys = tuple(map(str, range(classes)))
    batch = Batch(torch.zeros(classes, 3, 8, 8), torch.arange(classes), keys)
    part = evaluation.CLASSIFICATION.results(Output(logits, ()), batch, 0)
    execution = task.Summary(
        split="test",
        step=1,
        samples=classes,
        mean_steps=0.0,
        maximal_steps=0,
        steps_histogram=(classes,),
        rates={},
        multiply_adds=1.0,
        nominal_multiply_adds=1,
        images_per_second=1.0,
    )
    steps = np.zeros((classes, 0), np.int64)
    summary, _ = evaluation.CLASSIFICATION.conclude([part], execution, np.array(keys), steps)
    assert summary.top5 == (None if top5 is None else pytest.approx(top5))
    assert ("top5" in summary.results) == ("top-5" in dict(summary.rows)) == (top5 is not None)


def test_the_summary_by_definition(
    manifest: Manifest, alone: tuple[evaluation.Summary, evaluation.Samples]
) -> None:
    summary, samples = alone
    model = network().eval()
    loader = eval_loader(
        manifest, reader="torch", augment=Augmentation(), batch_size=64, world=World(), workers=0
    )
    (batch,) = loader
    with torch.no_grad():
        output = model(batch.images)
    labels, logits = batch.labels, output.logits
    places = (logits > logits.gather(1, labels[:, None])).sum(1)  # better classes than the true one
    steps = torch.stack([route.executed.sum(1) for route in output.routes], 1)
    assert summary.samples == 64
    assert summary.step == 7
    assert summary.top1 == pytest.approx(float((places < 1).float().mean()))
    assert summary.top5 == pytest.approx(float((places < 5).float().mean()))
    assert summary.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    assert summary.maximal_steps == 4
    assert summary.mean_steps == pytest.approx(float(steps.sum(1).float().mean()))
    assert summary.steps_histogram == tuple(np.bincount(steps.sum(1), minlength=5))
    assert 0 < summary.mean_steps < 4
    for route in output.routes:
        rates = route.executed.float().mean(0).tolist()
        assert summary.rates[route.cell] == pytest.approx(rates)
    assert summary.multiply_adds == pytest.approx(measure(model).executed(summary.rates))
    assert summary.multiply_adds < summary.nominal_multiply_adds
    assert tuple(samples.keys) == batch.keys
    assert samples.labels.tolist() == labels.tolist()
    assert samples.predictions.tolist() == logits.argmax(1).tolist()
    assert samples.steps.tolist() == steps.tolist()


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same(
    manifest: Manifest,
    alone: tuple[evaluation.Summary, evaluation.Samples],
    ranks: int,
    tmp_path: Path,
) -> None:
    summary, samples = alone
    for other, others in on_ranks(functools.partial(evaluated, manifest), ranks, tmp_path / "r"):
        assert replace(
            other, images_per_second=summary.images_per_second, loss=summary.loss
        ) == pytest.approx(summary)
        assert other.loss == pytest.approx(summary.loss, rel=1e-5)
        assert others.keys.tolist() == samples.keys.tolist()
        assert others.steps.tolist() == samples.steps.tolist()
        np.testing.assert_allclose(others.losses, samples.losses, rtol=1e-3, atol=1e-5)


class BesideASlowOne(World):
    """A rank that took two seconds for most images, beside one that took four for the others."""

    def gather(self, value: Any) -> list[Any]:
        cells, parts, _ = value
        return [(cells, parts, (2.0, 50)), (cells, [], (4.0, 14))]


def test_images_per_second_wait_for_the_slowest_rank(manifest: Manifest) -> None:
    summary, _ = evaluated(manifest, BesideASlowOne())
    assert summary.images_per_second == 64 / 4


@pytest.mark.parametrize(("batch", "images"), [(10, 54), (40, 24), (64, 64)])
def test_the_first_batch_counts_only_where_it_is_alone(
    manifest: Manifest, monkeypatch, batch: int, images: int
) -> None:
    """It waits for readers that start and a network that is compiled: 100 seconds here."""
    clock = iter([0.0, *range(100, 200)])
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: float(next(clock)))
    model = network()
    options = {"reader": "torch", "augment": Augmentation(), "world": World(), "workers": 0}
    loader = eval_loader(manifest, batch_size=batch, **options)
    summary, _ = evaluation.evaluate(model, loader, World(), measure(model), "test", 7)
    seconds = 100 if images == 64 else math.ceil(64 / batch) - 1
    assert summary.images_per_second == images / seconds


def test_a_stop_is_asked_for_once_a_second_and_leaves_the_model_as_it_was(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven batches of half a second; the pace is known after the first."""
    clock, done, asked = [0.0], [0], []

    def batch_done(images: int) -> None:
        clock[0] += 0.5
        done[0] += 1

    def stop(at: int) -> bool:
        asked.append(done[0])
        return done[0] >= at

    monkeypatch.setattr(evaluation.time, "monotonic", lambda: clock[0])
    model = network()
    loader = eval_loader(
        manifest, reader="torch", augment=Augmentation(), batch_size=10, world=World(), workers=0
    )
    arguments = (model, loader, World(), measure(model), "test", 7)
    whole, _ = evaluation.evaluate(
        *arguments, on_batch=batch_done, stop_requested=lambda: stop(at=99)
    )
    assert whole.samples == 64
    assert asked == [0, 1, 3, 5]
    done[0] = 0
    with pytest.raises(evaluation.EvaluationStopped):
        evaluation.evaluate(*arguments, on_batch=batch_done, stop_requested=lambda: stop(at=3))
    assert done == [3]
    assert model.training


def test_what_is_saved_comes_back(
    alone: tuple[evaluation.Summary, evaluation.Samples], tmp_path: Path
) -> None:
    summary, samples = alone
    for _ in range(2):  # again, over the one before
        evaluation.save(tmp_path / "set-test", summary, samples)
    found, stored = evaluation.load(tmp_path / "set-test")
    assert found == summary
    for name in ("keys", "labels", "predictions", "losses", "steps"):
        assert (getattr(stored, name) == getattr(samples, name)).all()
    assert [path.name for path in tmp_path.iterdir()] == ["set-test"]


WATCHED = ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "open")
watch: list[Callable[[str], None]] = []


def on_audit(event: str, arguments: tuple[object, ...]) -> None:
    if watch and event in WATCHED:
        look = watch.pop()  # looking opens files, too
        look(event)
        watch.append(look)


sys.addaudithook(on_audit)


def test_at_every_moment_one_evaluation_is_there_whole(
    alone: tuple[evaluation.Summary, evaluation.Samples], tmp_path: Path
) -> None:
    """A kill leaves what is there before one of the operations on files."""
    (summary, samples), folder = alone, tmp_path / "set-test"
    evaluation.save(folder, summary, samples)
    seen = []

    def look(event: str) -> None:
        found, stored = evaluation.load(folder)
        assert len(stored.keys) == found.samples
        seen.append(found.step)

    watch.append(look)
    try:
        evaluation.save(folder, replace(summary, step=8), samples)
    finally:
        watch.clear()
    assert set(seen) == {7, 8}
    assert seen == sorted(seen)
    assert evaluation.load(folder)[0].step == 8


def test_where_folders_cannot_be_exchanged_a_kill_leaves_both_aside(
    alone: tuple[evaluation.Summary, evaluation.Samples],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on NFS."""
    (summary, samples), folder = alone, tmp_path / "set-test"
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if target == folder and not folder.exists():
            raise KeyboardInterrupt
        return rename(path, target)

    evaluation.save(folder, summary, samples)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluation.save(folder, replace(summary, step=8), samples)
    aside = sorted(tmp_path.iterdir())
    assert [evaluation.load(path)[0].step for path in aside] == [7, 8]
    for step in (9, 10):
        evaluation.save(folder, replace(summary, step=step), samples)
        assert evaluation.load(folder)[0].step == step
        assert list(tmp_path.iterdir()) == [folder]


def test_a_static_network_has_no_steps(manifest: Manifest) -> None:
    model = create_model("resnet20")
    loader = eval_loader(
        manifest, reader="torch", augment=Augmentation(), batch_size=32, world=World(), workers=0
    )
    summary, samples = evaluation.evaluate(model, loader, World(), measure(model), "test", 0)
    assert (summary.maximal_steps, summary.mean_steps, summary.rates) == (0, 0.0, {})
    assert summary.steps_histogram == (64,)
    assert samples.steps.shape == (64, 0)
    assert summary.multiply_adds == summary.nominal_multiply_adds


def at(manifest: Manifest, model: Network, steps: int | None) -> evaluation.Summary:
    loader = eval_loader(
        manifest, reader="torch", augment=Augmentation(size=16), batch_size=32, world=World(),
        workers=0,
    )  # fmt: skip
    cost = measure(model, 16, steps)
    return evaluation.evaluate(model, loader, World(), cost, "test", 3, steps=steps)[0]


def test_an_adjustable_network_answers_at_the_steps_it_is_asked_for(manifest: Manifest) -> None:
    torch.manual_seed(0)
    model = create_model("rc_r2")
    for module in model.modules():
        if isinstance(module, BatchNorm):
            torch.nn.init.normal_(module.bias)
    found = {steps: at(manifest, model, steps) for steps in (2, 3, 4)}
    for steps, summary in found.items():
        assert summary.step_choice == steps
        assert summary.rates["stages.1.0"] == [1.0] * steps + [0.0] * (4 - steps)
        assert (summary.mean_steps, summary.maximal_steps) == (2 * steps, 8)
        assert summary.multiply_adds == measure(model, 16, steps).nominal
        metrics = summary.metrics()
        assert metrics[f"eval_steps/{steps}/top1"] == metrics["eval/top1"] == summary.top1
        assert metrics[f"eval_steps/{steps}/loss"] == summary.loss
    assert len({summary.loss for summary in found.values()}) == 3
    largest = at(manifest, model, None)
    assert replace(largest, images_per_second=found[4].images_per_second) == found[4]
    with pytest.raises(ValueError, match="built for 2, 3, 4 steps"):
        at(manifest, model, 5)


def test_summaries_from_before_there_was_a_choice_are_read(
    alone: tuple[evaluation.Summary, evaluation.Samples], tmp_path: Path
) -> None:
    evaluation.save(tmp_path / "set-test", *alone)
    file = tmp_path / "set-test" / evaluation.SUMMARY
    values = json.loads(file.read_text())
    assert values.pop("step_choice") is None
    file.write_text(json.dumps(values))
    assert evaluation.load(tmp_path / "set-test")[0] == alone[0]
