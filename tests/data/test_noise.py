"""Pairs of noisy and clean images, by both readers, for any number of ranks, from any step."""

import itertools

import numpy as np
import pytest
import torch

from data_prep.manifest import Manifest
from pipeline.config import Augmentation
from pipeline.data import Noise, eval_loader, train_loader
from pipeline.data.augment import Transform, turn
from pipeline.data.order import BatchPlan, EvaluationPlan
from pipeline.distributed import World
from tests.conftest import BSD_SIZES
from tests.data import shard_set

READERS = [("dali", 2), ("torch", 0), ("torch", 2)]
PATCH = Augmentation(crop="pad", padding=0, size=40, flip=True, rotate=True)
readers = pytest.mark.parametrize(("reader", "workers"), READERS)


@pytest.fixture(scope="module")
def manifest(bsd_shards):
    return Manifest.load(bsd_shards)


def training(manifest, reader="torch", workers=0, world=None, sigma=25.0, seed=3, **options):
    settings = {"global_batch": 12, "accumulation": 2, "repeats": 3} | options
    return train_loader(
        manifest,
        reader=reader,
        workers=workers,
        augment=settings.pop("augment", PATCH),
        world=world or World(),
        seed=seed,
        noise=Noise(sigma, seed),
        **settings,
    )


def evaluation(manifest, reader="torch", workers=0, world=None, sigma=25.0, seed=3, split=None):
    return eval_loader(
        manifest,
        reader=reader,
        workers=workers,
        augment=PATCH,
        world=world or World(),
        batch_size=256,
        split=split,
        noise=Noise(sigma, seed),
    )


def noise_of(batch):
    return batch.images - batch.targets


def assert_same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)


@readers
def test_what_a_batch_is(manifest, reader, workers):
    batch = next(iter(training(manifest, reader, workers)))
    assert batch.images.shape == batch.targets.shape == (6, 1, 40, 40)
    assert batch.images.dtype == batch.targets.dtype == torch.float32
    levels = batch.targets * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert 0 <= batch.targets.min() < batch.targets.max() <= 1


@pytest.mark.parametrize("make", [training, evaluation])
def test_readers_agree_bit_by_bit(manifest, make):
    for reader in READERS[1:]:
        assert_same(make(manifest, *READERS[0]), make(manifest, *reader))


@pytest.mark.parametrize("sigma", [15, 25, 50])
def test_noise_is_white_gaussian_of_its_level(manifest, sigma):
    noise = torch.cat([noise_of(batch).flatten() for batch in training(manifest, sigma=sigma)])
    count = len(noise)
    assert float(noise.std()) * 255 == pytest.approx(sigma, rel=4 / (2 * count) ** 0.5)
    assert abs(float(noise.mean())) * 255 < 4 * sigma / count**0.5
    beyond = (noise.abs() * 255 > 2 * sigma).float().mean()
    assert float(beyond) == pytest.approx(0.0455, abs=4 * (0.0455 / count) ** 0.5)
    neighbours = np.corrcoef(noise[:-1].numpy(), noise[1:].numpy())[0, 1]
    assert abs(neighbours) < 4 / count**0.5


def test_the_level_is_a_share_of_the_largest_pixel_value():
    rows = EvaluationPlan(1, 1, 0, 1).rows(0, 0)
    noise = Noise(25.0, 0).of_evaluation(rows, 2000, 2000)
    assert noise.std() == pytest.approx(25 / 255, rel=4 / (2 * noise.size) ** 0.5)


def test_every_visit_has_noise_of_its_own(manifest):
    loader = training(manifest)
    patches = [patch for _ in range(2) for batch in loader for patch in noise_of(batch)]
    firsts = {round(float(patch[0, 0, 0]), 6) for patch in patches}
    assert len(patches) == 2 * 48
    assert len(firsts) == len(patches)


@readers
@pytest.mark.parametrize("stop", [1, 5, 8, 11])
def test_resuming_continues_bit_by_bit(manifest, reader, workers, stop):
    loader = training(manifest, reader, workers)
    whole = [batch for _ in range(2) for batch in loader]
    assert len(whole) == 2 * loader.steps_per_epoch == 16
    resumed = training(manifest, reader, workers)
    resumed.load_state_dict(dict(zip(("epoch", "step"), divmod(stop, 8), strict=True)))
    after = [batch for _ in range(2 - stop // 8) for batch in resumed]
    assert_same(after, whole[stop:])


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (3, 1), (1, 4), (2, 3)])
def test_any_number_of_ranks_trains_on_the_same_pairs(manifest, world_size, accumulation):
    whole = list(training(manifest, accumulation=1))
    ranks = [
        list(training(manifest, world=World(rank, world_size), accumulation=accumulation))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = [
            batches[step * accumulation + micro]
            for micro, batches in itertools.product(range(accumulation), ranks)
        ]
        assert batch.keys == sum((part.keys for part in parts), ())
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
        assert torch.equal(batch.targets, torch.cat([part.targets for part in parts]))


@readers
@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_evaluation_takes_each_whole_image_once(manifest, reader, workers, world_size):
    keys, shapes = [], []
    for rank in range(world_size):
        loader = evaluation(manifest, reader, workers, world=World(rank, world_size))
        for batch in loader:
            keys += batch.keys
            shapes.append(tuple(batch.images.shape))
    assert keys == [f"test-{number:08d}" for number in range(5)]
    assert sorted(shapes) == sorted((1, 1, *size) for size in BSD_SIZES["test68"])


def test_the_noise_of_evaluation_is_the_samples_own(manifest):
    alone = [noise_of(batch) for batch in evaluation(manifest)]
    again = [noise_of(batch) for batch in evaluation(manifest)]
    ranks = [noise_of(b) for rank in (0, 1) for b in evaluation(manifest, world=World(rank, 2))]
    assert all(map(torch.equal, alone, again))
    assert all(map(torch.equal, alone, ranks))
    twice = [noise_of(batch) for batch in evaluation(manifest, sigma=50)]
    for one, two in zip(alone, twice, strict=True):
        torch.testing.assert_close(2 * one, two, atol=1e-6, rtol=1e-5)
    other = [noise_of(batch) for batch in evaluation(manifest, seed=4)]
    assert not any(map(torch.equal, alone, other))


def test_another_split_can_be_evaluated(manifest):
    batches = list(evaluation(manifest, split="set12"))
    assert [batch.keys[0] for batch in batches] == ["set12-00000000", "set12-00000001"]


def test_patches_are_cut_flipped_and_turned_from_the_images(manifest):
    """Every patch is found in its image, in one of the eight positions of a square."""
    images = {}
    for number in range(16):
        pixels = shard_set.picture(number, 48, 48)[..., 0]
        images[number] = torch.from_numpy(pixels.copy())
    positions = set()
    for batch in training(manifest):
        for patch in (batch.targets * 255).round().byte()[:, 0]:
            positions |= _places(patch, images.values())
    turns, flips, corners = zip(*positions, strict=True)
    assert set(turns) == {0, 1, 2, 3}
    assert set(flips) == {False, True}
    assert len(set(corners)) > 20


def _places(patch, images):
    found = set()
    for turns, flip in itertools.product(range(4), (False, True)):
        upright = patch.rot90(-turns)
        upright = upright.flip(1) if flip else upright
        for image in images:
            windows = image.unfold(0, 40, 1).unfold(1, 40, 1)
            hits = (windows == upright).flatten(2).all(2).nonzero().tolist()
            found |= {(turns, flip, tuple(hit)) for hit in hits}
    assert found
    return found


def test_a_turn_is_counter_clockwise():
    image = torch.arange(4, dtype=torch.uint8).view(1, 2, 2, 1)
    turned = turn(image.expand(4, -1, -1, -1), np.arange(4))[..., 0].tolist()
    assert turned == [[[0, 1], [2, 3]], [[1, 3], [0, 2]], [[3, 2], [1, 0]], [[2, 0], [3, 1]]]


def test_turns_are_uniform_follow_the_sample_and_are_for_training_alone():
    plan = BatchPlan(8000, 8000, 1, 0, 1, 3, (8000,))
    made = Transform(Augmentation(rotate=True), plan, (32,) * 4)
    turns = made.turns(0, plan.rows(0, 0))
    counts = np.bincount(turns, minlength=4) / 8000
    assert abs(counts - 0.25).max() < 4 * (0.1875 / 8000) ** 0.5
    half = BatchPlan(8000, 8000, 1, 1, 2, 3, (8000,))
    part = Transform(Augmentation(rotate=True), half, (32,) * 4).turns(0, half.rows(0, 0))
    assert np.array_equal(part, turns[4000:])
    evaluated = Transform(Augmentation(rotate=True), EvaluationPlan(8, 4, 0, 1), (32,) * 4)
    assert evaluated.turns(0, evaluated.plan.rows(0, 0)) is None
    assert Transform(Augmentation(), plan, (32,) * 4).turns(0, plan.rows(0, 0)) is None


def test_an_epoch_visits_every_image_as_often_as_asked(manifest):
    loader = training(manifest, repeats=3, accumulation=1)
    keys = [key for batch in loader for key in batch.keys]
    assert loader.steps_per_epoch == 4
    assert sorted(keys) == sorted(3 * [f"train-{number:08d}" for number in range(16)])


def test_more_visits_make_room_for_a_larger_batch(manifest):
    assert len(list(training(manifest, global_batch=48, accumulation=1))) == 1
    with pytest.raises(ValueError, match="global batch of 49 exceeds the 48 training samples"):
        training(manifest, global_batch=49, accumulation=1)


@pytest.mark.parametrize("augment", [{"crop": "random_resized", "flip": True}, {"crop": "none"}])
def test_readers_agree_on_grey_images_that_are_resized(manifest, augment):
    options = {"augment": Augmentation(size=24, **augment)}
    assert_same(training(manifest, "dali", 2, **options), training(manifest, **options))
