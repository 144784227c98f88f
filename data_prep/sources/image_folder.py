"""Class folders: ``train/<class>/...`` beside ``val/<class>/...`` or ``test/<class>/...``."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.images import BYTE_LIMIT
from data_prep.items import Item, Items
from data_prep.listing import Listing, Rejection
from data_prep.manifest import TRAIN
from data_prep.trees import SPLITS, File, Tree, hidden, open_tree


@dataclass(frozen=True)
class ImageFolderSource:
    """A folder, or a tar or tar.gz of it, that holds class folders by split.

    Class ids follow the sorted names of the class folders of all splits, so that an empty class
    folder keeps its id. Images may lie deeper within a class folder.
    """

    path: Path

    def open(self, scratch: Path) -> Listing:
        """List the images; what cannot be one is listed as rejected."""
        return list_classes(open_tree(self.path, scratch))


def list_classes(tree: Tree) -> Listing:
    """The listing of a tree of class folders.

    Raises ValueError where there is no class folder in ``train`` or where another split has a class
    that ``train`` lacks.
    """
    classes = _classes(tree)
    rejected: list[Rejection] = []
    items = Items.of(_items(tree, {name: n for n, name in enumerate(classes)}, rejected))
    return Listing(
        name=tree.name,
        classes=classes,
        items=items,
        rejected=rejected,
        reader=tree.reader,
        settings={"source": "folder"},
        stamp=tree.stamp,
    )


def _items(tree: Tree, ids: dict[str, int], rejected: list[Rejection]) -> Iterator[Item]:
    """What can be an image; the rest goes to ``rejected``."""
    for file in tree.files:
        split, class_name = _place(tree, file.path)
        if problem := _problem(file, split, class_name):
            rejected.append(Rejection(split, file.path, problem))
        else:
            yield Item(split, ids[class_name], file.path, file.offset, file.size)


def _place(tree: Tree, path: str) -> tuple[str, str]:
    """Split and class of a file, each "" where it lies outside of one."""
    parts = path.removeprefix(tree.base).split("/")
    if not path.startswith(tree.base) or parts[0] not in SPLITS or len(parts) < 2:
        return "", ""
    return parts[0], parts[1] if len(parts) > 2 else ""


def _problem(file: File, split: str, class_name: str) -> str | None:
    if hidden(file.path):
        return "hidden file"
    if not split:
        return f"outside of {', '.join(SPLITS)}"
    if not class_name:
        return "outside of a class folder"
    if file.size > BYTE_LIMIT:
        return f"file of {file.size} bytes, over the limit of {BYTE_LIMIT}"
    return file.problem


def _classes(tree: Tree) -> tuple[str, ...]:
    found: dict[str, set[str]] = {split: set() for split in SPLITS}
    for folder in tree.folders:
        parts = folder.removeprefix(tree.base).split("/")
        if folder.startswith(tree.base) and len(parts) == 2 and parts[0] in SPLITS:
            found[parts[0]].add(parts[1])
    visible = {split: {n for n in names if not hidden(n)} for split, names in found.items()}
    if not visible[TRAIN]:
        raise ValueError(
            f"{tree.name} has no class folders train/<class>: arrange the images as "
            f"train/<class>/<image> and val/<class>/<image>, in at most one leading folder"
        )
    for split in SPLITS:
        unknown = visible[split] - visible[TRAIN]
        if unknown:
            raise ValueError(
                f"{tree.name} has {_few(unknown)} in {split} and not in {TRAIN}: correct the name, "
                f"or make an empty folder in {TRAIN} if that is meant"
            )
    return tuple(sorted(visible[TRAIN]))


def _few(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more classes" if len(ordered) > 3 else ""
    return ", ".join(repr(name) for name in ordered[:3]) + more
