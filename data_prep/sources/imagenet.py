"""ImageNet-1k (ILSVRC 2012) as published, archives of archives, or as class folders."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.images import BYTE_LIMIT
from data_prep.items import Item, Items
from data_prep.listing import FolderReader, Listing, RangeReader, Rejection
from data_prep.manifest import TRAIN
from data_prep.sources.devkit import NAMES as DEVKIT_NAMES
from data_prep.sources.devkit import Devkit, read_devkit
from data_prep.tars import GZIP_MAGIC, Member, Window, members
from data_prep.trees import describe, hidden

VALIDATION = "val"
TRAIN_ARCHIVE, VALIDATION_ARCHIVE = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
IMAGES = {TRAIN: 1_281_167, VALIDATION: 50_000}

_WNID = re.compile(r"n\d{8}")
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_ARRANGEMENT = (
    f"give a folder with {TRAIN_ARCHIVE} or train/, {VALIDATION_ARCHIVE} or val/, and "
    f"{DEVKIT_NAMES[0]}"
)
_ON_DISK = -1  # as an item's file: its origin is its path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageNetSource:
    """A folder that holds ImageNet in any of its usual forms.

    Training images: the published archive of class archives, a folder ``train`` of class archives,
    or one of class folders, each called by its WordNet id. Validation images: the published
    archive, or a folder ``val`` of its files, or of class folders. Labels and names: the
    development kit, packed or not. Every form gives the same listing.

    What is not whole is refused, or with ``allow_partial`` warned of: a missing kit, missing
    classes or images. Images whose label is not known are then rejected one by one.
    """

    path: Path
    allow_partial: bool = False

    def open(self, scratch: Path) -> Listing:
        """List the images from the headers of the archives; nothing is extracted.

        Raises ValueError where something is missing, contradictory, damaged or unsafe.
        """
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is no folder: {_ARRANGEMENT}")
        devkit = self._devkit(scratch)
        found = _Found()
        train = _train_places(self.path, found)
        classes = self._classes(devkit, train)
        items = Items.of(
            itertools.chain(
                _train_items(train, classes, found),
                self._validation_items(devkit, classes, found),
            )
        )
        self._check_counts(items, classes)
        names = tuple(devkit.names[wnid] for wnid in classes) if devkit else ()
        return Listing(
            name="imagenet",
            classes=classes,
            items=items,
            rejected=found.rejected,
            reader=_Reader(self.path, RangeReader(*found.archives), classes, found.val_by_class),
            settings={"source": "imagenet"},
            names=names,
            ordered=(VALIDATION,),
            stamp=found.stamp.hexdigest(),
        )

    def _complain(self, problem: str) -> None:
        if not self.allow_partial:
            raise ValueError(f"{problem}, or give --allow-partial")
        logger.warning("%s", problem)

    def _devkit(self, scratch: Path) -> Devkit | None:
        for name in DEVKIT_NAMES:
            if (self.path / name).exists():
                return read_devkit(self.path / name, scratch)
        self._complain(f"{self.path} has no development kit: put {DEVKIT_NAMES[0]} there")
        return None

    def _classes(self, devkit: Devkit | None, train: list[_Place]) -> tuple[str, ...]:
        found = {place.wnid for place in train}
        if devkit is None:
            return tuple(sorted(found))
        if unknown := sorted(found - devkit.names.keys()):
            raise ValueError(f"{unknown[0]} is no class of the development kit: take it out")
        if missing := sorted(devkit.names.keys() - found):
            some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            self._complain(
                f"{self.path} lacks {len(missing)} of {len(devkit.names)} classes ({some}): add "
                "their archives"
            )
        return tuple(sorted(devkit.names))

    def _validation_items(
        self, devkit: Devkit | None, classes: tuple[str, ...], found: _Found
    ) -> Iterator[Item]:
        truth = devkit.validation if devkit else ()
        if devkit and len(truth) != IMAGES[VALIDATION]:
            self._complain(
                f"the ground truth has {len(truth):,} lines and not {IMAGES[VALIDATION]:,}: fetch "
                "the development kit again"
            )
        ids = {wnid: label for label, wnid in enumerate(classes)}
        seen: set[str] = set()
        for entry in _validation_entries(self.path, found):
            origin = f"{VALIDATION}/{entry.name}"
            match = _VALIDATION_NAME.fullmatch(entry.name)
            if entry.name in seen:
                raise ValueError(f"{self.path} holds {origin} twice: take one of them out")
            seen.add(entry.name)
            if problem := entry.problem or _problem(entry, match is not None):
                found.rejected.append(Rejection(VALIDATION, origin, problem))
                continue
            assert match is not None
            wnid = _label(int(match[1]), entry.wnid, truth, origin)
            if wnid not in ids:
                problem = f"of class {wnid}, which train lacks" if wnid else "no label is known"
                found.rejected.append(Rejection(VALIDATION, origin, problem))
                continue
            yield Item(VALIDATION, ids[wnid], origin, entry.offset, entry.size, entry.file)

    def _check_counts(self, items: Items, classes: tuple[str, ...]) -> None:
        for split, expected in IMAGES.items():
            in_split = np.zeros(len(items), bool)
            if split in items.splits:
                in_split = items.split == items.splits.index(split)
            count = int(in_split.sum())
            if count != expected:
                self._complain(
                    f"{self.path} has {count:,} images for {split} and not {expected:,}: fetch "
                    "what is missing"
                )
            if split == TRAIN:
                labels = np.bincount(items.label[in_split], minlength=len(classes))
                if (empty := np.flatnonzero(labels == 0)).size:
                    self._complain(
                        f"{len(empty)} classes have no image to train on, first "
                        f"{classes[empty[0]]}: fetch them again"
                    )


@dataclass
class _Found:
    """What is gathered on the way: archives, rejections, modification times."""

    archives: list[Path] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    val_by_class: bool = False
    stamp: Any = field(default_factory=hashlib.sha256)

    def archive(self, path: Path) -> int:
        """The number under which items name this archive."""
        self.saw(path.stat().st_mtime_ns)
        self.archives.append(path)
        return len(self.archives) - 1

    def saw(self, modified: int) -> None:
        self.stamp.update(b"%d\n" % modified)


@dataclass(frozen=True)
class _Place:
    """A class folder, or a class archive: ``size`` bytes at ``offset`` of the archive ``file``."""

    wnid: str
    path: Path
    file: int = _ON_DISK
    offset: int = 0
    size: int = 0


class _Entry(NamedTuple):
    """A file in a place; ``wnid`` is "" where its place is of no class."""

    wnid: str
    name: str
    file: int
    offset: int
    size: int
    problem: str | None = None


@dataclass(frozen=True)
class _Reader:
    root: Path
    archives: RangeReader
    classes: tuple[str, ...]
    val_by_class: bool

    def read(self, item: Item) -> bytes:
        if item.file != _ON_DISK:
            return self.archives.read(item)
        if item.split == VALIDATION and self.val_by_class:
            name = item.origin.removeprefix(f"{VALIDATION}/")
            item = item._replace(origin=f"{VALIDATION}/{self.classes[item.label]}/{name}")
        return FolderReader(self.root).read(item)


def _train_places(root: Path, found: _Found) -> list[_Place]:
    """All class archives or folders, by WordNet id."""
    archive, folder = root / TRAIN_ARCHIVE, root / TRAIN
    if archive.exists() and folder.exists():
        raise ValueError(f"{root} has {TRAIN_ARCHIVE} and {TRAIN}/: take one of them out")
    if archive.exists():
        places = _archives_in_archive(archive, found)
    elif folder.is_dir():
        places = _places_in_folder(folder, found)
    else:
        raise ValueError(f"{root} has no {TRAIN_ARCHIVE} and no {TRAIN}/: {_ARRANGEMENT}")
    twice = [wnid for wnid, count in Counter(place.wnid for place in places).items() if count > 1]
    if twice:
        raise ValueError(f"{root} has the class {twice[0]} twice in {TRAIN}: take one of them out")
    return sorted(places, key=lambda place: place.wnid)


def _archives_in_archive(archive: Path, found: _Found) -> list[_Place]:
    number = found.archive(archive)
    places = []
    for member in _members(archive, 0, archive.stat().st_size, str(archive)):
        name = posixpath.basename(member.name)
        wnid = name.removesuffix(".tar")
        if member.is_folder:
            continue
        if name == wnid or not _WNID.fullmatch(wnid):
            found.rejected.append(Rejection(TRAIN, f"{TRAIN}/{name}", "no archive of a class"))
            continue
        places.append(_Place(wnid, archive, number, member.offset, member.size))
    return places


def _places_in_folder(folder: Path, found: _Found) -> list[_Place]:
    places = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path, wnid = Path(entry), entry.name.removesuffix(".tar")
        if not _WNID.fullmatch(wnid):
            found.rejected.append(Rejection(TRAIN, f"{TRAIN}/{entry.name}", "no class"))
        elif entry.is_dir() and wnid == entry.name:
            places.append(_Place(wnid, path))
        else:
            places.append(_Place(wnid, path, found.archive(path), 0, entry.stat().st_size))
    return places


def _train_items(places: list[_Place], classes: tuple[str, ...], found: _Found) -> Iterator[Item]:
    ids = {wnid: label for label, wnid in enumerate(classes)}
    for place in places:
        seen = set()
        for entry in _entries(place, found):
            origin = f"{TRAIN}/{place.wnid}/{entry.name}"
            if entry.name in seen:
                raise ValueError(f"{place.path} holds {origin} twice: take one of them out")
            seen.add(entry.name)
            if problem := entry.problem or _problem(entry, True):
                found.rejected.append(Rejection(TRAIN, origin, problem))
                continue
            label = ids[place.wnid]
            yield Item(TRAIN, label, origin, entry.offset, entry.size, entry.file)


def _validation_entries(root: Path, found: _Found) -> Iterator[_Entry]:
    archive, folder = root / VALIDATION_ARCHIVE, root / VALIDATION
    if archive.exists() and folder.exists():
        raise ValueError(f"{root} has {VALIDATION_ARCHIVE} and {VALIDATION}/: take one out")
    if archive.exists():
        yield from _entries(
            _Place("", archive, found.archive(archive), 0, archive.stat().st_size), found
        )
    elif folder.is_dir():
        classes = sorted(path for path in folder.iterdir() if _WNID.fullmatch(path.name))
        found.val_by_class = bool(classes)
        for place in [_Place(path.name, path) for path in classes] or [_Place("", folder)]:
            yield from _entries(place, found)


def _entries(place: _Place, found: _Found) -> Iterator[_Entry]:
    """The files of a class folder or archive."""
    if place.file == _ON_DISK:
        for entry in sorted(os.scandir(place.path), key=lambda entry: entry.name):
            file = describe(Path(entry), place.path)
            found.saw(file.modified)
            yield _Entry(place.wnid, file.path, _ON_DISK, 0, file.size, file.problem)
        return
    name = f"{place.path}, archive {place.wnid}.tar" if place.wnid else str(place.path)
    for member in _members(place.path, place.offset, place.size, name):
        if not member.is_folder:
            at = place.offset + member.offset
            base = posixpath.basename(member.name)
            yield _Entry(place.wnid, base, place.file, at, member.size)


def _members(path: Path, offset: int, size: int, name: str) -> Iterator[Member]:
    try:
        with path.open("rb") as file:
            if os.pread(file.fileno(), 2, offset) == GZIP_MAGIC:
                raise ValueError(f"{name} is compressed: unpack it with gunzip first")
            if size:
                yield from members(Window(file.fileno(), offset, size), name)
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): make it readable") from None


def _problem(entry: _Entry, well_named: bool) -> str | None:
    if hidden(entry.name):
        return "hidden file"
    if not well_named:
        return "not called ILSVRC2012_val_<8 digits>.JPEG"
    if entry.size > BYTE_LIMIT:
        return f"file of {entry.size} bytes, over the limit of {BYTE_LIMIT}"
    return None


def _label(number: int, folder: str, truth: tuple[str, ...], origin: str) -> str:
    """WordNet id of a validation image, "" where neither its folder nor the ground truth says."""
    if not truth:
        return folder
    if not 1 <= number <= len(truth):
        raise ValueError(
            f"{origin} has no line in the ground truth, which has {len(truth)}: fetch the "
            "development kit again"
        )
    if folder and folder != truth[number - 1]:
        raise ValueError(
            f"{origin} lies in the folder {folder} and is {truth[number - 1]} in the ground truth: "
            "move it there"
        )
    return truth[number - 1]
