"""Copies of shards: whole and verified, or not there."""

import dataclasses
import shutil

import pytest
from pictures import class_folders, contents

from data_prep.manifest import MANIFEST_NAME, Manifest
from data_prep.prepare import prepare
from data_prep.sources import open_source
from data_prep.stage import Staged, stage
from data_prep.verify import verify


def shard_files(root):
    return {path.name for path in root.iterdir() if path.suffix in (".tar", ".idx")}


def test_a_staged_set_has_every_shard_and_is_read(manifest, tmp_path):
    seen = []
    done = stage(manifest.root, tmp_path / "fast", progress=lambda *now: seen.append(now))
    assert (done.copied, done.kept) == (5, 0)
    assert seen[-1] == (27, 27)
    assert shard_files(tmp_path / "fast") == shard_files(manifest.root)
    assert Manifest.load(tmp_path / "fast") == manifest
    local = dataclasses.replace(manifest, copies=(tmp_path / "fast",))
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    assert {local.folder_of(shard) for shard in shards} == {tmp_path / "fast"}


def test_shares_are_disjoint_and_cover_the_set(manifest, tmp_path):
    parts = []
    for share in range(3):
        stage(manifest.root, tmp_path / str(share), share=share, shares=3)
        parts.append(shard_files(tmp_path / str(share)))
        stage(manifest.root, tmp_path / "together", share=share, shares=3)
    assert set.union(*parts) == shard_files(manifest.root) == shard_files(tmp_path / "together")
    assert sum(map(len, parts)) == len(shard_files(manifest.root))


def test_what_is_there_is_kept_if_it_is_right(manifest, tmp_path):
    fast = tmp_path / "fast"
    stage(manifest.root, fast)
    damaged = bytearray((fast / "train-000001.tar").read_bytes())
    damaged[700] ^= 1
    (fast / "train-000001.tar").write_bytes(damaged)
    (fast / "test-000000.idx").unlink()
    done = stage(manifest.root, fast)
    assert (done.copied, done.kept) == (2, 3)
    copied = {name: data for name, data in contents(fast).items() if name in shard_files(fast)}
    assert copied.items() <= contents(manifest.root).items()
    assert isinstance(done, Staged)


def test_a_damaged_shard_is_not_copied(manifest, tmp_path):
    damaged = bytearray((manifest.root / "train-000001.tar").read_bytes())
    damaged[700] ^= 1
    (manifest.root / "train-000001.tar").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"train-000001.tar is not what its manifest says: run"):
        stage(manifest.root, tmp_path / "fast")
    assert not (tmp_path / "fast" / MANIFEST_NAME).exists()
    assert not [name for name in contents(tmp_path / "fast") if "train-000001" in name]
    assert verify(manifest.root, workers=1)


def test_another_set_and_the_set_itself_are_left_alone(manifest, tmp_path):
    source = class_folders(tmp_path / "other", train=2, test=1)
    other = prepare(open_source("folder", source), tmp_path / "other-set", workers=1).root
    before = contents(other)
    with pytest.raises(ValueError, match="holds another set, other: give another folder"):
        stage(manifest.root, other)
    assert contents(other) == before
    with pytest.raises(ValueError, match="is the set itself"):
        stage(manifest.root, manifest.root)


def test_a_disk_without_room_is_refused(manifest, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"has 0.000 GB free and 0.\d+ GB are needed"):
        stage(manifest.root, tmp_path / "fast")
    assert not contents(tmp_path / "fast")
