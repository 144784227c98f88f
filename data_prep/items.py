"""Millions of items in columns: 40 bytes and a name each, on disk what they are in memory."""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_COLUMNS = ("split", "label", "file", "offset", "size", "end", "name")
TEXT = ("utf-8", "surrogateescape")
_AT_ONCE = 4096
_TYPES = "BiiqqqB"  # of the columns, as module array calls them


class Item(NamedTuple):
    """One image of a source. ``origin`` names it to a person and is unique within the source.

    ``file``, ``offset`` and ``size`` tell the listing's reader where its bytes lie.
    """

    split: str
    label: int
    origin: str
    offset: int
    size: int
    file: int = 0


@dataclass(frozen=True, eq=False)
class Items:
    """Items in an order. ``splits`` names the values of the column ``split``; the origin of item
    n is ``name[end[n - 1] : end[n]]``, in UTF-8."""

    splits: tuple[str, ...]
    split: npt.NDArray[np.uint8]
    label: npt.NDArray[np.int32]
    file: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    name: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, items: Iterable[Item]) -> Items:
        """These items, some at a time."""
        if isinstance(items, Items):
            return items
        splits: dict[str, int] = {}
        split, label, file, offset, size, end, name = (array(kind) for kind in _TYPES)
        rest = iter(items)
        while some := list(itertools.islice(rest, _AT_ONCE)):
            of_splits, labels, origins, offsets, sizes, files = zip(*some, strict=True)
            for of_split in dict.fromkeys(of_splits):
                splits.setdefault(of_split, len(splits))
            split.extend(map(splits.__getitem__, of_splits))
            label.extend(labels)
            offset.extend(offsets)
            size.extend(sizes)
            file.extend(files)
            for origin in origins:
                name.frombytes(origin.encode(*TEXT))
                end.append(len(name))
        columns = (split, label, file, offset, size, end, name)
        return cls(tuple(splits), *(np.asarray(column) for column in columns))

    def __len__(self) -> int:
        return len(self.split)

    def __iter__(self) -> Iterator[Item]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self.take(np.arange(start, min(start + _AT_ONCE, len(self))))

    def take(self, numbers: npt.NDArray[np.int64]) -> list[Item]:
        """These items, in this order."""
        numbered = (self.split, self.label, self.offset, self.size, self.file)
        columns = (column[numbers].tolist() for column in numbered)
        return [
            Item(self.splits[split], label, name.decode(*TEXT), offset, size, file)
            for name, split, label, offset, size, file in zip(
                self.names(numbers), *columns, strict=True
            )
        ]

    def names(self, numbers: npt.NDArray[np.int64] | None = None) -> Iterator[bytes]:
        """The origins of these items, None: of all, in UTF-8."""
        text = self.name.data
        if numbers is None:
            ends = self.end
            starts = np.concatenate(([0], ends))[:-1]
        else:  # no more of the columns than is asked for
            ends = self.end[numbers]
            starts = np.where(numbers > 0, self.end[numbers - 1], 0)
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            yield text[start:end].tobytes()

    def digest(self, heading: Any) -> hashlib._Hash:
        """SHA-256 over a heading and each item's split, label, origin and size, by origin."""
        digest = hashlib.sha256(json.dumps(heading).encode())
        splits = [json.dumps(split) for split in self.splits]
        text = [name.decode(*TEXT) for name in self.names()]
        split, label, size = self.split.tolist(), self.label.tolist(), self.size.tolist()
        for n in sorted(range(len(text)), key=text.__getitem__):
            origin = json.encoder.encode_basestring_ascii(text[n])
            digest.update(f"[{splits[split[n]]}, {label[n]}, {origin}, {size[n]}]\n".encode())
        return digest

    def save(self, folder: Path) -> None:
        """Write the columns into ``folder``."""
        (folder / "splits.json").write_text(json.dumps(self.splits))
        for column in _COLUMNS:
            np.save(folder / f"{column}.npy", getattr(self, column))

    @classmethod
    def load(cls, folder: Path) -> Items:
        """Columns that are read from disk where they are needed."""
        splits = json.loads((folder / "splits.json").read_text())
        return cls(
            tuple(splits),
            *(np.load(folder / f"{column}.npy", mmap_mode="r") for column in _COLUMNS),
        )
