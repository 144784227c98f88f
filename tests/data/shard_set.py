"""Tiny shard sets for tests: what a prepared set is, written down independently of the writer."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.manifest import Manifest, Shard, Split

CLASSES = tuple(f"class {i}" for i in range(10))


def picture(seed: int, height: int = 32, width: int = 32) -> np.ndarray:
    """A smooth random RGB image, (height, width, 3) uint8, with mid-range values."""
    coarse = np.random.default_rng(seed).integers(20, 236, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(pixels: np.ndarray, extension: str) -> bytes:
    buffer = io.BytesIO()
    kind = {"jpg": "JPEG", "png": "PNG"}[extension]
    Image.fromarray(pixels).save(buffer, kind, quality=90)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[str, int, int, str]:
    """Append a member, with its checksum; returns its entry for the index."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.uname = f"{zlib.crc32(data):08x}"
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return name.rpartition(".")[2], offset, len(data), name


def write_shard(
    root: Path, name: str, samples: Sequence[tuple[str, str, bytes, bytes | None]]
) -> Shard:
    """A shard and its index from (key, extension, image, label text or None for no label)."""
    entries = []
    with tarfile.open(root / f"{name}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, extension, image, label in samples:
            entry = [add(tar, f"{key}.{extension}", image)]
            if label is not None:
                entry.append(add(tar, f"{key}.cls", label))
            entries.append(" ".join(str(word) for part in entry for word in part))
    (root / f"{name}.idx").write_text("\n".join([f"v1.2 {len(entries)}", *entries]) + "\n")
    return describe(root, name, len(samples))


def describe(root: Path, name: str, samples: int) -> Shard:
    tar, index = (root / f"{name}.tar").read_bytes(), (root / f"{name}.idx").read_bytes()
    return Shard(
        name=f"{name}.tar",
        samples=samples,
        bytes=len(tar),
        sha256=hashlib.sha256(tar).hexdigest(),
        index=f"{name}.idx",
        index_sha256=hashlib.sha256(index).hexdigest(),
    )


def build(
    root: Path,
    train: Sequence[int] = (40, 24),
    test: Sequence[int] = (33, 31),
    extension: str = "png",
    sizes: Sequence[tuple[int, int]] = ((32, 32),),
    grey: bool = False,
) -> Manifest:
    """A set of generated images: shard sizes per split, image sizes taken in turn."""
    splits = {}
    number = 0
    for split, counts in (("train", train), ("test", test)):
        shards = []
        for shard, count in enumerate(counts):
            samples = []
            for _ in range(count):
                pixels = picture(number, *sizes[number % len(sizes)])
                if grey and number % 3 == 0:
                    pixels = pixels[..., 0]
                samples.append(
                    (
                        f"{split}-{number:08d}",
                        extension,
                        encode(pixels, extension),
                        str(number % 10).encode(),
                    )
                )
                number += 1
            shards.append(write_shard(root, f"{split}-{shard:06d}", samples))
        splits[split] = Split(split, tuple(shards), (0,) * 10)
    return manifest(root, splits, sizes)


def manifest(root: Path, splits: dict[str, Split], sizes: Sequence[tuple[int, int]]) -> Manifest:
    """What a set of these (height, width) says of itself."""
    heights, widths = zip(*sizes, strict=True)
    samples = sum(split.samples for split in splits.values())
    return Manifest(
        root=root,
        name="generated",
        classes=CLASSES,
        splits=splits,
        image_size=(min(heights), max(heights), min(widths), max(widths)),
        channel_mean=(0.5, 0.4, 0.3),
        channel_std=(0.2, 0.25, 0.3),
        found=samples,
        accepted=samples,
        rejected=0,
        settings={},
        tools={},
    )


def with_shard(made: Manifest, split: str, number: int, shard: Shard) -> Manifest:
    """The same manifest with another description of one shard."""
    shards = list(made.splits[split].shards)
    shards[number] = shard
    changed = replace(made.splits[split], shards=tuple(shards))
    return replace(made, splits=made.splits | {split: changed})


def from_tar(root: Path, source: Path, count: int) -> Manifest:
    """A set of the first JPEGs of a tar, all of them in both splits."""
    samples = []
    sizes = []
    with tarfile.open(source) as tar:
        for member in tar:
            if member.isfile() and len(samples) < count:
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                sizes.append(Image.open(io.BytesIO(data)).size[::-1])
                samples.append((f"photo-{len(samples):04d}", "jpg", data, b"0"))
    splits = {
        name: Split(name, (write_shard(root, f"{name}-000000", samples),), (count, *(0,) * 9))
        for name in ("train", "test")
    }
    return manifest(root, splits, sizes)
