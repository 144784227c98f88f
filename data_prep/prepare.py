"""Listing -> checked, shuffled, packed in parallel -> a set that is there only once complete."""

import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout

from data_prep.files import Lock, sync, write_atomically
from data_prep.finish import finish, refuse_empty, summarise
from data_prep.images import AS_FOUND, Treatment
from data_prep.listing import FolderReader, Listing, Source
from data_prep.manifest import LOCK_NAME, MANIFEST_NAME, OWNER_NAME, SCHEMA_VERSION, Manifest
from data_prep.pack import Packed, PackShard, PackShards, Record, Work
from data_prep.plan import Plan, plan

SAMPLES_PER_SHARD = 2048
_WORK_NAME = ".partial"
_SETTINGS_NAME = "settings.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a preparation is: images of ``total``, bytes read of them, images rejected."""

    images: int
    total: int
    bytes: int
    rejected: int


def prepare(
    source: Source,
    out: Path,
    *,
    seed: int = 0,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    shard_bytes: int | None = None,
    treatment: Treatment = AS_FOUND,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    pack: Callable[[PackShards], Iterable[Packed]] = PackShards.run,
) -> Manifest:
    """Turn ``source`` into a shard set at ``out`` and return its manifest.

    The same source, seed, shard size and treatment give the same bytes for any number of
    ``workers`` (None: all cores) and after any interruption: a call after one goes on with the
    shards that are not finished. Where the set is already there, nothing is done. ``shard_bytes``
    takes the place of ``samples_per_shard``. ``pack`` has the shards packed and tells of each,
    where processes of this machine are not to do it.

    Raises ValueError or FileNotFoundError for a source that cannot be used, one that has changed
    since an interrupted preparation, and an ``out`` that holds something else.
    """
    if samples_per_shard < 1 or (workers is not None and workers < 1):
        raise ValueError(
            f"samples_per_shard={samples_per_shard} and workers={workers}: give 1 or more"
        )
    out = Path(out)
    size = {"samples_per_shard": samples_per_shard}
    if shard_bytes is not None:
        size = {"shard_bytes": shard_bytes}
    with _claimed(out):
        _recover(out)
        finished = Manifest.load(out) if (out / MANIFEST_NAME).exists() else None
        if finished is None:
            _refuse_foreign(out)
        work = Work(out / _WORK_NAME)
        with _scratch(work):
            listing = source.open(work.scratch)
            _refuse_own_output(listing, out)
            settings: dict[str, Any] = {
                **listing.settings,
                **treatment.settings,
                **size,
                "seed": seed,
                "listing_sha256": listing.sha256,
            }
            if finished is not None:
                _refuse_other(finished, listing, settings)
                logger.info("%s is already prepared: nothing to do", out)
                return finished
            shards = _begin(work, listing, settings)
            one = PackShard(work, listing.reader, len(listing.classes), treatment)
            _pack(PackShards(one, 0, shards, workers), pack, progress, len(listing.rejected))
            _finish(work, listing, settings)
            _publish(work, out)
        return Manifest.load(out)


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Own ``out`` alone; a folder made for a preparation that fails is removed again."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{out} is a file: give a folder to write the shards to") from None
    lock, owner = out / LOCK_NAME, out / OWNER_NAME
    try:
        with Lock(lock, timeout=0):
            owner.write_text(f"host {socket.gethostname()}, pid {os.getpid()}")
            try:
                yield
            finally:
                owner.unlink()
                lock.unlink(missing_ok=True)
    except Timeout:
        raise ValueError(
            f"another preparation ({_read(owner)}) is writing to {out}: wait for it to end"
        ) from None
    finally:
        if not any(out.iterdir()):
            out.rmdir()


def _read(owner: Path) -> str:
    try:
        return owner.read_text()
    except OSError:
        return "of an unknown process"


@contextmanager
def _scratch(work: Work) -> Iterator[None]:
    """An empty folder to open the source with; at the end, what a next call can use remains."""
    shutil.rmtree(work.scratch, ignore_errors=True)
    work.scratch.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(work.scratch, ignore_errors=True)
        if not (work.root / _SETTINGS_NAME).exists():
            _discard(work)


def _begin(work: Work, listing: Listing, settings: dict[str, Any]) -> int:
    """Write the plan, or find that it is the one that was begun; returns its number of shards."""
    content = {"schema": SCHEMA_VERSION, "settings": settings, "stamp": listing.stamp}
    path = work.root / _SETTINGS_NAME
    if path.exists():
        _refuse_other_plan(work.root.parent, json.loads(path.read_text()), content)
        for leftover in work.set.glob(".*.partial"):
            leftover.unlink()
        return len(Plan.load(work.plan).shards)
    if not listing.items:
        refuse_empty(listing, {}, listing.rejected)
    planned = plan(
        listing.items,
        settings["seed"],
        samples_per_shard=settings.get("samples_per_shard"),
        shard_bytes=settings.get("shard_bytes"),
        ordered=listing.ordered,
    )
    for folder in (work.plan, work.set, work.records):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    planned.save(work.plan)
    write_atomically(path, json.dumps(content).encode())
    return len(planned.shards)


def _difference(before: dict[str, Any], now: dict[str, Any], images: str = "") -> str | None:
    """The first setting that differs, in words; ``images`` says which they were and are."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key.endswith("_sha256"):  # of names and sizes or of pixels, which tells nobody anything
            return (
                f"from other images{images}: another source, or files that were added, removed or "
                "changed since"
            )
        return f"with {key}={old}, now it is {new}"
    return None


def _refuse_other_plan(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    cure = f"give another folder, or delete {out / _WORK_NAME}"
    if before.get("schema") != now["schema"]:
        raise ValueError(f"{out} holds an unfinished preparation by another release: {cure}")
    if other := _difference(before["settings"], now["settings"]):
        raise ValueError(f"{out} holds an unfinished preparation {other}: {cure}")
    if before["stamp"] != now["stamp"]:
        raise ValueError(
            f"the source was modified since the unfinished preparation in {out} began: {cure}"
        )


def _pack(
    all_shards: PackShards,
    pack: Callable[[PackShards], Iterable[Packed]],
    progress: Callable[[Progress], None] | None,
    rejected: int,
) -> None:
    """``rejected`` were so many before any of them was read."""
    work = all_shards.pack.work
    planned = Plan.load(work.plan)
    left = all_shards.unfinished(planned)
    _refuse_full_disk(all_shards, sum(planned.bytes_of(shard) for shard in left))
    unfinished = set(left)
    before = [Record.load(work.record(s)).packed for s in planned.shards if s not in unfinished]
    done = Progress(
        sum(packed.images for packed in before),
        len(planned.items),
        0,
        rejected + sum(packed.rejected for packed in before),
    )
    if progress:
        progress(done)
    for packed in pack(all_shards):
        done = Progress(
            done.images + packed.images,
            done.total,
            done.bytes + packed.bytes,
            done.rejected + packed.rejected,
        )
        if progress:
            progress(done)


def _refuse_full_disk(pack: PackShards, needed: int) -> None:
    free = shutil.disk_usage(pack.pack.work.root).free
    if pack.pack.treatment.resize_short is None and needed > free:
        raise ValueError(
            f"{pack.pack.work.root.parent} has {free / 1e9:,.3f} GB free and {needed / 1e9:,.3f} "
            "GB are needed: make room, or give a folder on another disk"
        )


def _finish(work: Work, listing: Listing, settings: dict[str, Any]) -> None:
    summary = summarise(work, listing)
    try:
        refuse_empty(listing, summary.shards, summary.rejected)
    except ValueError:
        _discard(work)  # what was packed is no beginning of a set
        raise
    finish(work, listing, settings, summary)


def _recover(out: Path) -> None:
    """Complete a set whose files were being moved in."""
    work = Work(out / _WORK_NAME)
    if (work.set / MANIFEST_NAME).exists() or (out / MANIFEST_NAME).exists():
        _publish(work, out)


def _publish(work: Work, out: Path) -> None:
    """Move the complete set in, its manifest last; can be repeated from any point."""
    if work.set.exists():
        # What a job writes that outlived its preparation is hidden, and no part of the set.
        names = sorted(path.name for path in work.set.glob("[!.]*") if path.name != MANIFEST_NAME)
        for name in names:
            (work.set / name).replace(out / name)
        sync(out)
    if (work.set / MANIFEST_NAME).exists():
        (work.set / MANIFEST_NAME).replace(out / MANIFEST_NAME)
        sync(out)
    _discard(work)


def _discard(work: Work) -> None:
    # Without its settings, what remains when this is interrupted is no preparation.
    (work.root / _SETTINGS_NAME).unlink(missing_ok=True)
    shutil.rmtree(work.root, ignore_errors=True)


def _refuse_foreign(out: Path) -> None:
    foreign = sorted({path.name for path in out.iterdir()} - {LOCK_NAME, OWNER_NAME, _WORK_NAME})
    if foreign:
        raise ValueError(
            f"{out} holds {foreign[0]!r} and no shard set: give a new or an empty folder"
        )


def _refuse_own_output(listing: Listing, out: Path) -> None:
    reader = listing.reader
    if isinstance(reader, FolderReader) and out.resolve().is_relative_to(reader.root.resolve()):
        raise ValueError(f"{out} lies within the source {reader.root}: give a folder outside of it")


def _refuse_other(finished: Manifest, listing: Listing, settings: dict[str, Any]) -> None:
    files = len(listing.items) + len(listing.rejected)
    images = (
        f", {finished.name} with {finished.found:,} files, and now it is {listing.name} with "
        f"{files:,}"
    )
    if other := _difference(finished.settings, settings, images):
        raise ValueError(
            f"{finished.root} holds a set prepared {other}: give another folder, or delete this one"
        )
    for shard in (shard for split in finished.splits.values() for shard in split.shards):
        path = finished.root / shard.name
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise ValueError(
                f"{path} is missing or cut: delete {finished.root} and prepare it again"
            )
