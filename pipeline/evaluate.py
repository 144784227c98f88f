"""Evaluation: accuracy, loss, and what was really executed, each real sample exactly once."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from pipeline.data import Loader
from pipeline.distributed import World
from pipeline.models import Network, Output
from pipeline.models.cost import Cost

SUMMARY = "summary.json"
SAMPLES = "samples.npz"


@dataclass(frozen=True)
class Summary:
    """What one evaluation found; rates and steps at the deterministic gates of evaluation."""

    split: str
    step: int  # optimizer steps that made the weights
    samples: int
    top1: float  # fraction, 0..1
    top5: float
    loss: float  # mean cross entropy, nats
    mean_steps: float  # executed recursive steps per sample, all cells
    maximal_steps: int
    steps_histogram: tuple[int, ...]  # samples that executed 0, 1, 2, ... steps in all
    rates: dict[str, list[float]]  # recursive cell -> share of samples executing each step
    multiply_adds: float  # per sample, as executed
    nominal_multiply_adds: int
    images_per_second: float  # all ranks, reading included
    step_choice: int | None = None  # number of steps asked of a cost-adjustable network

    def metrics(self) -> dict[str, float]:
        """The numbers under the names that trackers show."""
        values = {
            "eval/top1": self.top1,
            "eval/top5": self.top5,
            "eval/loss": self.loss,
            "eval/mean_steps": self.mean_steps,
            "eval/multiply_adds": self.multiply_adds,
            "eval/images_per_second": self.images_per_second,
        }
        for cell, rates in self.rates.items():
            values |= {f"eval_rate/{cell}/{i + 1}": rate for i, rate in enumerate(rates)}
        if self.step_choice is not None:
            values[f"eval_steps/{self.step_choice}/top1"] = self.top1
            values[f"eval_steps/{self.step_choice}/loss"] = self.loss
        return values


@dataclass(frozen=True)
class Samples:
    """Per-sample results in the order of the split; arrays of equal length."""

    keys: np.ndarray  # str
    labels: np.ndarray  # int64
    predictions: np.ndarray  # int64
    losses: np.ndarray  # float32
    steps: np.ndarray  # (samples, recursive cells) int64: executed steps of each cell

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, **asdict(self))

    @classmethod
    def load(cls, path: Path) -> Samples:
        with np.load(path, allow_pickle=False) as stored:
            return cls(**stored)


def evaluate(
    model: Network,
    loader: Loader,
    world: World,
    cost: Cost,
    split: str,
    step: int,
    dtype: torch.dtype = torch.float32,
    on_batch: Callable[[int], None] = lambda _: None,
    steps: int | None = None,
) -> tuple[Summary, Samples]:
    """Run the model once over this rank's samples and join the ranks' results on all ranks.

    Args:
        cost: of this model at these steps, for the multiply-adds as executed.
        split, step: what is evaluated, and after how many optimizer steps: for the record.
        dtype: of the forward pass, under autocast unless float32.
        on_batch: called with the number of samples of each batch done on this rank.
        steps: asked of a cost-adjustable network; None takes the largest number.

    Raises:
        ValueError: a number of steps that the network was not built for.
    """
    choice = model.steps_taken(steps)
    training = model.training
    model.eval()
    started = time.perf_counter()
    parts: list[dict[str, Any]] = []
    cells: list[str] = []
    autocast = torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)
    with torch.inference_mode(), autocast:
        for batch in loader:
            output: Output = model(batch.images, choice)
            cells = [route.cell for route in output.routes]
            parts.append({"keys": batch.keys} | _results(output, batch.labels))
            on_batch(len(batch.keys))
    gathered = world.gather((cells, parts, time.perf_counter() - started))
    model.train(training)
    cells = next((names for names, _, _ in gathered if names), [])
    joined = [part for _, own, _ in gathered for part in own]
    seconds = max(elapsed for _, _, elapsed in gathered)
    record = {"split": split, "step": step, "step_choice": choice}
    return _summarise(joined, cells, cost, seconds, record)


def _results(output: Output, labels: torch.Tensor) -> dict[str, Any]:
    logits = output.logits.float()
    ranked = logits.topk(min(5, logits.shape[1])).indices
    executed = [route.executed for route in output.routes]
    return {
        "labels": labels.cpu().numpy(),
        "predictions": ranked[:, 0].cpu().numpy(),
        "in_top5": (ranked == labels[:, None]).any(1).cpu().numpy(),
        "losses": F.cross_entropy(logits, labels, reduction="none").cpu().numpy(),
        "executed": [e.cpu().numpy() for e in executed],
    }


def _summarise(
    parts: list[dict[str, Any]],
    cells: list[str],
    cost: Cost,
    seconds: float,
    record: dict[str, Any],
) -> tuple[Summary, Samples]:
    def join(name: str) -> np.ndarray:
        return np.concatenate([part[name] for part in parts])

    labels, predictions, losses = join("labels"), join("predictions"), join("losses")
    executed = [np.concatenate([p["executed"][i] for p in parts]) for i in range(len(cells))]
    shape = (len(labels), len(cells))
    steps = np.stack([e.sum(1) for e in executed], 1) if cells else np.zeros(shape, np.int64)
    maximal = sum(e.shape[1] for e in executed)
    rates = {cell: [float(r) for r in e.mean(0)] for cell, e in zip(cells, executed, strict=True)}
    totals = steps.sum(1)
    summary = Summary(
        **record,
        samples=len(labels),
        top1=float((predictions == labels).mean()),
        top5=float(join("in_top5").mean()),
        loss=float(losses.astype(np.float64).mean()),
        mean_steps=float(totals.mean()),
        maximal_steps=maximal,
        steps_histogram=tuple(int(n) for n in np.bincount(totals, minlength=maximal + 1)),
        rates=rates,
        multiply_adds=cost.executed(rates),
        nominal_multiply_adds=cost.nominal,
        images_per_second=len(labels) / seconds,
    )
    keys = np.array([key for part in parts for key in part["keys"]])
    return summary, Samples(keys, labels, predictions, losses, steps.astype(np.int64))


def save(folder: Path, summary: Summary, samples: Samples) -> None:
    """Write what the report reads, `summary.json` and `samples.npz`: both or neither."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    samples.save(aside / SAMPLES)
    (aside / SUMMARY).write_text(json.dumps(asdict(summary), indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def load(folder: Path) -> tuple[Summary, Samples]:
    """Read what `save` wrote."""
    values = json.loads((folder / SUMMARY).read_text())
    values["steps_histogram"] = tuple(values["steps_histogram"])
    return Summary(**values), Samples.load(folder / SAMPLES)
