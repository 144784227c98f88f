"""Berkeley segmentation images for denoising, in the folders of DnCNN's split.

Zhang et al., Beyond a Gaussian denoiser (2017), Sec. IV-A: 400 images of 180x180 pixels to train
on, BSD68 and Set12 to test on.
"""

from dataclasses import dataclass
from pathlib import Path

from data_prep.images import BYTE_LIMIT
from data_prep.items import Item
from data_prep.listing import Listing, Rejection
from data_prep.manifest import DENOISING, TRAIN
from data_prep.trees import File, Tree, hidden, open_tree

_TEST = "test"
_SPLITS = {"train400": TRAIN, "test68": _TEST, "test12": "set12"}
_OPTIONAL = "test12"


@dataclass(frozen=True)
class BsdSource:
    """A folder, or a tar or tar.gz of it, that holds train400/, test68/ and perhaps test12/.

    The splits are called train, test (BSD68, the one to evaluate on) and set12. The images stay
    clean: noise is added when they are read, so that one set serves every noise level.
    """

    path: Path

    def open(self, scratch: Path) -> Listing:
        """List the images; what cannot be one is listed as rejected.

        Raises ValueError where train400 or test68 is missing or has no file for an image.
        """
        tree = open_tree(self.path, scratch)
        items: list[Item] = []
        rejected: list[Rejection] = []
        for file in tree.files:
            split = _split(tree, file)
            problem = _problem(file, split)
            if problem:
                rejected.append(Rejection(split, file.path, problem))
            else:
                items.append(Item(split, 0, file.path, file.offset, file.size))
        _refuse_gaps(tree, items)
        return Listing(
            name="bsd",
            classes=("image",),
            items=items,
            rejected=rejected,
            reader=tree.reader,
            settings={"source": "bsd"},
            task=DENOISING,
            evaluation_split=_TEST,
            stamp=tree.stamp,
        )


def _refuse_gaps(tree: Tree, items: list[Item]) -> None:
    found = {item.split for item in items}
    for folder, split in _SPLITS.items():
        if split not in found and folder != _OPTIONAL:
            raise ValueError(
                f"{tree.name} has no images in a folder {folder}: give a folder or tar that holds "
                f"{', '.join(_SPLITS)}, in at most one leading folder"
            )


def _split(tree: Tree, file: File) -> str:
    """The split of a file, "" outside of all."""
    folder, separator, _ = file.path.removeprefix(tree.base).partition("/")
    inside = bool(separator) and file.path.startswith(tree.base)
    return _SPLITS.get(folder, "") if inside else ""


def _problem(file: File, split: str) -> str | None:
    if hidden(file.path):
        return "hidden file"
    if not split:
        return f"outside of {', '.join(_SPLITS)}"
    if file.size > BYTE_LIMIT:
        return f"file of {file.size} bytes, over the limit of {BYTE_LIMIT}"
    return file.problem
