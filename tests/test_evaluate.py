"""Evaluation against the definitions, for any number of ranks."""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_prep.manifest import Manifest
from pipeline import evaluate as evaluation
from pipeline.config import Augmentation
from pipeline.data import eval_loader
from pipeline.distributed import World
from pipeline.models import Network, create_model
from pipeline.models.cost import measure
from pipeline.models.routers import Gate
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
