"""Encoded samples at known places of WebDataset shards, found through their DALI indices."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from data_prep.files import CHECKSUM_PLACE, OpenFiles, checksum
from data_prep.manifest import Manifest, Shard, Split

TAR_BLOCK = 512
OWNER_LENGTH = 32
INDEX_VERSION = "v1.2"
IMAGE_EXTENSIONS = ("jpg", "png")


class ShardError(ValueError):
    """A shard set that is not what its manifest says; the message names the file and the cure."""


class Sample(NamedTuple):
    """One encoded image; `data` (size,) uint8 is the whole file, `shard` where it came from."""

    data: npt.NDArray[np.uint8]
    label: int
    key: str
    extension: str
    shard: Path
    offset: int

    def error(self, problem: str) -> ShardError:
        return _sample_error(self.shard, self.key, self.offset, problem)

    def undecodable(self) -> ShardError:
        return self.error("the image cannot be decoded")


class ShardSet:
    """The samples of one split, numbered along its shards from 0.

    Opening checks what is cheap: index hashes, shard sizes and counts. `reprise verify` reads
    everything. Processes may share it by fork or by pickling. Raises ShardError.
    """

    def __init__(self, manifest: Manifest, split: Split) -> None:
        if not split.samples:
            raise ShardError(f"split {split.name!r} of {manifest.root} is empty: use another")
        self.sizes = tuple(shard.samples for shard in split.shards)
        self._classes = len(manifest.classes)
        self._image_size = manifest.image_size
        folders = [manifest.folder_of(shard) for shard in split.shards]
        self._paths = [
            folder / shard.name for folder, shard in zip(folders, split.shards, strict=True)
        ]
        self._ends = np.cumsum(self.sizes)
        for folder, shard in zip(folders, split.shards, strict=True):
            _check_files(shard, folder, manifest)
        parsed = [
            _parse_index(shard, folder) for folder, shard in zip(folders, split.shards, strict=True)
        ]
        # Per sample: offset and size of the image, offset and size of the label, in bytes.
        self._places = np.concatenate([places for places, _ in parsed])
        self._names = np.concatenate([names for _, names in parsed])
        self._files = OpenFiles(self._paths)

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self._files.close()

    def read(self, samples: npt.NDArray[np.int64]) -> list[Sample]:
        """The samples of these ids, in this order, each by one positioned read.

        Raises ShardError where a tar header does not name the sample, its content is not what was
        prepared, or the label is no class.
        """
        shards = np.searchsorted(self._ends, samples, side="right").tolist()
        names = self._names[samples].tolist()
        places = self._places[samples].tolist()
        return [
            self._read(shard, name, *place)
            for shard, name, place in zip(shards, names, places, strict=True)
        ]

    def image_sizes(self, samples: list[Sample]) -> npt.NDArray[np.int64]:
        """Heights and widths, (n, 2), from the images' headers where the set has several."""
        low_height, high_height, low_width, high_width = self._image_size
        if low_height == high_height and low_width == high_width:
            return np.tile(np.array([low_height, low_width], dtype=np.int64), (len(samples), 1))
        return np.array([_header_size(sample) for sample in samples], dtype=np.int64)

    def _read(
        self, number: int, name: bytes, image: int, size: int, label: int, label_size: int
    ) -> Sample:
        key, extension = name.decode().rsplit(".", 1)
        start = min(image, label) - TAR_BLOCK
        data = bytearray(max(image + size, label + label_size) - start)
        path = self._paths[number]
        if os.preadv(self._files.descriptor(number), [data], start) != len(data):
            raise _sample_error(path, key, image, "the shard ends within this sample")
        label_name = f"{key}.cls".encode()
        for offset, length, member in ((image, size, name), (label, label_size, label_name)):
            # Catches a shard whose contents moved or are another's, or that is damaged.
            if problem := _damage(data, offset - start, length, offset - TAR_BLOCK, member):
                raise _sample_error(path, key, image, problem)
        text = data[label - start : label - start + label_size]
        if not text.isdigit() or int(text) >= self._classes:
            problem = f"label {bytes(text)!r} is not one of the classes 0..{self._classes - 1}"
            raise _sample_error(path, key, image, problem)
        encoded = np.frombuffer(data, np.uint8, size, image - start)
        return Sample(encoded, int(text), key, extension, path, image)


def _damage(data: bytearray, begin: int, size: int, header: int, member: bytes) -> str | None:
    """What is wrong with the content at `begin` of `data`, whose tar header is `header` of the tar.

    Damaged JPEGs decode to other pixels, and damaged PNGs end torchvision's process: nothing is
    decoded that is not what was prepared.
    """
    if not data.startswith(member + b"\0", begin - TAR_BLOCK):
        return f"the tar header of {member.decode()} is not at {header}"
    found = checksum(memoryview(data)[begin : begin + size])
    owner = begin - TAR_BLOCK + CHECKSUM_PLACE
    if data.startswith(found.encode() + b"\0", owner):
        return None
    said = data[owner : owner + OWNER_LENGTH].partition(b"\0")[0].decode("ascii", "replace")
    return f"the CRC-32 of {member.decode()} is {found}, its tar header says {said!r}"


def _cure(root: Path) -> str:
    return (
        f"run `reprise verify {root}`, then prepare the set again, or stage it again if it is a "
        "copy"
    )


def _sample_error(shard: Path, key: str, offset: int, problem: str) -> ShardError:
    return ShardError(f"{shard.name}, key {key}, offset {offset}: {problem}; {_cure(shard.parent)}")


def _check_files(shard: Shard, root: Path, manifest: Manifest) -> None:
    for name in (shard.name, shard.index):
        if not (root / name).is_file():
            raise ShardError(f"{root / name} is missing; {_cure(root)}")
    size = (root / shard.name).stat().st_size
    if size != shard.bytes:
        raise ShardError(
            f"{root / shard.name} has {size} bytes instead of {shard.bytes}; {_cure(root)}"
        )
    digest = hashlib.sha256((root / shard.index).read_bytes()).hexdigest()
    if digest == shard.index_sha256:
        return
    for split in manifest.splits.values():
        for other in split.shards:
            if digest == other.index_sha256:
                raise ShardError(
                    f"{root / shard.index} is the index of {other.name}, not of {shard.name}; "
                    f"{_cure(root)}"
                )
    raise ShardError(f"{root / shard.index} is not the index of the manifest; {_cure(root)}")


def _parse_index(shard: Shard, root: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bytes_]]:
    """Places (samples, 4) and file names of the images of a shard, from its DALI index."""
    header, *lines = (root / shard.index).read_text().splitlines()
    if header != f"{INDEX_VERSION} {len(lines)}" or len(lines) != shard.samples:
        raise ShardError(
            f"{root / shard.index} begins with {header!r} and lists {len(lines)} samples instead "
            f"of {shard.samples}; {_cure(root)}"
        )
    places: list[tuple[str, str, str, str]] = []
    names: list[str] = []
    for line in lines:
        words = line.split()
        components = {words[i]: words[i + 1 : i + 4] for i in range(0, len(words), 4)}
        images = [components[kind] for kind in IMAGE_EXTENSIONS if kind in components]
        if len(images) != 1 or "cls" not in components:
            raise ShardError(
                f"{shard.name}, sample {len(names)} at offset {words[1]} has the components "
                f"{sorted(components)} instead of one of jpg and png, and cls; {_cure(root)}"
            )
        offset, size, name = images[0]
        places.append((offset, size, components["cls"][0], components["cls"][1]))
        names.append(name)
    return np.array(places, dtype=np.int64).reshape(-1, 4), np.array(names, dtype=np.bytes_)


def _header_size(sample: Sample) -> tuple[int, int]:
    """Height and width."""
    try:
        if sample.extension == "jpg":  # fifteen times as fast as Pillow
            height, width, *_ = simplejpeg.decode_jpeg_header(sample.data)
            return height, width
        with Image.open(io.BytesIO(sample.data.tobytes())) as image:
            return image.height, image.width
    # simplejpeg's KeyError: colours sampled in a rare way.
    except (OSError, SyntaxError, ValueError, IndexError, KeyError) as error:
        raise sample.undecodable() from error
