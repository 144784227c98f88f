"""Evaluation: the task's results, and what was really executed, each real sample exactly once."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.files import replace_folder
from pipeline.config import Loss
from pipeline.data import Batch, Loader
from pipeline.distributed import World
from pipeline.models import Network, Output
from pipeline.models.cost import Cost
from pipeline.tasks import TASKS, Classification, Samples, Summary, Task

__all__ = ["EvaluationStopped", "Samples", "Summary", "evaluate", "load", "save"]

CLASSIFICATION = Classification(Loss())
SUMMARY = "summary.json"
SAMPLES = "samples.npz"
SECONDS_BETWEEN = 1.0  # two questions whether an evaluation goes on


class EvaluationStopped(Exception):
    """A rank was asked to stop; raised on all of them, between two batches."""


def evaluate(
    model: Network,
    loader: Loader,
    world: World,
    cost: Cost,
    split: str,
    step: int,
    dtype: torch.dtype = torch.float32,
    on_batch: Callable[[int], None] = lambda _: None,
    *,
    task: Task = CLASSIFICATION,
    steps: int | None = None,
    stop_requested: Callable[[], bool] | None = None,
) -> tuple[Summary, Samples]:
    """Run the model once over this rank's samples and join the ranks' results on all ranks.

    Args:
        cost: of this model at these steps, for the multiply-adds as executed.
        split, step: what is evaluated, and after how many optimizer steps: for the record.
        dtype: of the forward pass, under autocast unless float32.
        on_batch: called with the number of samples of each batch done on this rank.
        task: what the results are.
        steps: asked of a cost-adjustable network; None takes the largest number.
        stop_requested: asked between batches, about once a second; one rank's wish ends the
            evaluation on all.

    Raises:
        EvaluationStopped: on all ranks, as one was asked to stop; the model is as it was.
        ValueError: a number of steps that the network was not built for.
    """
    choice = model.steps_taken(steps)
    training = model.training
    model.eval()
    pace = _Pace()
    parts: list[dict[str, Any]] = []
    cells: list[str] = []
    done = 0
    autocast = torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)
    with _training_again(model, training), torch.inference_mode(), autocast:
        for batch in _until_stopped(loader, world, stop_requested):
            output: Output = model(batch.images, choice)
            cells = [route.cell for route in output.routes]
            executed = [route.executed.cpu().numpy() for route in output.routes]
            results = task.results(output, batch, done)
            parts.append({"keys": batch.keys, "executed": executed} | results)
            done += len(batch.keys)
            pace.count(len(batch.keys))
            on_batch(len(batch.keys))
    gathered = world.gather((cells, parts, pace.measured()))
    cells = next((names for names, _, _ in gathered if names), [])
    joined = [part for _, own, _ in gathered for part in own]
    seconds, images = zip(*(measured for _, _, measured in gathered), strict=True)
    record = {
        "split": split,
        "step": step,
        "step_choice": choice,
        "images_per_second": sum(images) / max(seconds),
    }
    return _summarise(task, joined, cells, cost, record)


@contextmanager
def _training_again(model: Network, training: bool) -> Iterator[None]:
    try:
        yield
    finally:
        model.train(training)


def _until_stopped(
    loader: Loader, world: World, stop_requested: Callable[[], bool] | None
) -> Iterator[Batch]:
    """The batches of this rank, between which the ranks agree every now and then to go on.

    At each they would wait for the slowest of them. Ranks may differ in their number of batches by
    one, and one that has done its own still answers.
    """
    if stop_requested is None:
        yield from loader
        return
    most = max(world.gather(loader.steps_per_epoch))
    batches = iter(loader)
    asked, asked_at, ask = -1, time.monotonic(), 0
    for number in range(most):
        if number == ask:
            pace = (time.monotonic() - asked_at) / (number - asked)  # seconds per batch
            stops, paces = zip(*world.gather((stop_requested(), pace)), strict=True)
            if any(stops):
                loader.close()
                raise EvaluationStopped
            # Nothing has been measured before the first batch.
            apart = int(SECONDS_BETWEEN / max(paces)) if number and max(paces) else 1
            asked, asked_at, ask = number, time.monotonic(), number + max(1, apart)
        if (batch := next(batches, None)) is not None:
            yield batch


class _Pace:
    """How fast one rank goes.

    The first batch waits for readers that start and a network that is compiled: it counts only
    where there is no other.
    """

    def __init__(self) -> None:
        self._moments = [(time.perf_counter(), 0)]  # seconds and images, after each batch

    def count(self, images: int) -> None:
        self._moments.append((time.perf_counter(), self._moments[-1][1] + images))

    def measured(self) -> tuple[float, int]:
        """Seconds, and the images that they took."""
        first, last = self._moments[1 if len(self._moments) > 2 else 0], self._moments[-1]
        return last[0] - first[0], last[1] - first[1]


def _summarise(
    task: Task,
    parts: list[dict[str, Any]],
    cells: list[str],
    cost: Cost,
    record: dict[str, Any],
) -> tuple[Summary, Samples]:
    keys = np.array([key for part in parts for key in part["keys"]])
    executed = [np.concatenate([p["executed"][i] for p in parts]) for i in range(len(cells))]
    shape = (len(keys), len(cells))
    steps = np.stack([e.sum(1) for e in executed], 1) if cells else np.zeros(shape, np.int64)
    maximal = sum(e.shape[1] for e in executed)
    rates = {cell: [float(r) for r in e.mean(0)] for cell, e in zip(cells, executed, strict=True)}
    totals = steps.sum(1)
    execution = Summary(
        **record,
        samples=len(keys),
        mean_steps=float(totals.mean()),
        maximal_steps=maximal,
        steps_histogram=tuple(int(n) for n in np.bincount(totals, minlength=maximal + 1)),
        rates=rates,
        multiply_adds=cost.executed(rates),
        nominal_multiply_adds=cost.nominal,
    )
    return task.conclude(parts, execution, keys, steps.astype(np.int64))


def save(folder: Path, summary: Summary, samples: Samples) -> None:
    """Write what the report reads, `summary.json` and `samples.npz`: both or neither.

    Those of an evaluation before stay until they are replaced, both at once.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    samples.save(aside / SAMPLES)
    (aside / SUMMARY).write_text(json.dumps(asdict(summary), indent=1))
    replace_folder(folder, aside)


def load(folder: Path) -> tuple[Summary, Samples]:
    """Read what `save` wrote."""
    values = json.loads((folder / SUMMARY).read_text())
    values["steps_histogram"] = tuple(values["steps_histogram"])
    kind = TASKS[values.get("task", "classification")]
    return kind.summary(**values), kind.samples.load(folder / SAMPLES)
