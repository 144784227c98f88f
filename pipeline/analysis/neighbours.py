"""Images with similar routes: the nearest by Manhattan distance of their scores (ReSet Fig. 5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.analysis.contents import Evaluation, Run
from pipeline.analysis.examples import Example, examples_of
from pipeline.tasks.classification import Samples

QUERIES = 6
NEAREST = 5


@dataclass(frozen=True)
class Neighbours:
    """An image with those nearest to it, the distances beside them."""

    category: str
    query: Example
    nearest: list[tuple[float, str, Example]]  # distance, category, image


def nearest(routes: np.ndarray, query: int) -> tuple[np.ndarray, np.ndarray]:
    """The `NEAREST` other samples, nearest first, and their Manhattan distances.

    Ties are in the order of the split.
    """
    distances = np.abs(routes - routes[query]).sum(1, dtype=np.float64)
    order = np.argsort(distances, kind="stable")
    order = order[order != query][:NEAREST]
    return order, distances[order]


def draw(run: Run, evaluation: Evaluation) -> list[Neighbours]:
    """For the first image of each of a few categories; empty without controllers.

    Raises:
        ValueError: the shard set is gone, damaged, or not the one that was evaluated.
    """
    samples = evaluation.samples
    if not isinstance(samples, Samples) or not len(samples.components):
        return []
    assert run.manifest is not None
    labels, places = np.unique(samples.labels, return_index=True)
    found = []
    for label, query in list(zip(labels, places, strict=True))[:QUERIES]:
        order, distances = nearest(samples.routes, int(query))
        shown = examples_of(run, evaluation, (int(query), *order.tolist()))
        names = [run.manifest.classes[samples.labels[place]] for place in order]
        found.append(
            Neighbours(
                run.manifest.classes[label],
                shown[0],
                list(zip(distances.tolist(), names, shown[1:], strict=True)),
            )
        )
    return found
