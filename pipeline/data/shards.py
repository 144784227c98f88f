"""Encoded samples at known places of WebDataset shards, found through their DALI indices."""

from __future__ import annotations

import hashlib
import io
import os
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_prep.manifest import Manifest, Shard, Split

TAR_BLOCK = 512
INDEX_VERSION = "v1.2"
IMAGE_EXTENSIONS = ("jpg", "png")
# Shuffling stays within a few shards at a time, so few open files serve sets of any size.
OPEN_FILES = 64


class ShardError(ValueError):
    """A shard set that is not what its manifest says; the message names the file and the cure."""


@dataclass(frozen=True)
class Sample:
    """One encoded image; `data` is the file's bytes, (size,) uint8."""

    data: npt.NDArray[np.uint8]
    label: int
    key: str
    extension: str
    url: str  # shard file
    place: str  # for messages: shard, key, offset
    cure: str


@dataclass(frozen=True)
class _Index:
    """Where the components of a shard's samples lie: one row per sample, bytes."""

    image_offset: npt.NDArray[np.int64]
    image_size: npt.NDArray[np.int64]
    label_offset: npt.NDArray[np.int64]
    label_size: npt.NDArray[np.int64]
    image_name: npt.NDArray[np.bytes_]


class ShardSet:
    """The samples of one split, numbered along its shards from 0.

    Opening checks what is cheap: index hashes, shard sizes and counts. `reprise verify` reads
    everything. Processes may share it by fork or by pickling. Raises ShardError.
    """

    def __init__(self, manifest: Manifest, split: Split) -> None:
        self.root = manifest.root
        self.classes = len(manifest.classes)
        self._image_size = manifest.image_size
        self.shards = split.shards
        self.sizes = tuple(shard.samples for shard in split.shards)
        self.starts = np.concatenate(([0], np.cumsum(self.sizes))).astype(np.int64)
        self._indices = [self._open_index(shard, split) for shard in split.shards]
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def read(self, samples: Iterable[int] | npt.NDArray[np.int64]) -> list[Sample]:
        """The samples of these ids, in this order, each by one positioned read."""
        ids = np.asarray(samples, dtype=np.int64)
        shards = np.searchsorted(self.starts, ids, side="right") - 1
        rows = ids - self.starts[shards]
        return [self._read(s, r) for s, r in zip(shards.tolist(), rows.tolist(), strict=True)]

    def image_sizes(self, samples: list[Sample]) -> npt.NDArray[np.int64]:
        """Heights and widths, (n, 2), from the images' headers where the set has several."""
        low_height, high_height, low_width, high_width = self._image_size
        if low_height == high_height and low_width == high_width:
            return np.tile(np.array([low_height, low_width], dtype=np.int64), (len(samples), 1))
        return np.array([_image_size(sample) for sample in samples], dtype=np.int64).reshape(-1, 2)

    def _read(self, number: int, row: int) -> Sample:
        index = self._indices[number]
        shard = self.shards[number].name
        image, size = int(index.image_offset[row]), int(index.image_size[row])
        label, label_size = int(index.label_offset[row]), int(index.label_size[row])
        name: bytes = index.image_name[row]
        stem, _, extension = name.decode().rpartition(".")
        start = min(image, label) - TAR_BLOCK
        data = bytearray(max(image + size, label + label_size) - start)
        place = f"{shard}, key {stem}, offset {image}"
        if os.preadv(self._file(number), [data], start) != len(data):
            raise ShardError(f"{place}: the shard ends within this sample{self._cure}")
        for offset, expected in ((image, name), (label, f"{stem}.cls".encode())):
            header = offset - TAR_BLOCK - start
            if not data.startswith(expected + b"\0", header):
                raise ShardError(
                    f"{place}: no tar header of {expected.decode()} at offset "
                    f"{offset - TAR_BLOCK}{self._cure}"
                )
        return Sample(
            np.frombuffer(data, np.uint8, size, image - start),
            self._label(bytes(data[label - start : label - start + label_size]), place),
            stem,
            extension,
            str(self.root / shard),
            place,
            self._cure,
        )

    def _label(self, text: bytes, place: str) -> int:
        try:
            label = int(text)
        except ValueError:
            raise ShardError(f"{place}: label {text!r} is not an integer{self._cure}") from None
        if not 0 <= label < self.classes:
            raise ShardError(
                f"{place}: label {label} is not one of the {self.classes} classes "
                f"0..{self.classes - 1}{self._cure}"
            )
        return label

    def _file(self, number: int) -> int:
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        if len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[number] = os.open(self.root / self.shards[number].name, os.O_RDONLY)
        return self._files[number]

    def _open_index(self, shard: Shard, split: Split) -> _Index:
        path = self.root / shard.index
        for file in (path, self.root / shard.name):
            if not file.is_file():
                raise ShardError(f"{file} is missing{self._cure}")
        text = path.read_bytes()
        digest = hashlib.sha256(text).hexdigest()
        if digest != shard.index_sha256:
            for other in split.shards:
                if digest == other.index_sha256:
                    raise ShardError(
                        f"{path} is the index of {other.name}, not of {shard.name}{self._cure}"
                    )
            raise ShardError(f"{path} is not the index that the manifest names{self._cure}")
        size = (self.root / shard.name).stat().st_size
        if size != shard.bytes:
            raise ShardError(
                f"{self.root / shard.name} has {size} bytes, {shard.bytes} are expected{self._cure}"
            )
        return _parse_index(text.decode(), shard, self._cure)

    @property
    def _cure(self) -> str:
        return f"; run `reprise verify {self.root}`, then prepare the set again"


def _image_size(sample: Sample) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(sample.data.tobytes())) as image:
            return image.height, image.width
    except (OSError, SyntaxError) as error:
        raise ShardError(f"{sample.place}: cannot be decoded ({error}){sample.cure}") from None


def _parse_index(text: str, shard: Shard, cure: str) -> _Index:
    header, *lines = text.splitlines()
    if header != f"{INDEX_VERSION} {len(lines)}" or len(lines) != shard.samples:
        raise ShardError(
            f"{shard.index} begins with {header!r} and lists {len(lines)} samples, "
            f"'{INDEX_VERSION} {shard.samples}' is expected{cure}"
        )
    numbers = np.empty((len(lines), 4), np.int64)
    names = []
    for row, line in enumerate(lines):
        words = line.split()
        components = {words[i]: words[i + 1 : i + 4] for i in range(0, len(words), 4)}
        images = [components[e] for e in IMAGE_EXTENSIONS if e in components]
        if len(images) != 1 or "cls" not in components:
            raise ShardError(
                f"{shard.name}, sample {row} ({words[3] if len(words) > 3 else line!r}) has the "
                f"components {sorted(components)}, one of jpg and png and a cls are needed{cure}"
            )
        label = components["cls"]
        numbers[row] = (int(images[0][0]), int(images[0][1]), int(label[0]), int(label[1]))
        names.append(images[0][2].encode())
    columns = np.ascontiguousarray(numbers.T)
    return _Index(columns[0], columns[1], columns[2], columns[3], np.array(names, dtype=np.bytes_))
