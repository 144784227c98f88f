"""Images for denoising: what the source lists, and a set without labels that is a set in full."""

import dataclasses
import tarfile

import pytest

from data_prep.manifest import CLASSIFICATION, DENOISING, Manifest
from data_prep.prepare import prepare
from data_prep.sources import open_source
from data_prep.verify import verify


@pytest.fixture
def folder(bsd_tar, tmp_path):
    """The same images as a folder, without a leading one."""
    with tarfile.open(bsd_tar) as tar:
        tar.extractall(tmp_path / "bsd")
    return tmp_path / "bsd" / "bsd-denoise"


def listed(path, tmp_path):
    (tmp_path / "scratch").mkdir()
    return open_source("bsd", path).open(tmp_path / "scratch")


def test_the_splits_are_dncnns(bsd_shards):
    manifest = Manifest.load(bsd_shards)
    assert {name: split.samples for name, split in manifest.splits.items()} == {
        "train": 16,
        "test": 5,
        "set12": 2,
    }
    assert manifest.evaluation.name == "test"
    assert manifest.task == DENOISING
    assert manifest.classes == ("image",)
    assert manifest.train.counts == (16,)
    assert manifest.image_size == (40, 64, 40, 64)
    assert len(set(manifest.channel_mean)) == 1


def test_every_byte_is_verified(bsd_shards, tmp_path):
    assert verify(bsd_shards, workers=1) == []
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in bsd_shards.iterdir():
        data = bytearray(path.read_bytes())
        if path.name == "set12-000000.tar":
            data[600] ^= 1
        (damaged / path.name).write_bytes(data)
    assert {finding.path for finding in verify(damaged, workers=1)} == {"set12-000000.tar"}


def test_a_folder_and_a_tar_of_it_give_the_same_images(bsd_tar, folder, tmp_path):
    listing = listed(folder, tmp_path)
    ours = {item.origin: listing.reader.read(item) for item in listing.items}
    packed = open_source("bsd", bsd_tar).open(tmp_path / "scratch")
    assert {f"bsd-denoise/{origin}" for origin in ours} == {item.origin for item in packed.items}
    assert all(ours[i.origin[12:]] == packed.reader.read(i) for i in packed.items)
    assert {(item.split, item.label) for item in listing.items} == {
        ("train", 0),
        ("test", 0),
        ("set12", 0),
    }


def test_what_is_elsewhere_is_rejected(folder, tmp_path):
    (folder / "README").write_text("about")
    (folder / "more").mkdir()
    (folder / "more" / "1.png").write_bytes(b"x")
    (folder / "train400" / ".hidden.png").write_bytes(b"x")
    listing = listed(folder, tmp_path)
    assert {entry.origin: entry.reason for entry in listing.rejected} == {
        "README": "outside of train400, test68, test12",
        "more/1.png": "outside of train400, test68, test12",
        "train400/.hidden.png": "hidden file",
    }


def test_set12_may_be_missing_and_the_others_may_not(folder, tmp_path):
    for path in sorted((folder / "test12").iterdir()):
        path.unlink()
    manifest = prepare(open_source("bsd", folder), tmp_path / "set", workers=1)
    assert sorted(manifest.splits) == ["test", "train"]
    for path in sorted((folder / "test68").iterdir()):
        path.unlink()
    with pytest.raises(ValueError, match=r"no images in a folder test68: give .* train400, test68"):
        prepare(open_source("bsd", folder), tmp_path / "none", workers=1)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"task": "segmentation"}, "task 'segmentation' is not one of classification, denoising"),
        ({"evaluation_split": "val"}, "evaluate on, 'val', is none of its splits"),
        ({"evaluation_split": "train"}, "evaluate on, 'train', is none of its splits"),
    ],
)
def test_a_manifest_that_contradicts_itself(bsd_shards, change, problem):
    manifest = dataclasses.replace(Manifest.load(bsd_shards), **change)
    assert problem in manifest.inconsistency()


def test_a_set_for_denoising_has_no_labels_to_tell_apart(manifest):
    assert manifest.task == CLASSIFICATION
    odd = dataclasses.replace(manifest, task=DENOISING)
    assert "has 3 classes and not one" in odd.inconsistency()


def test_a_manifest_from_before_tasks_is_for_classification(manifest):
    path = manifest.root / "manifest.json"
    lines = path.read_text().splitlines()
    kept = [line for line in lines if '"task"' not in line and '"evaluation_split"' not in line]
    assert len(lines) - len(kept) == 2
    path.write_text("\n".join(kept))
    assert Manifest.load(manifest.root) == manifest


def test_the_published_images(shared_data, tmp_path):
    archive = shared_data / "bsd-denoise.tar"
    manifest = prepare(open_source("bsd", archive), tmp_path / "set", workers=1)
    assert {name: split.samples for name, split in manifest.splits.items()} == {
        "train": 400,
        "test": 68,
        "set12": 12,
    }
    assert (manifest.found, manifest.rejected) == (480, 0)
    assert manifest.image_size == (180, 512, 180, 512)
    assert verify(manifest.root, workers=1) == []
