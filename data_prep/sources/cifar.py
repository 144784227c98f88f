"""CIFAR-10 and CIFAR-100 as published (python batches), or as class folders of images."""

import hashlib
import io
import pickle
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from data_prep.items import Item
from data_prep.listing import Listing, PixelReader
from data_prep.sources.image_folder import list_classes
from data_prep.trees import File, Tree, open_tree

SIDE = 32
PIXELS = 3 * SIDE * SIDE


@dataclass(frozen=True)
class _Layout:
    """The files of one of the two sets and the names of what they hold."""

    name: str
    meta: str
    class_names: bytes
    labels: bytes
    batches: tuple[tuple[str, str], ...]


_LAYOUTS = (
    _Layout(
        name="cifar10",
        meta="batches.meta",
        class_names=b"label_names",
        labels=b"labels",
        batches=(
            *(("train", f"data_batch_{number}") for number in range(1, 6)),
            ("test", "test_batch"),
        ),
    ),
    _Layout(
        name="cifar100",
        meta="meta",
        class_names=b"fine_label_names",
        labels=b"fine_labels",
        batches=(("train", "train"), ("test", "test")),
    ),
)


@dataclass(frozen=True)
class CifarSource:
    """The published folder or tar.gz of python batches, or class folders of CIFAR's images.

    CIFAR-100 takes its 100 fine labels. The pixels of the batches are stored as PNG.
    """

    path: Path

    def open(self, scratch: Path) -> Listing:
        """List the images; pixels of batches are written to ``scratch``, one batch at a time."""
        tree = open_tree(self.path, scratch)
        files = {PurePosixPath(file.path).name: file for file in tree.files}
        for layout in _LAYOUTS:
            if layout.meta in files:
                return _list_batches(layout, tree, files, scratch)
        return _list_class_folders(tree)


def _list_class_folders(tree: Tree) -> Listing:
    listing = list_classes(tree)
    if len(listing.classes) not in (10, 100):
        raise ValueError(
            f"{tree.name} has {len(listing.classes)} class folders and CIFAR 10 or 100: "
            f"use the source 'folder' for other images"
        )
    return replace(listing, name=f"cifar{len(listing.classes)}")


def _list_batches(layout: _Layout, tree: Tree, files: dict[str, File], scratch: Path) -> Listing:
    missing = [name for _, name in layout.batches if name not in files]
    if missing:
        raise ValueError(f"{tree.name} lacks {', '.join(missing)} of {layout.name}: fetch it again")
    meta = _unpickle(tree, files[layout.meta])
    classes = tuple(bytes(name).decode() for name in _entry(meta, layout.class_names, layout.meta))
    items: list[Item] = []
    digest = hashlib.sha256()
    target = scratch / "pixels.bin"
    with target.open("wb") as file:
        for split, name in layout.batches:
            batch = _unpickle(tree, files[name])
            images = _images(_entry(batch, b"data", name), name)
            labels = check_labels(
                _entry(batch, layout.labels, name), name, len(images), len(classes)
            )
            start = file.tell()
            content = images.tobytes()
            digest.update(content)
            file.write(content)
            items += [
                Item(split, label, f"{name} image {row}", start + row * PIXELS, PIXELS)
                for row, label in enumerate(labels)
            ]
    return Listing(
        name=layout.name,
        classes=classes,
        items=items,
        rejected=[],
        reader=PixelReader(target, "RGB", SIDE, SIDE),
        settings={"source": "cifar", "pixels_sha256": digest.hexdigest()},
    )


def _entry(content: dict[bytes, Any], key: bytes, name: str) -> Any:
    if key not in content:
        raise ValueError(f"{name} has no {key.decode()!r}: it is no CIFAR batch, fetch it again")
    return content[key]


def _images(data: Any, name: str) -> np.ndarray:
    """Rows of 3,072 values, channel by channel, as (n, 32, 32, 3)."""
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (PIXELS,):
        raise ValueError(f"{name} does not hold rows of {PIXELS} bytes: fetch it again")
    return data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)


def check_labels(values: Any, name: str, images: int, classes: int) -> list[int]:
    labels = [int(value) for value in values]
    if len(labels) != images:
        raise ValueError(f"{name} has {len(labels)} labels for {images} images: fetch it again")
    wrong = [label for label in labels if not 0 <= label < classes]
    if wrong:
        raise ValueError(
            f"{name} has the label {wrong[0]}, valid are 0 to {classes - 1}: fetch it again"
        )
    return labels


_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _BatchUnpickler(pickle.Unpickler):
    """Builds arrays, lists, dictionaries and bytes, and calls nothing else a pickle may name."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def _unpickle(tree: Tree, file: File) -> dict[bytes, Any]:
    try:
        content = _BatchUnpickler(io.BytesIO(tree.read(file))).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(
            f"{file.path} is no CIFAR batch ({error}): fetch the published archive again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{file.path} is no CIFAR batch: fetch the published archive again")
    return content
