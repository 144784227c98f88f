"""What a source offers: the images it holds, by split and class, and how to read one."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from data_prep.images import encode_png
from data_prep.manifest import CLASSIFICATION


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source. ``origin`` names it to a person and is unique within the source.

    ``offset`` and ``size`` tell the listing's reader where its bytes lie.
    """

    split: str
    label: int
    origin: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Rejection:
    """Something a source holds that is not in the set; ``split`` is "" outside of the splits."""

    split: str
    origin: str
    reason: str


class Reader(Protocol):
    """Reads one item's encoded bytes; picklable, so that workers can."""

    def read(self, item: Item) -> bytes: ...


@dataclass(frozen=True)
class Listing:
    """All that a source holds. ``settings`` is what else decides the bytes read from it.

    ``task`` and ``evaluation_split`` are the manifest's.
    """

    name: str
    classes: tuple[str, ...]
    items: list[Item]
    rejected: list[Rejection]
    reader: Reader
    settings: dict[str, Any] = field(default_factory=dict)
    task: str = CLASSIFICATION
    evaluation_split: str | None = None

    @property
    def sha256(self) -> str:
        """Identity of what was listed: classes, names, labels and sizes, not the pixels."""
        digest = hashlib.sha256(json.dumps([self.name, self.classes]).encode())
        for item in sorted(self.items, key=lambda item: item.origin):
            line = json.dumps([item.split, item.label, item.origin, item.size])
            digest.update(line.encode() + b"\n")
        for entry in sorted(self.rejected, key=lambda entry: entry.origin):
            digest.update(json.dumps([entry.split, entry.origin, entry.reason]).encode() + b"\n")
        return digest.hexdigest()


class Source(Protocol):
    """Where images come from."""

    def open(self, scratch: Path) -> Listing:
        """List the source; ``scratch`` is an empty folder that lives as long as the listing.

        Raises ValueError or FileNotFoundError where the source cannot be used as it is.
        """
        ...


@dataclass(frozen=True)
class FolderReader:
    """Items are files under ``root``; their origin is the path from there."""

    root: Path

    def read(self, item: Item) -> bytes:
        try:
            return (self.root / item.origin).read_bytes()
        except OSError as error:
            raise ValueError(
                f"cannot read {self.root / item.origin} ({error.strerror}): "
                f"make it readable or take it out of the source"
            ) from None


@dataclass(frozen=True)
class RangeReader:
    """Items are ranges of bytes of one file, such as the members of a tar."""

    file: Path

    def read(self, item: Item) -> bytes:
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            data = os.pread(descriptor, item.size, item.offset)
        finally:
            os.close(descriptor)
        if len(data) != item.size:
            raise ValueError(f"{self.file} ends within {item.origin}: fetch the archive again")
        return data


@dataclass(frozen=True)
class PixelReader:
    """Items are raw pixels in one file: ``height x width`` bytes, times three for mode RGB."""

    file: Path
    mode: str
    width: int
    height: int

    def read(self, item: Item) -> bytes:
        pixels = RangeReader(self.file).read(item)
        return encode_png(Image.frombytes(self.mode, (self.width, self.height), pixels))
