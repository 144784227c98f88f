"""Where images come from: one file per source, and this list of them."""

from collections.abc import Callable
from pathlib import Path

from data_prep.listing import Source
from data_prep.sources.bsd import BsdSource
from data_prep.sources.cifar import CifarSource
from data_prep.sources.cifar10_1 import Cifar101Source
from data_prep.sources.digits import DigitsSource
from data_prep.sources.image_folder import ImageFolderSource
from data_prep.sources.imagenet import ImageNetSource

_WITH_PATH: dict[str, Callable[[Path], Source]] = {
    "folder": ImageFolderSource,
    "cifar": CifarSource,
    "cifar10.1": Cifar101Source,
    "bsd": BsdSource,
}
SOURCES = ("digits", *_WITH_PATH, "imagenet")


def open_source(kind: str, path: Path | None = None, allow_partial: bool = False) -> Source:
    """The source of this kind; all but ``digits``, which is always at hand, need a ``path``.

    Raises ValueError for an unknown kind, for a path that is missing or not wanted, and for
    ``allow_partial`` where no number of images is expected.
    """
    if kind not in SOURCES:
        raise ValueError(f"unknown source {kind!r}: choose one of {', '.join(SOURCES)}")
    if allow_partial and kind != "imagenet":
        raise ValueError(f"the source {kind!r} may have any images: leave --allow-partial away")
    if kind == "digits":
        if path is not None:
            raise ValueError(f"the source 'digits' reads no {path}: leave the path away")
        return DigitsSource()
    if path is None:
        raise ValueError(
            f"the source {kind!r} needs the path of a folder or archive: give --source"
        )
    if kind == "imagenet":
        return ImageNetSource(Path(path), allow_partial)
    return _WITH_PATH[kind](Path(path))
