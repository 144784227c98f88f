"""The dataset card: what a set holds, for people, in Markdown with a picture of 64 samples."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator

from data_prep.facts import SIDES, Facts
from data_prep.files import write_atomically
from data_prep.manifest import (
    CARD_NAME,
    CARD_PICTURE_NAME,
    CLASSIFICATION,
    DUPLICATES_NAME,
    REJECTED_NAME,
    Manifest,
)
from data_prep.samples import contact_sheet, read_samples

SAMPLES = 64
_BAR = 40  # characters
_EXTREMES = 5


def write(manifest: Manifest, facts: Facts) -> None:
    """Write the card of a set, and its picture, into the set's folder."""
    text = "\n".join(_lines(manifest, facts)) + "\n"
    write_atomically(manifest.root / CARD_NAME, text.encode())
    write_atomically(manifest.root / CARD_PICTURE_NAME, _picture(manifest))


def class_name(manifest: Manifest, label: int) -> str:
    """What people call a class, in one or two words."""
    return manifest.names[label].split(",")[0] if manifest.names else manifest.classes[label]


def _lines(manifest: Manifest, facts: Facts) -> Iterator[str]:
    low_height, high_height, low_width, high_width = manifest.image_size
    size = sum(shard.bytes for split in manifest.splits.values() for shard in split.shards)
    yield f"# {manifest.name}"
    yield ""
    yield f"{manifest.accepted:,} images, {size / 1e6:,.1f} MB, for {manifest.task}."
    yield f"Of {manifest.found:,} files found, {manifest.rejected:,} were rejected"
    yield f"(`{REJECTED_NAME}` says why); {manifest.reencoded:,} images are stored as other bytes"
    yield f"than were found; {manifest.duplicates:,} images outside of train have the bytes of a"
    yield "training image" + (f" (`{DUPLICATES_NAME}`)." if manifest.duplicates else ".")
    yield ""
    yield "| split | images | shards | MB |"
    yield "|---|---|---|---|"
    for split in manifest.splits.values():
        held = sum(shard.bytes for shard in split.shards) / 1e6
        yield f"| {split.name} | {split.samples:,} | {len(split.shards):,} | {held:,.1f} |"
    yield ""
    yield "| | red | green | blue |"
    yield "|---|---|---|---|"
    for name, values in (("mean", manifest.channel_mean), ("std", manifest.channel_std)):
        yield (
            f"| {name} of {manifest.measured} pixels | "
            + " | ".join(f"{v:.4f}" for v in values)
            + " |"
        )
    if manifest.task == CLASSIFICATION:
        yield from _balance(manifest)
    yield ""
    yield "## Image sizes"
    yield ""
    yield f"Heights {low_height} to {high_height}, widths {low_width} to {high_width} pixels."
    yield "By the shorter side:"
    yield ""
    yield "| pixels | images | |"
    yield "|---|---|---|"
    for pixels, count in zip(_bins(), facts.sides, strict=True):
        if count:
            bar = "█" * -(-count * _BAR // max(facts.sides))
            yield f"| {pixels} | {count:,} | {bar} |"
    yield ""
    shown = manifest.splits[manifest.measured]
    yield f"## The first {min(SAMPLES, shown.samples)} images of {shown.name}"
    yield ""
    yield f"![Samples with their classes]({CARD_PICTURE_NAME})"
    yield ""
    yield "## Preparation"
    yield ""
    for name, value in sorted({**manifest.settings, **manifest.tools}.items()):
        yield f"- {name}: {value}"
    yield f"- class map sha256: {manifest.class_map_sha256}"


def _balance(manifest: Manifest) -> Iterator[str]:
    yield ""
    yield f"## {len(manifest.classes):,} classes"
    for split in manifest.splits.values():
        counts = split.counts
        order = sorted(range(len(counts)), key=lambda label: counts[label])
        yield ""
        yield (
            f"{split.name}: {counts[order[0]]:,} to {counts[order[-1]]:,} images per class, median "
            f"{statistics.median(counts):,g}."
        )
        if counts[order[0]] == counts[order[-1]]:
            continue
        for what, labels in (("fewest", order[:_EXTREMES]), ("most", order[: -_EXTREMES - 1 : -1])):
            named = ", ".join(f"{class_name(manifest, n)} {counts[n]:,}" for n in labels)
            yield f"The {what}: {named}."


def _bins() -> list[str]:
    pairs = itertools.pairwise((1, *SIDES))
    return [*(f"{start} to {stop - 1}" for start, stop in pairs), f"{SIDES[-1]} and more"]


def _picture(manifest: Manifest) -> bytes:
    samples = itertools.chain.from_iterable(
        read_samples(manifest.root / shard.name)
        for shard in manifest.splits[manifest.measured].shards
    )
    return contact_sheet(
        (sample.image, class_name(manifest, sample.label))
        for sample in itertools.islice(samples, SAMPLES)
    )
