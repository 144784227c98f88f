"""What a source offers: the images it holds, by split and class, and how to read one."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from data_prep.files import OpenFiles
from data_prep.images import encode_png
from data_prep.items import Item, Items
from data_prep.manifest import CLASSIFICATION


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

    ``task``, ``evaluation_split`` and ``names`` are the manifest's. ``ordered`` are the splits that
    keep the order of their origins. ``stamp`` changes with the source's modification times: it
    belongs to one place and time, so no finished set knows of it.
    """

    name: str
    classes: tuple[str, ...]
    items: list[Item] | Items
    rejected: list[Rejection]
    reader: Reader
    settings: dict[str, Any] = field(default_factory=dict)
    task: str = CLASSIFICATION
    evaluation_split: str | None = None
    names: tuple[str, ...] = ()
    ordered: tuple[str, ...] = ()
    stamp: str = ""

    @property
    def sha256(self) -> str:
        """Identity of what was listed: classes, names, labels and sizes, not the pixels."""
        digest = Items.of(self.items).digest([self.name, self.classes])
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


class RangeReader:
    """Items are ranges of bytes of files, such as the members of tars; ``item.file`` is which."""

    def __init__(self, *files: Path) -> None:
        self.files = files
        self._open = OpenFiles(files)

    def read(self, item: Item) -> bytes:
        file = self.files[item.file]
        try:
            data = os.pread(self._open.descriptor(item.file), item.size, item.offset)
        except OSError as error:
            raise ValueError(
                f"cannot read {item.origin} in {file} ({error.strerror}): make it readable"
            ) from None
        if len(data) != item.size:
            raise ValueError(f"{file} ends within {item.origin}: fetch the archive again")
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
