"""What lies in a shard set or in one shard, for a person to look at."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data_prep.card import class_name
from data_prep.manifest import MANIFEST_NAME, Manifest
from data_prep.samples import Sample, contact_sheet, read_samples


@dataclass(frozen=True)
class Inspection:
    """The first samples with their (width, height) and class names, and the counts per class.

    ``counts`` has the number of images of each class by split, or of the one shard by its name.
    """

    samples: list[tuple[Sample, tuple[int, int], str]]
    counts: dict[str, dict[str, int]]

    def sheet(self) -> bytes:
        """A contact sheet of the samples, PNG."""
        return contact_sheet((sample.image, name) for sample, _, name in self.samples)


def inspect(path: Path, samples: int) -> Inspection:
    """Look into a set or, if ``path`` is a file, into a shard and the set that it lies in.

    Raises ValueError or FileNotFoundError where there is neither.
    """
    if path.is_dir():
        manifest = Manifest.load(path)
        shards = [shard for split in manifest.splits.values() for shard in split.shards]
        found = itertools.chain.from_iterable(read_samples(path / shard.name) for shard in shards)
        counts = {
            name: {
                _named(manifest, label): count for label, count in enumerate(split.counts) if count
            }
            for name, split in manifest.splits.items()
        }
        return Inspection(_described(itertools.islice(found, samples), manifest), counts)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a shard set or a shard")
    owner = Manifest.load(path.parent) if (path.parent / MANIFEST_NAME).exists() else None
    in_shard: dict[str, int] = {}
    first: list[Sample] = []
    for sample in read_samples(path):
        first += [sample] if len(first) < samples else []
        name = _named(owner, sample.label)
        in_shard[name] = in_shard.get(name, 0) + 1
    return Inspection(_described(iter(first), owner), {path.name: dict(sorted(in_shard.items()))})


def _named(manifest: Manifest | None, label: int) -> str:
    return str(label) if manifest is None else f"{label} {class_name(manifest, label)}"


def _described(
    samples: Iterator[Sample], manifest: Manifest | None
) -> list[tuple[Sample, tuple[int, int], str]]:
    rows = []
    for sample in samples:
        with Image.open(io.BytesIO(sample.image)) as image:
            rows.append((sample, image.size, _named(manifest, sample.label)))
    return rows
