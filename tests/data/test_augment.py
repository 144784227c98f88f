"""Augmentation against its definitions: PIL for colour, torchvision for crops."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from shard_set import picture
from torchvision.transforms.v2 import RandomResizedCrop, functional

from pipeline.config import Augmentation
from pipeline.data.augment import (
    LIGHTING_EIGENVALUES,
    LIGHTING_EIGENVECTORS,
    Normalise,
    Transform,
    pad_crop_boxes,
    photometric,
    resized_crop_boxes,
)
from pipeline.data.order import BatchPlan, EvaluationPlan

CPU = torch.device("cpu")
MANY = 20_000
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def transform(world_size=1, rank=0, accumulation=1, batch=MANY, size=(32, 32, 32, 32), **augment):
    plan = BatchPlan(batch, batch, accumulation, rank, world_size, 3, (batch,))
    return Transform(Augmentation(**augment), plan, size)


def geometry(made, epoch=0, step=0, size=(32, 32)):
    rows = made.plan.rows(epoch, step)
    return made.geometry(epoch, rows, np.tile(size, (len(rows.rows), 1)))


def test_half_of_the_images_are_flipped():
    flips = geometry(transform(flip=True)).flips
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / math.sqrt(MANY)
    assert not geometry(transform()).flips.any()


def test_pad_crops_are_uniform_over_all_offsets():
    boxes = geometry(transform(crop="pad", padding=4)).boxes
    assert (boxes[:, 2:] == 32).all()
    for corner in boxes[:, :2].T:
        values, counts = np.unique(corner, return_counts=True)
        assert values.tolist() == list(range(-4, 5))
        assert abs(counts / MANY - 1 / 9).max() < 4 * math.sqrt(1 / 9 / MANY)
    assert abs(np.corrcoef(boxes[:, 0], boxes[:, 1])[0, 1]) < 0.03


def test_pad_crops_of_a_larger_image_reach_both_ends():
    draws = np.array([[0.0, 0.0], [1 - 1e-12, 1 - 1e-12]])
    boxes = pad_crop_boxes(draws, np.array([[40, 50]] * 2), 32, 4)
    assert boxes.tolist() == [[-4, -4, 32, 32], [12, 22, 32, 32]]


def test_a_crop_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"images of 20 pixels; give size <= 28"):
        transform(crop="pad", size=(20, 64, 32, 64))


def test_resized_crops_are_distributed_as_torchvisions():
    height, width = 375, 500
    boxes = geometry(transform(crop="random_resized"), size=(height, width)).boxes
    torch.manual_seed(0)
    make = RandomResizedCrop(32, SCALE, RATIO)
    image = torch.empty(3, height, width)
    theirs = [make.make_params([image]) for _ in range(4000)]
    expected = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs])

    def features(b):
        area, ratio = b[:, 2] * b[:, 3], np.log(b[:, 3] / b[:, 2])
        top = b[:, 0] / np.maximum(height - b[:, 2], 1)
        left = b[:, 1] / np.maximum(width - b[:, 3], 1)
        return np.stack([area / (height * width), ratio, top, left], axis=1)

    quantiles = np.linspace(0.1, 0.9, 9)
    ours, reference = (np.quantile(features(b), quantiles, axis=0) for b in (boxes, expected))
    assert abs(ours - reference).max() < 0.04
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all()
    assert (boxes[:, 1] + boxes[:, 3] <= width).all()


@pytest.mark.parametrize("size", [(10, 200), (200, 10), (31, 31)])
def test_where_no_attempt_fits_the_central_box_is_torchvisions(size):
    scale = (4.0, 4.0)
    draws = np.random.default_rng(0).random((5, 10, 4))
    boxes = resized_crop_boxes(draws, np.tile(size, (5, 1)), scale, RATIO)
    theirs = RandomResizedCrop(32, scale, RATIO).make_params([torch.empty(3, *size)])
    expected = [theirs["top"], theirs["left"], theirs["height"], theirs["width"]]
    assert boxes.tolist() == [expected] * 5


def test_draws_follow_the_sample_for_any_number_of_ranks():
    options = {"crop": "random_resized", "flip": True, "photometric": True, "batch": 24}
    alone = transform(**options)
    whole, colour = geometry(alone), alone.colour(0, alone.plan.rows(0, 0))
    for world_size, accumulation in ((2, 1), (3, 2), (1, 4)):
        for rank in range(world_size):
            part = transform(world_size, rank, accumulation, **options)
            for step in range(accumulation):
                rows = part.plan.rows(0, step)
                drawn = geometry(part, step=step)
                assert np.array_equal(drawn.boxes, whole.boxes[rows.rows])
                assert np.array_equal(drawn.flips, whole.flips[rows.rows])
                matrix = part.colour(0, rows).matrix
                assert np.array_equal(matrix, colour.matrix[rows.rows])


def test_draws_differ_between_steps_and_epochs():
    plan = BatchPlan(64, 16, 1, 0, 1, 3, (64,))
    made = Transform(Augmentation(crop="pad", flip=True, photometric=True), plan, (32,) * 4)
    boxes = [geometry(made, epoch, step).boxes for epoch in (0, 1) for step in (0, 1)]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(boxes, 2))
    first, second = (made.colour(0, plan.rows(0, step)).matrix for step in (0, 1))
    assert not np.array_equal(first, second)


def test_evaluation_is_never_augmented():
    augment = Augmentation(crop="pad", flip=True, photometric=True)
    plan = EvaluationPlan(10, 4, 0, 1)
    made = Transform(augment, plan, (32,) * 4)
    assert (made.crop, made.flip, made.resize, made.margin) == ("none", False, None, 0)
    assert made.colour(0, plan.rows(0, 0)) is None


ENHANCERS = (ImageEnhance.Contrast, ImageEnhance.Brightness, ImageEnhance.Color)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_colour_is_pils_image_enhance_in_any_order(order):
    """On mid-range images nothing clips, so one affine map equals PIL's three.

    Up to PIL's cutting of fractions after each of them.
    """
    factors = np.array([0.7, 1.2, 0.6])
    pixels = picture(1) // 3 + 70
    image = Image.fromarray(pixels)
    for operation in order:
        image = ENHANCERS[operation](image).enhance(factors[operation])
    colour = photometric(factors[None], np.array([order]), np.zeros((1, 3)))
    ours = identity()(torch.from_numpy(pixels.copy())[None], colour)[0].permute(1, 2, 0) * 255
    assert abs(ours.numpy() - np.asarray(image, dtype=float)).max() < 3


def identity(size=32):
    return Normalise((0, 0, 0), (1, 1, 1), size, CPU)


def test_lighting_adds_the_weighted_principal_components():
    weights = np.array([[0.1, -0.2, 0.3]])
    colour = photometric(np.ones((1, 3)), np.array([[0, 1, 2]]), weights)
    expected = sum(
        255 * weights[0, i] * LIGHTING_EIGENVALUES[i] * LIGHTING_EIGENVECTORS[:, i]
        for i in range(3)
    )
    pixels = torch.full((1, 32, 32, 3), 128, dtype=torch.uint8)
    ours = identity()(pixels, colour)[0, :, 0, 0] * 255
    assert np.allclose(ours.numpy(), 128 + expected, atol=1e-3)


def test_lighting_is_that_of_imagenet_as_published():
    """Krizhevsky et al. 2012, Sec. 4.1, numbers of fb.resnet.torch: components one by one, RGB."""
    colour = photometric(np.ones((3, 3)), np.array([[0, 1, 2]] * 3), np.eye(3))
    expected = [
        0.2175 * np.array([-0.5675, -0.5808, -0.5836]),
        0.0188 * np.array([0.7192, -0.0045, -0.6948]),
        0.0045 * np.array([0.4009, -0.8140, 0.4203]),
    ]
    np.testing.assert_allclose(colour.offset / 255, expected, rtol=1e-12)


def test_eigenvectors_are_orthonormal():
    product = LIGHTING_EIGENVECTORS.T @ LIGHTING_EIGENVECTORS
    assert np.allclose(product, np.eye(3), atol=1e-3)


def test_drawn_colour_has_the_stated_distribution():
    made = transform(photometric=True)
    colour = made.colour(0, made.plan.rows(0, 0))
    # A grey image of value 1 sees contrast nowhere and colour nowhere: what is left is brightness.
    brightness = (colour.matrix + colour.mean_matrix).sum(axis=2)[:, 0]
    assert 0.5 <= brightness.min() < 0.51
    assert 1.49 < brightness.max() <= 1.5
    assert abs(brightness.mean() - 1) < 4 * (1 / math.sqrt(12)) / math.sqrt(MANY)
    deviation = 255 * 0.1 * np.sqrt(LIGHTING_EIGENVECTORS**2 @ LIGHTING_EIGENVALUES**2)
    assert np.allclose(colour.offset.std(axis=0), deviation, rtol=0.05)
    # With contrast c, mean_matrix maps a grey mean to (1 - c) of itself, times what comes later.
    assert abs(np.median(colour.mean_matrix.sum(axis=2)[:, 0])) < 0.02
    # Colour times contrast times brightness scale differences between channels.
    saturation = colour.matrix[:, 0, 0] - colour.matrix[:, 1, 0]
    assert abs(saturation.mean() - 1) < 0.02


def test_normalisation_is_torchvisions_and_channels_last():
    images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    ours = Normalise(mean, std, 16, CPU)(images, None)
    expected = functional.normalize(images.permute(0, 3, 1, 2) / 255, list(mean), list(std))
    assert torch.allclose(ours, expected, atol=1e-5)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_colour_is_clipped_to_the_pixel_range():
    bright = photometric(np.array([[1, 1.5, 1]]), np.array([[0, 1, 2]]), np.zeros((1, 3)))
    images = torch.full((1, 32, 32, 3), 200, dtype=torch.uint8)
    assert (identity()(images, bright) == 1).all()


def test_evaluation_resizes_then_cuts_the_centre():
    made = Transform(
        Augmentation(size=224, eval_resize=256), EvaluationPlan(10, 4, 0, 1), (300, 500, 300, 500)
    )
    assert (made.resize, made.margin) == (256, 16)
