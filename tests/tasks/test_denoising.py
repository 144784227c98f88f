"""The task of denoising by hand: loss, ratios, what an evaluation says and keeps."""

import functools
import math

import numpy as np
import pytest
import torch

from data_prep.manifest import Manifest
from pipeline import configure, tasks
from pipeline import evaluate as evaluation
from pipeline.config import Augmentation, Loss
from pipeline.data import Batch, Noise, eval_loader
from pipeline.distributed import World
from pipeline.models import Output, create_model
from pipeline.models.cost import measure
from pipeline.tasks import Classification, Denoising, denoising
from pipeline.tasks.denoising import psnr
from tests.training.processes import on_ranks

PATCH = Augmentation(crop="pad", padding=0, size=40)


def batch_of(noisy, clean):
    return Batch(torch.tensor(noisy)[:, None], torch.tensor(clean)[:, None], ("a", "b"))


def test_the_loss_is_equation_7_with_the_factor_of_its_settings():
    batch = batch_of([[[0.5, 0.5]], [[0.5, 0.5]]], [[[0.5, 0.1]], [[0.2, 0.5]]])
    restored = torch.tensor([[[0.6, 0.1]], [[0.2, 0.3]]])[:, None].requires_grad_()
    terms = Denoising().loss_terms(Output(restored, ()), batch, World())
    assert list(terms) == ["squared_error"]
    assert float(terms["squared_error"].detach()) == pytest.approx((0.1**2 + 0.2**2) / 2 / 2)
    terms["squared_error"].backward()
    # The gradient of half a square is the error itself, over the two images.
    expected = torch.tensor([[[0.1, 0.0]], [[0.0, -0.2]]])[:, None] / 2
    torch.testing.assert_close(restored.grad, expected)


def test_the_loss_is_in_fp32():
    batch = batch_of([[[0.5, 0.5]]], [[[0.5, 0.1]]])
    output = Output(batch.images.bfloat16(), ())
    assert Denoising().loss_terms(output, batch, World())["squared_error"].dtype == torch.float32


def test_psnr_by_hand():
    clean = torch.tensor([[[[0.0, 1.0]]], [[[0.5, 0.5]]]])
    images = torch.tensor([[[[0.1, 0.9]]], [[[0.5, 0.7]]]])
    expected = [10 * math.log10(1 / 0.01), 10 * math.log10(1 / 0.02)]
    assert psnr(images, clean).tolist() == pytest.approx(expected, rel=1e-5)


def test_psnr_is_of_clipped_images_and_finite_for_an_exact_one():
    clean = torch.tensor([[[[0.0, 1.0]]]])
    assert psnr(clean + torch.tensor([-3.0, 3.0]), clean).tolist() == [100.0]
    assert psnr(clean, clean).tolist() == [100.0]


def test_psnr_is_averaged_over_images_and_not_their_errors():
    batch = batch_of([[[0.1, 0.1]], [[0.01, 0.01]]], [[[0.0, 0.0]], [[0.0, 0.0]]])
    metrics = Denoising().training_metrics(Output(batch.images, ()), batch)
    assert float(metrics["psnr"]) == pytest.approx(30)


def test_the_configuration_says_which_task_it_is():
    values = {"name": "x", "model": "rc_r3_1", "data": {"path": "d"}}
    values["train"] = {"epochs": 1, "batch_size": 1}
    assert tasks.of(configure.build(values)) == Classification(Loss())
    assert tasks.of(configure.build(values, ["data.sigma=25"])) == Denoising()


def network():
    torch.manual_seed(0)
    model = create_model("rc_r3_2")
    torch.nn.init.normal_(model.last.weight, std=0.02)
    return model


def evaluated(manifest, world, split="test"):
    loader = eval_loader(
        manifest,
        reader="torch",
        augment=PATCH,
        batch_size=9,
        world=world,
        workers=0,
        split=split,
        noise=Noise(25, 0),
    )
    model = network()
    return evaluation.evaluate(model, loader, world, measure(model, 40), split, 7, task=Denoising())


@pytest.fixture(scope="module")
def manifest(bsd_shards):
    return Manifest.load(bsd_shards)


@pytest.fixture(scope="module")
def alone(manifest):
    return evaluated(manifest, World())


def test_an_evaluation_by_definition(manifest, alone):
    summary, samples = alone
    loader = eval_loader(
        manifest,
        reader="dali",
        augment=PATCH,
        batch_size=1,
        world=World(),
        workers=1,
        noise=Noise(25, 0),
    )
    model = network().eval()
    ratios = []
    for batch in loader:
        with torch.no_grad():
            restored = model(batch.images).prediction
        pair = []
        for images in (batch.images, restored):
            error = np.clip(images.numpy(), 0, 1).astype(float) - batch.targets.numpy()
            pair.append(10 * np.log10(1 / (error**2).mean()))
        ratios.append(pair)
    noisy, restored = zip(*ratios, strict=True)
    assert summary.samples == 5
    assert samples.noisy_psnr.tolist() == pytest.approx(noisy, rel=1e-5)
    assert samples.psnr.tolist() == pytest.approx(restored, rel=1e-4)
    assert summary.psnr == pytest.approx(np.mean(restored), rel=1e-4)
    assert summary.noisy_psnr == pytest.approx(np.mean(noisy), rel=1e-5)
    # 25 of 255 is 20.17 dB, and clipping makes it a little better.
    assert 20.1 < summary.noisy_psnr < 21
    assert summary.psnr != pytest.approx(summary.noisy_psnr)
    assert summary.gain == pytest.approx(summary.psnr - summary.noisy_psnr)
    assert (summary.mean_steps, summary.maximal_steps) == (6, 6)
    assert summary.metrics()["eval/psnr"] == summary.psnr
    assert summary.metrics()["eval/noisy_psnr"] == summary.noisy_psnr
    assert Denoising.score in summary.metrics()
    assert not {"eval/top1", "eval/loss"} & summary.metrics().keys()


def test_the_first_images_are_kept_to_be_looked_at(manifest, alone):
    _, samples = alone
    loader = eval_loader(
        manifest,
        reader="torch",
        augment=PATCH,
        batch_size=1,
        world=World(),
        workers=0,
        noise=Noise(25, 0),
    )
    batches = list(loader)[: denoising.EXAMPLES]
    assert samples.examples.dtype == np.uint8
    sizes = [batch.images.shape[2:] for batch in batches]
    height, width = (min(side) for side in zip(*sizes, strict=True))
    assert samples.examples.shape == (denoising.EXAMPLES, 3, height, width)
    for views, batch in zip(samples.examples, batches, strict=True):
        top, left = (batch.images.shape[2] - height) // 2, (batch.images.shape[3] - width) // 2
        for view, images in zip(views, (batch.targets, batch.images), strict=False):
            whole = (images[0, 0].clamp(0, 1) * 255).round().byte().numpy()
            assert (view == whole[top : top + height, left : left + width]).all()
        assert (views[2] != views[1]).any()


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same(manifest, alone, ranks, tmp_path):
    summary, samples = alone
    for other, others in on_ranks(functools.partial(evaluated, manifest), ranks, tmp_path / "r"):
        assert (other.samples, other.psnr) == (5, pytest.approx(summary.psnr, rel=1e-5))
        assert other.noisy_psnr == pytest.approx(summary.noisy_psnr)
        assert others.keys.tolist() == samples.keys.tolist()
        assert others.psnr.tolist() == pytest.approx(samples.psnr.tolist(), rel=1e-5)
        assert others.examples.shape == samples.examples.shape
        assert (others.examples[:, :2] == samples.examples[:, :2]).all()


def test_what_is_saved_comes_back(alone, tmp_path):
    summary, samples = alone
    evaluation.save(tmp_path / "set-test", summary, samples)
    found, stored = evaluation.load(tmp_path / "set-test")
    assert found == summary
    assert isinstance(stored, denoising.Samples)
    for name in ("keys", "psnr", "noisy_psnr", "examples", "steps"):
        assert (getattr(stored, name) == getattr(samples, name)).all()


def test_large_images_are_kept_in_part():
    images = torch.rand(1, 1, 300, 200)
    batch = Batch(images, images, ("a",))
    (kept,) = Denoising().results(Output(images, ()), batch, before=0)["examples"]
    assert kept.shape == (3, 160, 160)
    middle = (images[0, 0, 70:230, 20:180] * 255).round().byte()
    assert (kept[0] == middle.numpy()).all()
    assert Denoising().results(Output(images, ()), batch, before=3)["examples"] == []
