"""CIFAR-10.1: a set without training images, in the form in which it is published."""

import numpy as np
import pytest

from data_prep.manifest import Manifest
from data_prep.prepare import prepare
from data_prep.sources import open_source
from data_prep.sources.cifar10_1 import CLASSES, DATA, LABELS
from data_prep.verify import verify
from pipeline.data.shards import ShardSet


def write(folder, labels=None, images=None):
    generator = np.random.default_rng(0)
    if images is None:
        images = generator.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    folder.mkdir(exist_ok=True)
    np.save(folder / DATA, images)
    np.save(folder / LABELS, np.arange(20) % 10 if labels is None else labels)
    return images


def test_images_and_labels_are_those_of_the_arrays(tmp_path):
    images = write(tmp_path / "source")
    prepare(open_source("cifar10.1", tmp_path / "source"), tmp_path / "set", samples_per_shard=8)
    manifest = Manifest.load(tmp_path / "set")
    assert verify(tmp_path / "set", workers=1) == []
    assert (manifest.name, manifest.classes) == ("cifar10.1", CLASSES)
    assert manifest.evaluation.samples == 20
    assert list(manifest.splits) == ["test"]
    mean = images.reshape(-1, 3).mean(0) / 255
    assert manifest.channel_mean == pytest.approx(tuple(mean), abs=1e-6)
    samples = ShardSet(manifest, manifest.evaluation).read(np.arange(20))
    assert sorted(sample.label for sample in samples) == sorted(np.arange(20) % 10)
    with pytest.raises(ValueError, match=r"no split 'train'.*prepare a source that has one"):
        _ = manifest.train


def test_its_classes_are_those_of_cifar10(tmp_path):
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    assert " ".join(CLASSES) == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / LABELS).unlink(), f"{LABELS} does not exist: give the folder that holds"),
        (lambda f: (f / DATA).write_bytes(b"x"), "cannot read .*fetch it again"),
        (lambda f: write(f, labels=np.full(20, 10)), "the label 10, valid are 0 to 9"),
        (lambda f: write(f, labels=np.zeros(19)), "19 labels for 20 images"),
        (lambda f: write(f, images=np.zeros((20, 32, 32), np.uint8)), r"shape \(20, 32, 32\)"),
    ],
)
def test_other_files_are_refused_and_leave_nothing(tmp_path, change, message):
    write(tmp_path / "source")
    change(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        prepare(open_source("cifar10.1", tmp_path / "source"), tmp_path / "set")
    assert not (tmp_path / "set").exists()
