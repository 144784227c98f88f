"""What a preparation will take, from a sample of the images, before it is begun."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.images import RejectedImageError, Treatment, check, counted_size, own_pixel_limit
from data_prep.items import Items
from data_prep.listing import Source
from data_prep.parallel import available_cores
from data_prep.writer import ShardWriter

SAMPLED = 256


@dataclass(frozen=True)
class Estimate:
    """Images found, bytes and seconds of their shards, and how many images say so.

    ``error`` is the standard error of both as a fraction: what other samples would differ by.
    """

    images: int
    bytes: float
    seconds: float
    sampled: int
    rejected: int
    error: float


def estimate(source: Source, treatment: Treatment, workers: int | None) -> Estimate:
    """Pack a sample, evenly spread over the source, on one core and infer the rest.

    Raises what opening the source raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        listing = source.open(Path(folder))
        items = Items.of(listing.items)
        if not len(items):
            raise ValueError(f"{listing.name} has no images: correct the source")
        numbers = np.unique(np.linspace(0, len(items) - 1, SAMPLED).astype(np.int64))
        writer = ShardWriter(Path(folder), "sample-000000")
        sizes = []
        counted = counted_size(treatment, len(items))  # as of the many after a shard's first
        started = time.perf_counter()
        with own_pixel_limit():
            for number, item in enumerate(items.take(numbers)):
                try:
                    image = check(listing.reader.read(item), treatment, counted)
                except RejectedImageError:
                    continue
                writer.add(f"sample-{number}", image.data, image.extension, item.label)
                sizes.append(len(image.data))
        shard = writer.close()
        seconds = time.perf_counter() - started
    factor = len(items) / len(numbers)
    spread = float(np.std(sizes) / np.mean(sizes)) if sizes else 0.0
    return Estimate(
        images=len(items),
        bytes=factor * (shard.bytes if shard else 0),
        seconds=factor * seconds / (workers or available_cores()),
        sampled=len(numbers),
        rejected=len(numbers) - len(sizes),
        error=spread / math.sqrt(len(numbers)),
    )
