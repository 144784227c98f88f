"""The easiest and the hardest images: few steps on top, many below (DRNN Fig. 9)."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_prep.manifest import Manifest
from pipeline.analysis.contents import Evaluation, Run
from pipeline.data.shards import Sample, ShardSet
from pipeline.tasks.classification import Samples

COLUMNS = 10
ROWS = 2  # easiest, and as many hardest
LONGEST_SIDE = 64  # pixels; forty PNG of this size stay below half a megabyte

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pick:
    """One category; samples by their place in the split, from easy to hard."""

    label: int
    easiest: tuple[int, ...]
    hardest: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """One image; `mistaken_for` is the predicted category where it is not the true one."""

    key: str
    image: str  # data URI
    steps: int
    loss: float
    mistaken_for: str | None


@dataclass(frozen=True)
class Column:
    """Images of one category, from easy to hard."""

    category: str
    easiest: list[Example]
    hardest: list[Example]


def pick(samples: Samples) -> list[Pick]:
    """Per category the images with the fewest and the most steps, ties by loss.

    A category needs two images. Of more than `COLUMNS` categories, those with the largest range of
    steps are taken, ties by the range of losses.
    """
    steps = samples.steps.sum(1)
    order = np.lexsort((samples.losses, steps))
    picks: list[tuple[tuple[float, float], Pick]] = []
    for label in np.unique(samples.labels):
        members = order[samples.labels[order] == label]
        rows = min(ROWS, len(members) // 2)
        if rows:
            first, last = members[0], members[-1]
            spread = (
                float(steps[last] - steps[first]),
                float(samples.losses[last] - samples.losses[first]),
            )
            chosen = Pick(
                int(label), tuple(members[:rows].tolist()), tuple(members[-rows:].tolist())
            )
            picks.append((spread, chosen))
    widest = sorted(picks, key=lambda found: found[0], reverse=True)[:COLUMNS]
    return sorted((chosen for _, chosen in widest), key=lambda chosen: chosen.label)


def columns(run: Run, evaluation: Evaluation) -> list[Column]:
    """The picks with their images from the run's shard set.

    Raises:
        ValueError: the shard set is gone, damaged, or not the one that was evaluated.
    """
    samples = evaluation.samples
    assert isinstance(samples, Samples)
    with _stored(run, samples) as (manifest, shards):
        return [
            Column(
                manifest.classes[found.label],
                _examples(manifest, shards, samples, found.easiest),
                _examples(manifest, shards, samples, found.hardest),
            )
            for found in pick(samples)
        ]


def examples_of(run: Run, evaluation: Evaluation, indices: tuple[int, ...]) -> list[Example]:
    """The samples at these places of the split, with their images.

    Raises:
        ValueError: the shard set is gone, damaged, or not the one that was evaluated.
    """
    samples = evaluation.samples
    assert isinstance(samples, Samples)
    with _stored(run, samples) as (manifest, shards):
        return _examples(manifest, shards, samples, indices)


@contextmanager
def _stored(run: Run, samples: Samples) -> Iterator[tuple[Manifest, ShardSet]]:
    if run.manifest is None:
        raise ValueError("The images cannot be shown: " + "; ".join(run.notes))
    manifest = run.manifest
    counts = np.bincount(samples.labels, minlength=len(manifest.classes))
    if counts.tolist() != list(manifest.evaluation.counts):
        raise _not_evaluated(manifest)
    shards = ShardSet(manifest, manifest.evaluation)
    try:
        yield manifest, shards
    finally:
        shards.close()


def _examples(
    manifest: Manifest, shards: ShardSet, samples: Samples, indices: tuple[int, ...]
) -> list[Example]:
    examples = []
    for index, sample in zip(indices, shards.read(np.array(indices)), strict=True):
        label, predicted = int(samples.labels[index]), int(samples.predictions[index])
        if (sample.key, sample.label) != (str(samples.keys[index]), label):
            raise _not_evaluated(manifest)
        examples.append(
            Example(
                sample.key,
                _thumbnail(sample),
                int(samples.steps[index].sum()),
                float(samples.losses[index]),
                manifest.classes[predicted] if predicted != label else None,
            )
        )
    return examples


def _not_evaluated(manifest: Manifest) -> ValueError:
    return ValueError(
        f"The images cannot be shown: {manifest.root} is not the shard set that was evaluated; "
        "repeat the evaluation with `reprise eval RUN`"
    )


def _thumbnail(sample: Sample) -> str:
    try:
        with Image.open(io.BytesIO(sample.data.tobytes())) as encoded:
            image = encoded.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise sample.undecodable() from error
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return data_uri(image)


def data_uri(image: Image.Image) -> str:
    """The image as PNG within the page."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
