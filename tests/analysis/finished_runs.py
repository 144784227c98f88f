"""What a run leaves: a prepared shard set, an evaluation of plausible numbers, a journal."""

from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.manifest import Manifest
from data_prep.prepare import prepare
from data_prep.sources import open_source
from pipeline.data.shards import ShardSet
from pipeline.models import create_model
from pipeline.models.cost import measure
from pipeline.run_directory import RunDirectory
from pipeline.tasks.classification import Samples, Summary
from pipeline.tracking import Tracker

CLASSES = ("<b>bold", "cat & dog", "plain")
PER_CLASS = 6
STEPS_PER_EPOCH, EPOCHS = 20, 3


def write_images(folder: Path, classes: tuple[str, ...], seed: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    for split in ("train", "test"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for number in range(PER_CLASS):
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")


def prepared(
    folder: Path,
    classes: tuple[str, ...] = CLASSES,
    seed: int = 0,
    size: tuple[int, int] = (20, 24),
) -> Manifest:
    write_images(folder / "images", classes, seed, size)
    prepare(open_source("folder", folder / "images"), folder / "set", seed=seed, workers=1)
    return Manifest.load(folder / "set")


def results(manifest: Manifest, model: str) -> tuple[Summary, Samples]:
    """An evaluation in which sample i takes steps and has a loss that differ from its neighbours'.

    Every fifth sample is misclassified.
    """
    shard_set = ShardSet(manifest, manifest.evaluation)
    stored = shard_set.read(np.arange(len(shard_set)))
    shard_set.close()
    rng = np.random.default_rng(3)
    cost = measure(create_model(model, num_classes=len(manifest.classes)))
    labels = np.array([sample.label for sample in stored])
    wrong = np.arange(len(labels)) % 5 == 0
    predictions = np.where(wrong, (labels + 1) % len(manifest.classes), labels)
    losses = rng.exponential(0.1, len(labels)).astype(np.float32)
    executed = {
        name: np.cumprod(rng.random((len(labels), cell.steps)) < 0.75, 1)
        for name, cell in cost.cells.items()
    }
    parts = [taken.sum(1) for taken in executed.values()]
    steps = np.stack(parts, 1) if parts else np.zeros((len(labels), 0), np.int64)
    rates = {name: taken.mean(0).tolist() for name, taken in executed.items()}
    maximal = sum(cell.steps for cell in cost.cells.values())
    summary = Summary(
        split=manifest.evaluation.name,
        step=EPOCHS * STEPS_PER_EPOCH,
        samples=len(labels),
        top1=float((~wrong).mean()),
        top5=1.0,
        loss=float(losses.mean()),
        mean_steps=float(steps.sum(1).mean()),
        maximal_steps=maximal,
        steps_histogram=tuple(np.bincount(steps.sum(1), minlength=maximal + 1).tolist()),
        rates=rates,
        multiply_adds=cost.executed(rates),
        nominal_multiply_adds=cost.nominal,
        images_per_second=1000.0,
    )
    keys = np.array([sample.key for sample in stored])
    return summary, Samples(keys, labels, predictions, losses, steps)


def track(directory: RunDirectory, summary: Summary) -> None:
    """Three epochs of metrics under the names that training and evaluation use."""
    tracker = Tracker(directory.path, run_name="test", experiment="test", uri="sqlite:///none.db")
    for step in range(10, EPOCHS * STEPS_PER_EPOCH + 1, 10):
        values = {"train/loss": 2.0 / step, "train/cross_entropy": 1.5 / step}
        values |= {"epoch": step / STEPS_PER_EPOCH, "lr/rest": 0.0005, "lr/gate": 0.0005}
        if summary.maximal_steps:
            values["train/execution_rate"] = 0.5 / step
        for cell, rates in summary.rates.items():
            values |= {f"train/rate/{cell}/{i}": i / 10 + step / 1000 for i in (1, len(rates))}
        tracker.metrics(values, step)
        if step % STEPS_PER_EPOCH == 0:
            tracker.metrics(summary.metrics(), step)
