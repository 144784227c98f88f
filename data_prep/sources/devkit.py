"""The development kit of ILSVRC 2012: which WordNet ids there are, and the validation labels."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.trees import File, Tree, open_tree

NAMES = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12.tar", "ILSVRC2012_devkit_t12")
META = "meta.mat"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"


@dataclass(frozen=True)
class Devkit:
    """``names`` of the classes by WordNet id, and the id of each validation image in order."""

    names: dict[str, str]
    validation: tuple[str, ...]


def read_devkit(path: Path, scratch: Path) -> Devkit:
    """The kit as published, or its unpacked folder.

    Raises ValueError where a file is missing, damaged or disagrees with the other.
    """
    tree = open_tree(path, scratch)
    files = {PurePosixPath(file.path).name: file for file in tree.files}
    for name in (META, TRUTH):
        if name not in files:
            raise ValueError(f"{path} has no {name}: fetch the development kit again")
    synsets = _synsets(tree, files[META])
    labels = tree.read(files[TRUTH]).decode("ascii", "replace").split()
    for number, label in enumerate(labels, 1):
        if label not in synsets:
            raise ValueError(
                f"{TRUTH}, line {number}: {label!r} is not one of 1 to {len(synsets)}: fetch the "
                "development kit again"
            )
    return Devkit(dict(synsets.values()), tuple(synsets[label][0] for label in labels))


def _synsets(tree: Tree, file: File) -> dict[str, tuple[str, str]]:
    """WordNet id and words of each class, by its number in the ground truth."""
    from scipy.io import loadmat

    try:
        table: Any = loadmat(io.BytesIO(tree.read(file)), squeeze_me=True)["synsets"]
        # A synset that has children is a node above the classes.
        return {
            str(int(entry["ILSVRC2012_ID"])): (str(entry["WNID"]), str(entry["words"]))
            for entry in table
            if int(entry["num_children"]) == 0
        }
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(
            f"{file.path} is no table of synsets ({type(error).__name__}: {error}): fetch the "
            "development kit again"
        ) from None
