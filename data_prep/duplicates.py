"""Images outside of train whose bytes are also those of a training image."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from data_prep.items import Item
from data_prep.listing import Reader
from data_prep.manifest import TRAIN
from data_prep.pack import NO_MARK
from data_prep.plan import Plan


def duplicates(
    plan: Plan, marks: npt.NDArray[np.uint64], reader: Reader
) -> Iterator[tuple[Item, list[Item]]]:
    """Each such image with the training images that it equals, in the order of the plan.

    ``marks`` are those of the plan's images in their order. Equal marks are only a reason to look:
    what has them is read and compared.
    """
    if TRAIN not in plan.items.splits:
        return
    train = plan.items.split[plan.order] == plan.items.splits.index(TRAIN)
    common = np.setdiff1d(np.intersect1d(marks[train], marks[~train]), [NO_MARK])
    places = np.flatnonzero(np.isin(marks, common))
    found = []
    for _, group in itertools.groupby(sorted(places.tolist(), key=marks.__getitem__), marks.item):
        alike = list(group)
        items = list(zip(alike, plan.items.take(plan.order[alike]), strict=True))
        data = [reader.read(item) for _, item in items]
        for (place, item), content in zip(items, data, strict=True):
            equals = [
                other
                for (_, other), same in zip(items, data, strict=True)
                if other.split == TRAIN and content == same
            ]
            if item.split != TRAIN and equals:
                found.append((place, item, equals))
    yield from ((item, equals) for _, item, equals in sorted(found, key=lambda entry: entry[0]))
