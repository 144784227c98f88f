"""Listing -> checked, shuffled, packed in parallel -> a set that is there only once complete."""

import json
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import features

from data_prep.facts import Facts
from data_prep.files import sync, write_atomically
from data_prep.images import RejectedImageError, check, own_pixel_limit
from data_prep.listing import FolderReader, Listing, Reader, Rejection, Source
from data_prep.manifest import (
    LOCK_NAME,
    MANIFEST_NAME,
    REJECTED_NAME,
    TRAIN,
    Manifest,
    Shard,
    Split,
)
from data_prep.parallel import run_parallel
from data_prep.plan import ShardPlan, plan
from data_prep.writer import ShardWriter

SAMPLES_PER_SHARD = 2048
_PARTIAL = ".partial-"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Task:
    folder: Path
    plan: ShardPlan
    reader: Reader
    classes: int


@dataclass(frozen=True)
class _Packed:
    shard: Shard | None
    facts: Facts
    rejected: list[Rejection]


def prepare(
    source: Source,
    out: Path,
    *,
    seed: int = 0,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Turn ``source`` into a shard set at ``out`` and return its manifest.

    The same source, seed and shard size give the same bytes for any number of ``workers`` (None:
    all cores) and after any interruption. Where the set is already there, nothing is done.
    ``progress`` is called with the images done and the images in all.

    Raises ValueError or FileNotFoundError for a source that cannot be used and for an ``out`` that
    holds something else; nothing is left there then.
    """
    if samples_per_shard < 1 or (workers is not None and workers < 1):
        raise ValueError(
            f"samples_per_shard={samples_per_shard} and workers={workers}: give 1 or more"
        )
    out = Path(out)
    with _claimed(out):
        _recover(out)
        finished = Manifest.load(out) if (out / MANIFEST_NAME).exists() else None
        if finished is None:
            _refuse_foreign(out)
        with _workspace(out) as work:
            listing = source.open(work / "scratch")
            _refuse_own_output(listing, out)
            settings: dict[str, Any] = {
                **listing.settings,
                "seed": seed,
                "samples_per_shard": samples_per_shard,
                "listing_sha256": listing.sha256,
            }
            if finished is not None:
                _refuse_other(finished, settings)
                logger.info("%s is already prepared: nothing to do", out)
                return finished
            _build(listing, settings, work / "set", workers, progress)
            _publish(work, out)
        return Manifest.load(out)


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Own ``out`` alone; a folder made for a preparation that fails is removed again."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{out} is a file: give a folder to write the shards to") from None
    lock = out / LOCK_NAME
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except Timeout:
        raise ValueError(f"another preparation is writing to {out}: wait for it to end") from None
    finally:
        if not any(out.iterdir()):
            out.rmdir()


@contextmanager
def _workspace(out: Path) -> Iterator[Path]:
    # A name of its own, so that a worker which outlives a killed run cannot write into the next.
    work = out / f"{_PARTIAL}{secrets.token_hex(4)}"
    (work / "scratch").mkdir(parents=True)
    (work / "set").mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work)


def _recover(out: Path) -> None:
    """Complete a set whose files were being moved in, and remove what was not complete."""
    for work in sorted(out.glob(f"{_PARTIAL}*")):
        if (work / "set" / MANIFEST_NAME).exists():
            _publish(work, out)
        shutil.rmtree(work)


def _publish(work: Path, out: Path) -> None:
    """Move the complete set in, its manifest last; can be repeated from any point."""
    names = sorted(path.name for path in (work / "set").iterdir() if path.name != MANIFEST_NAME)
    for name in names:
        (work / "set" / name).replace(out / name)
    sync(out)
    (work / "set" / MANIFEST_NAME).replace(out / MANIFEST_NAME)
    sync(out)


def _refuse_foreign(out: Path) -> None:
    foreign = sorted(path.name for path in out.iterdir() if path.name != LOCK_NAME)
    if foreign:
        raise ValueError(
            f"{out} holds {foreign[0]!r} and no shard set: give a new or an empty folder"
        )


def _refuse_own_output(listing: Listing, out: Path) -> None:
    reader = listing.reader
    if isinstance(reader, FolderReader) and out.resolve().is_relative_to(reader.root.resolve()):
        raise ValueError(f"{out} lies within the source {reader.root}: give a folder outside of it")


def _refuse_other(finished: Manifest, settings: dict[str, Any]) -> None:
    for key in sorted(finished.settings.keys() | settings.keys()):
        before, now = finished.settings.get(key), settings.get(key)
        if before != now:
            raise ValueError(
                f"{finished.root} holds a set prepared with {key}={before}, now it is {now}: "
                f"give another folder, or delete this one"
            )
    for shard in (shard for split in finished.splits.values() for shard in split.shards):
        path = finished.root / shard.name
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise ValueError(
                f"{path} is missing or cut: delete {finished.root} and prepare it again"
            )


def _build(
    listing: Listing,
    settings: dict[str, Any],
    folder: Path,
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    plans = plan(listing.items, settings["seed"], settings["samples_per_shard"])
    tasks = [_Task(folder, shard, listing.reader, len(listing.classes)) for shard in plans]
    results: dict[int, _Packed] = {}
    done = 0
    for position, packed in run_parallel(_pack, tasks, workers):
        results[position] = packed
        done += len(plans[position].items)
        if progress:
            progress(done, len(listing.items))
    packs = [results[position] for position in range(len(plans))]
    rejected = listing.rejected + [entry for packed in packs for entry in packed.rejected]
    rejected.sort(key=lambda entry: entry.origin)
    _write_rejected(folder / REJECTED_NAME, rejected)
    _manifest(listing, settings, folder, plans, packs, rejected).save()


def _pack(task: _Task) -> _Packed:
    """Check the images of one shard and write it; runs in a worker."""
    writer = ShardWriter(task.folder, task.plan.stem)
    facts = Facts([0] * task.classes)
    rejected = []
    with own_pixel_limit():
        for position, item in enumerate(task.plan.items):
            try:
                image = check(task.reader.read(item))
            except RejectedImageError as reason:
                rejected.append(Rejection(item.split, item.origin, str(reason)))
                continue
            writer.add(task.plan.key(position), image.data, image.extension, item.label)
            facts.count(image, item.label)
    return _Packed(writer.close(), facts, rejected)


def _write_rejected(path: Path, rejected: list[Rejection]) -> None:
    lines = [
        json.dumps({"origin": entry.origin, "split": entry.split, "reason": entry.reason}) + "\n"
        for entry in rejected
    ]
    write_atomically(path, "".join(lines).encode("ascii"))


def _manifest(
    listing: Listing,
    settings: dict[str, Any],
    folder: Path,
    plans: list[ShardPlan],
    packs: list[_Packed],
    rejected: list[Rejection],
) -> Manifest:
    total = Facts([0] * len(listing.classes))
    parts: dict[str, Facts] = {}
    shards: dict[str, list[Shard]] = {}
    for shard_plan, packed in zip(plans, packs, strict=True):
        total.add(packed.facts)
        parts.setdefault(shard_plan.split, Facts([0] * len(listing.classes))).add(packed.facts)
        shards.setdefault(shard_plan.split, []).extend([packed.shard] if packed.shard else [])
    _refuse_empty(listing, shards, rejected)
    _warn_of_gaps(listing, parts)
    measured = TRAIN if TRAIN in parts else str(listing.evaluation_split)
    mean, std = parts[measured].channel_statistics()
    accepted = sum(total.counts)
    return Manifest(
        root=folder,
        name=listing.name,
        classes=listing.classes,
        splits={
            name: Split(name, tuple(shards[name]), tuple(parts[name].counts))
            for name in sorted(parts)
        },
        image_size=total.image_size,
        channel_mean=mean,
        channel_std=std,
        found=len(listing.items) + len(listing.rejected),
        accepted=accepted,
        rejected=len(rejected),
        settings=settings,
        tools={
            "reprise": version("reprise"),
            "pillow": version("pillow"),
            "zlib": str(features.version("zlib")),
        },
        task=listing.task,
        evaluation_split=listing.evaluation_split,
    )


def _refuse_empty(
    listing: Listing, shards: dict[str, list[Shard]], rejected: list[Rejection]
) -> None:
    for split in sorted({listing.evaluation_split or TRAIN, *shards}):
        if not shards.get(split):
            reasons = [entry for entry in rejected if entry.split == split] or rejected
            first = f", the first reason is {reasons[0].reason!r}" if reasons else ""
            raise ValueError(
                f"{listing.name} has no image for {split!r} that can be used "
                f"({len(rejected)} rejected{first}): correct the source"
            )


def _warn_of_gaps(listing: Listing, parts: dict[str, Facts]) -> None:
    if parts.keys() == {TRAIN}:
        logger.warning("%s has no val or test: nothing to evaluate on", listing.name)
    for split, facts in sorted(parts.items()):
        empty = [
            name for name, count in zip(listing.classes, facts.counts, strict=True) if not count
        ]
        if empty:
            logger.warning(
                "%s: %d of %d classes have no image in %s and keep their ids: %s",
                listing.name,
                len(empty),
                len(listing.classes),
                split,
                ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else ""),
            )
