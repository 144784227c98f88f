"""Copies of shards on a faster disk, verified while they are made."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_prep.files import name_aside, sync
from data_prep.manifest import MANIFEST_NAME, Manifest, Shard

_CHUNK = 4 * 2**20


@dataclass(frozen=True)
class Staged:
    """What one call did: shards copied and found there already, and the bytes of all of them."""

    copied: int
    kept: int
    bytes: int


def stage(
    root: Path,
    to: Path,
    *,
    share: int = 0,
    shares: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Staged:
    """Copy the set at ``root``, or the ``share``-th of ``shares`` parts of its shards, to ``to``.

    Every byte is hashed on its way and compared with the manifest; what is there already is hashed
    too, and kept if it is right. The shares of several calls may go to one folder at once.
    ``progress`` is called with the images of the shards that are there, and of all in the share.

    Raises ValueError for a shard that is not what the manifest says, a folder that holds another
    set, and a disk without room.
    """
    manifest = Manifest.load(root)
    _refuse_other(manifest, to)
    to.mkdir(parents=True, exist_ok=True)
    shards = [shard for split in manifest.splits.values() for shard in split.shards][share::shares]
    missing = [shard for shard in shards if not _is_there(shard, to)]
    needed = sum(shard.bytes for shard in missing)
    free = shutil.disk_usage(to).free
    if needed > free:
        raise ValueError(
            f"{to} has {free / 1e9:,.3f} GB free and {needed / 1e9:,.3f} GB are needed: make room, "
            "or stage a share with --rank-aware"
        )
    total = sum(shard.samples for shard in shards)
    done = total - sum(shard.samples for shard in missing)
    for shard in missing:
        # The index last: a shard is taken for staged once it has one.
        _copy(root / shard.name, to / shard.name, shard.sha256)
        _copy(root / shard.index, to / shard.index, shard.index_sha256)
        done += shard.samples
        if progress:
            progress(done, total)
    _copy(root / MANIFEST_NAME, to / MANIFEST_NAME, _hash(root / MANIFEST_NAME))
    return Staged(len(missing), len(shards) - len(missing), sum(shard.bytes for shard in shards))


def _refuse_other(manifest: Manifest, to: Path) -> None:
    if to.resolve() == manifest.root.resolve():
        raise ValueError(f"{to} is the set itself: give a folder on another disk")
    if (to / MANIFEST_NAME).exists() and Manifest.load(to) != manifest:
        raise ValueError(f"{to} holds another set, {Manifest.load(to).name}: give another folder")


def _is_there(shard: Shard, to: Path) -> bool:
    pairs = ((to / shard.name, shard.sha256), (to / shard.index, shard.index_sha256))
    return all(path.is_file() and _hash(path) == digest for path, digest in pairs)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy(source: Path, target: Path, expected: str) -> None:
    """Copy aside, sync, compare, rename."""
    aside = name_aside(target)
    digest = hashlib.sha256()
    try:
        with source.open("rb") as file, aside.open("wb") as copy:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                copy.write(chunk)
            copy.flush()
            os.fsync(copy.fileno())
        if digest.hexdigest() != expected:
            raise ValueError(
                f"{source} is not what its manifest says: run `reprise verify {source.parent}`"
            )
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    sync(target.parent)
