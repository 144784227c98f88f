"""Both readers against each other, against Pillow, and against an uninterrupted pass."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import shard_set
import torch
from PIL import Image

from pipeline.config import Augmentation
from pipeline.data import eval_loader, train_loader
from pipeline.data.augment import Transform
from pipeline.data.dali import DaliReader
from pipeline.data.order import BatchPlan
from pipeline.distributed import World
from tests.conftest import ROOT

READERS = [("dali", 2), ("torch", 0), ("torch", 2)]
SEVERAL_SIZES = ((40, 60), (64, 33), (32, 32), (48, 48))
FULL = Augmentation(crop="pad", flip=True, photometric=True)
MODES = {
    "none": Augmentation(),
    "flip": Augmentation(flip=True),
    "pad": Augmentation(crop="pad", flip=True),
    "full": FULL,
    "resized": Augmentation(crop="random_resized", flip=True),
    "imagenet": Augmentation(crop="random_resized", size=24, eval_resize=29, photometric=True),
}
# What one level of the smallest channel_std of the generated sets amounts to.
LEVEL = 1 / (255 * 0.2)

readers = pytest.mark.parametrize(("reader", "workers"), READERS)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    made = {}
    for extension, several in itertools.product(("png", "jpg"), (False, True)):
        sizes = SEVERAL_SIZES if several else ((32, 32),)
        root = tmp_path_factory.mktemp(f"{extension}-{len(sizes)}")
        made[extension, several] = shard_set.build(
            root, extension=extension, sizes=sizes, grey=True
        )
    return made


@pytest.fixture(scope="module")
def plain(sets):
    return sets["png", False]


def training(manifest, reader="dali", workers=2, augment=FULL, world=None, **options):
    options = {"global_batch": 12, "accumulation": 2, "seed": 3} | options
    return train_loader(
        manifest,
        reader=reader,
        workers=workers,
        augment=augment,
        world=world or World(),
        **options,
    )


def evaluation(manifest, reader="dali", workers=2, augment=FULL, world=None, batch_size=7):
    return eval_loader(
        manifest,
        reader=reader,
        workers=workers,
        augment=augment,
        world=world or World(),
        batch_size=batch_size,
    )


def assert_same(ours, theirs, tolerance=0.0):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.labels, b.labels)
        assert (a.images - b.images).abs().max() <= tolerance


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("extension", ["png", "jpg"])
@pytest.mark.parametrize("make", [training, evaluation])
def test_readers_agree(sets, make, extension, several, mode):
    """Exactly where nothing is resized; their resizing may round differently by two levels."""
    augment = MODES[mode]
    loaders = [make(sets[extension, several], *reader, augment=augment) for reader in READERS[:2]]
    resized = loaders[0]._transform.resize is not None
    # Contrast, brightness and colour together amplify a level by at most 1.5 cubed.
    gain = 1.5**3 if augment.photometric and make is training else 1
    assert_same(*loaders, tolerance=2.05 * LEVEL * gain if resized else 0)


@readers
def test_training_batches_are_what_pillow_and_numpy_make(plain, reader, workers):
    augment = Augmentation(crop="pad", padding=4, flip=True)
    plan = BatchPlan(64, 12, 1, 0, 1, 3, (40, 24))
    transform = Transform(augment, plan, plain.image_size)
    loader = training(plain, reader, workers, augment=augment, accumulation=1)
    for step, batch in enumerate(loader):
        rows = plan.rows(0, step)
        drawn = transform.geometry(0, rows, np.full((12, 2), 32))
        for row, sample in enumerate(rows.samples.tolist()):
            pixels = pillow_pixels(sample)
            top, left = drawn.boxes[row, :2] + 4
            pixels = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))[top : top + 32, left : left + 32]
            if drawn.flips[row]:
                pixels = pixels[:, ::-1]
            assert batch.keys[row] == f"train-{sample:08d}"
            assert batch.labels[row] == sample % 10
            assert torch.allclose(batch.images[row], normalised(pixels), atol=1e-5)


@readers
def test_evaluation_batches_are_pillows_resize_and_centre(plain, reader, workers):
    augment = Augmentation(size=24, eval_resize=40)
    (batch,) = evaluation(plain, reader, workers, augment=augment, batch_size=64)
    for row in range(64):
        image = Image.fromarray(pillow_pixels(64 + row)).resize((40, 40), Image.BILINEAR)
        expected = normalised(np.asarray(image.crop((8, 8, 32, 32))))
        assert (batch.images[row] - expected).abs().max() <= 1.05 * LEVEL


def pillow_pixels(number):
    pixels = shard_set.picture(number)
    return np.repeat(pixels[..., :1], 3, axis=2) if number % 3 == 0 else pixels


def normalised(pixels):
    values = (pixels / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.3]
    return torch.from_numpy(values.transpose(2, 0, 1)).float()


@readers
def test_what_a_batch_is(plain, reader, workers):
    batch = next(iter(training(plain, reader, workers)))
    assert batch.images.shape == (6, 3, 32, 32)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == torch.int64
    assert len(batch.keys) == 6


@readers
def test_a_batch_belongs_to_its_holder(plain, reader, workers):
    """Later batches leave it alone, and it leaves later passes alone."""
    kept, copies = [], []
    for batch in training(plain, reader, workers):
        kept.append(batch.images)
        copies.append(batch.images.clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


@readers
@pytest.mark.parametrize("stop", [1, 5, 9, 10, 13])
def test_resuming_continues_bit_by_bit(sets, reader, workers, stop):
    """Ten micro-steps are an epoch: the stops lie in it, at its end and in the next."""
    loader = training(sets["jpg", False], reader, workers)
    whole = [batch for _ in range(2) for batch in loader]
    assert len(whole) == 2 * loader.steps_per_epoch == 20

    stopped = training(sets["jpg", False], reader, workers)
    endless = itertools.chain.from_iterable(stopped for _ in range(2))
    before = list(itertools.islice(endless, stop))
    state = json.loads(json.dumps(stopped.state_dict()))
    assert (state["epoch"], state["step"]) == stopped.position == divmod(stop, 10)

    resumed = training(sets["jpg", False], reader, workers)
    resumed.load_state_dict(state)
    after = [batch for _ in range(2 - state["epoch"]) for batch in resumed]
    assert_same([*before, *after], whole)


@readers
def test_a_pass_draws_nothing_from_the_default_generator(plain, reader, workers):
    """The gates' noise is drawn there: a pass begun once more must not shift it."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    next(iter(training(plain, reader, workers)))
    assert torch.equal(torch.get_rng_state(), state)


@readers
def test_a_loader_can_be_set_back_in_the_middle_of_a_pass(plain, reader, workers):
    loader = training(plain, reader, workers)
    first = [next(iter(loader)) for _ in range(2)]
    assert first[0].keys != first[1].keys
    loader.load_state_dict({"epoch": 0, "step": 0})
    assert_same(itertools.islice(loader, 1), first[:1])


@readers
@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_sees_the_same_batches(plain, reader, workers, world_size):
    alone = list(training(plain, reader, workers, accumulation=1))
    ranks = [
        list(training(plain, reader, workers, accumulation=1, world=World(rank, world_size)))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(alone):
        parts = [batches[step] for batches in ranks]
        assert batch.keys == sum((part.keys for part in parts), ())
        together = torch.cat([part.images for part in parts])
        assert torch.allclose(batch.images, together, atol=1e-5)


@readers
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 65])
def test_evaluation_sees_each_sample_once(plain, reader, workers, world_size):
    """Shards of 33 and 31 images; of 65 ranks one has nothing to do."""
    if world_size == 65 and workers:
        workers = 1
    keys, labels = [], []
    for rank in range(world_size):
        loader = evaluation(plain, reader, workers, world=World(rank, world_size))
        batches = list(loader)
        assert len(batches) == loader.steps_per_epoch
        assert sum(len(batch.keys) for batch in batches) == loader.samples
        keys += [key for batch in batches for key in batch.keys]
        labels += [label for batch in batches for label in batch.labels.tolist()]
    assert keys == [f"test-{number:08d}" for number in range(64, 128)]
    assert labels == [number % 10 for number in range(64, 128)]


@readers
def test_every_evaluation_is_a_whole_one(plain, reader, workers):
    loader = evaluation(plain, reader, workers)
    next(iter(loader))
    assert sum(len(batch.keys) for batch in loader) == 64


@readers
def test_a_pass_broken_off_leaves_no_thread_and_no_process(plain, reader, workers):
    others = set(threading.enumerate())
    loader = training(plain, reader, workers)
    for _batch in loader:
        break
    assert_nothing_runs(others)
    batches = iter(loader)
    next(batches)
    loader.close()
    assert_nothing_runs(others)
    with pytest.raises(StopIteration):
        next(batches)


@readers
def test_a_loader_that_has_ended_a_pass_can_be_set_back(plain, reader, workers):
    loader = training(plain, reader, workers)
    first = list(loader)
    loader.load_state_dict({"epoch": 0, "step": 0})
    assert_same(loader, first)


@readers
def test_a_closed_loader_keeps_nothing_for_the_next_pass(plain, reader, workers):
    others = set(threading.enumerate())
    loader = training(plain, reader, workers)
    first = list(loader)
    loader.close()
    assert_nothing_runs(others)
    assert_same([*first, *loader], list(itertools.chain(*[training(plain, "torch", 0)] * 2)))


def test_worker_processes_serve_the_next_pass(plain):
    loader = training(plain, "torch", 2)
    passes = []
    for _ in range(2):
        list(loader)
        passes.append({process.pid for process in multiprocessing.active_children()})
    loader.close()
    assert len(passes[0]) == 2
    assert passes[0] == passes[1]


def test_a_signal_to_all_processes_leaves_the_workers_to_the_trainer(shards):
    """Run apart: what serves the workers is started once per process, and keeps its signals."""
    program = (
        "import sys; from pathlib import Path; from tests.data.signalled import main;"
        "main(Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, shards], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, r"was ended by SIGKILL, most likely for want of memory: .*data\.workers"),
        (signal.SIGSEGV, r"was ended by SIGSEGV, .*: try data\.reader=dali$"),
    ],
)
def test_a_worker_that_dies_is_said_to_by_its_signal(plain, number, words):
    loader = training(plain, "torch", 2)
    batches = iter(loader)
    next(batches)
    for process in multiprocessing.active_children():
        os.kill(process.pid, number)
    with pytest.raises(ValueError, match=f"^a worker process of the reader {words}"):
        list(batches)
    loader.close()


def test_what_dali_alone_cannot_decode_is_to_be_verified_first(plain, monkeypatch):
    def broken(self, pipeline):
        raise RuntimeError("Critical error in pipeline:\nmore")

    monkeypatch.setattr(DaliReader, "_output", broken)
    with pytest.raises(
        ValueError,
        match=r"^train-000000.tar, key train-0000\d+: DALI cannot decode .* though Pillow can "
        rf"\(Critical error in pipeline:\): run `reprise verify {plain.root}`; if it finds "
        r"nothing, use data.reader=torch$",
    ):
        list(training(plain))


@readers
def test_a_batch_may_be_larger_than_the_set(plain, reader, workers):
    options = {"repeats": 3, "global_batch": 100, "accumulation": 1}
    (batch,) = training(plain, reader, workers, **options)
    assert len(batch.keys) == 100 > len(set(batch.keys))
    assert_same([batch], training(plain, "torch", 0, **options))


def assert_nothing_runs(others):
    for thread in set(threading.enumerate()) - others:
        thread.join(10)
        assert not thread.is_alive(), thread.name
    assert not multiprocessing.active_children()


def test_an_unknown_reader_is_refused(plain):
    with pytest.raises(ValueError, match=r"no reader 'tf': use one of \['dali', 'torch'\]"):
        training(plain, reader="tf")


def test_an_unknown_split_is_refused(plain):
    with pytest.raises(ValueError, match=r"no split 'val'.*use \['test', 'train'\]"):
        eval_loader(
            plain, split="val", reader="dali", augment=FULL, batch_size=4, world=World(), workers=1
        )


@pytest.mark.parametrize(("epoch", "step"), [(0, 10), (0, -1), (-1, 0)])
def test_a_position_that_does_not_exist_is_refused(plain, epoch, step):
    with pytest.raises(ValueError, match=f"epoch {epoch}, step {step} does not exist.*has 10"):
        training(plain).load_state_dict({"epoch": epoch, "step": step})


def test_readers_agree_on_photographs(shared_data, tmp_path):
    """Real JPEGs of many sizes, some of them grey, at the transform for ImageNet."""
    manifest = shard_set.from_tar(tmp_path, shared_data / "imagenet-sample-500.tar", 48)
    augment = Augmentation(crop="random_resized", size=224, flip=True, eval_resize=256)
    for make in (training, evaluation):
        pairs = [make(manifest, *reader, augment=augment) for reader in READERS[:2]]
        for a, b in zip(*pairs, strict=True):
            assert a.keys == b.keys
            difference = (a.images - b.images).abs() / LEVEL
            assert difference.mean() < 0.5
            # Decoding only the crop interpolates chroma differently along its edge.
            assert (difference > 2.05).float().mean() < 1e-2
            assert difference[..., 2:-2, 2:-2].max() < 4


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["pad", "imagenet"])
def test_decoding_on_cuda_gives_nearly_the_cpus_images(sets, mode):
    device = World(device=torch.device("cuda", 0))
    for make in (training, evaluation):
        for reader in READERS:
            ours = list(make(sets["jpg", True], *reader, augment=MODES[mode], world=device))
            theirs = list(make(sets["jpg", True], augment=MODES[mode]))
            for a, b in zip(ours, theirs, strict=True):
                assert a.images.device.type == a.labels.device.type == "cuda"
                assert a.images.is_contiguous(memory_format=torch.channels_last)
                assert a.keys == b.keys
                assert torch.equal(a.labels.cpu(), b.labels)
                # Two JPEG decoders may differ by a few levels, most at chroma edges.
                difference = (a.images.cpu() - b.images).abs() / LEVEL
                assert difference.mean() < 1.5
                assert difference.max() < 24


@pytest.mark.parametrize("make", [training, evaluation])
def test_a_pipeline_that_was_emptied_serves_the_next_pass(plain, make, monkeypatch):
    built = []
    build = DaliReader._build
    monkeypatch.setattr(DaliReader, "_build", lambda self: built.append(self) or build(self))
    loader, other = make(plain), make(plain, "torch", 0)
    for _ in range(2):
        assert_same(loader, other)
    assert len(built) == 1
    # One that was left with work in it is not used again.
    for some in (loader, other):
        next(iter(some))
        some.close()
    assert_same(loader, other)
    assert len(built) == 2
