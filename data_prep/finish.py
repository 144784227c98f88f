"""From packed shards to a set: what all records say together, the card, and the manifest last."""

import json
import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import features

from data_prep import card
from data_prep.duplicates import duplicates
from data_prep.facts import Facts
from data_prep.files import write_atomically
from data_prep.listing import Listing, Rejection
from data_prep.manifest import DUPLICATES_NAME, REJECTED_NAME, TRAIN, Manifest, Shard, Split
from data_prep.pack import Record, Work
from data_prep.plan import Plan

logger = logging.getLogger(__name__)


@dataclass
class Summary:
    """All records together."""

    total: Facts
    parts: dict[str, Facts]
    shards: dict[str, list[Shard]]
    rejected: list[Rejection]
    marks: npt.NDArray[np.uint64]
    reencoded: int = 0


def summarise(work: Work, listing: Listing) -> Summary:
    """Of the shards that are planned, all of which are packed."""
    planned = Plan.load(work.plan)
    classes = len(listing.classes)
    marks = np.zeros(len(planned.items), np.uint64)
    summary = Summary(Facts([0] * classes), {}, {}, list(listing.rejected), marks)
    for shard in planned.shards:
        record = Record.load(work.record(shard))
        summary.total.add(record.facts)
        summary.parts.setdefault(shard.split, Facts([0] * classes)).add(record.facts)
        summary.shards.setdefault(shard.split, []).extend([record.shard] if record.shard else [])
        summary.rejected += record.rejected
        summary.reencoded += record.reencoded
        marks[shard.first : shard.first + shard.samples] = record.marks
    summary.rejected.sort(key=lambda entry: entry.origin)
    return summary


def finish(work: Work, listing: Listing, settings: dict[str, Any], summary: Summary) -> None:
    """Write what says of the packed shards that they are a set, the manifest last."""
    _warn_of_gaps(listing, summary.parts)
    _write_lines(
        work.set / REJECTED_NAME,
        [
            {"origin": entry.origin, "split": entry.split, "reason": entry.reason}
            for entry in summary.rejected
        ],
    )
    doubles = [
        {"origin": item.origin, "split": item.split, "same_as": [other.origin for other in others]}
        for item, others in duplicates(Plan.load(work.plan), summary.marks, listing.reader)
    ]
    if doubles:
        _write_lines(work.set / DUPLICATES_NAME, doubles)
    manifest = _manifest(listing, settings, work.set, summary, len(doubles))
    card.write(manifest, summary.total)
    manifest.save()


def _write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    lines = [json.dumps(entry) + "\n" for entry in entries]
    write_atomically(path, "".join(lines).encode("ascii"))


def _manifest(
    listing: Listing,
    settings: dict[str, Any],
    folder: Path,
    summary: Summary,
    doubles: int,
) -> Manifest:
    parts, shards = summary.parts, summary.shards
    measured = TRAIN if TRAIN in parts else str(listing.evaluation_split)
    mean, std = parts[measured].channel_statistics()
    return Manifest(
        root=folder,
        name=listing.name,
        classes=listing.classes,
        splits={
            name: Split(name, tuple(shards[name]), tuple(parts[name].counts))
            for name in sorted(parts)
        },
        image_size=summary.total.image_size,
        channel_mean=mean,
        channel_std=std,
        found=len(listing.items) + len(listing.rejected),
        accepted=sum(summary.total.counts),
        rejected=len(summary.rejected),
        settings=settings,
        tools={
            "reprise": version("reprise"),
            "numpy": version("numpy"),
            "pillow": version("pillow"),
            "simplejpeg": version("simplejpeg"),
            "zlib": str(features.version("zlib")),
        },
        task=listing.task,
        evaluation_split=listing.evaluation_split,
        reencoded=summary.reencoded,
        duplicates=doubles,
        names=listing.names,
    )


def refuse_empty(
    listing: Listing, shards: dict[str, list[Shard]], rejected: list[Rejection]
) -> None:
    """Raises ValueError where a split has no image."""
    for split in sorted({listing.evaluation_split or TRAIN, *shards}):
        if not shards.get(split):
            reasons = [entry for entry in rejected if entry.split == split] or rejected
            why = "its folders hold no files"
            if reasons:
                why = f"{len(rejected)} rejected, the first reason is {reasons[0].reason!r}"
            raise ValueError(
                f"{listing.name} has no image for {split!r} that can be used ({why}): correct the "
                "source"
            )


def _warn_of_gaps(listing: Listing, parts: dict[str, Facts]) -> None:
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
