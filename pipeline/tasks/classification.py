"""Classification: one label per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import Loss
from pipeline.data import Batch
from pipeline.distributed import World
from pipeline.models import Output
from pipeline.tasks import losses, task
from pipeline.tasks.task import Part, Task, joined


@dataclass(frozen=True, kw_only=True)
class Summary(task.Summary):
    """Accuracy and loss of one evaluation."""

    top1: float  # fraction, 0..1
    top5: float | None  # None of five classes or fewer, where it could be nothing but 1
    loss: float  # mean cross entropy, nats

    @property
    def results(self) -> dict[str, float]:
        five = {} if self.top5 is None else {"top5": self.top5}
        return {"top1": self.top1, **five, "loss": self.loss}

    @property
    def headline(self) -> str:
        return f"top-1 {100 * self.top1:.2f} %, loss {self.loss:.4f}"

    @property
    def rows(self) -> list[tuple[str, str]]:
        five = [] if self.top5 is None else [("top-5", f"{100 * self.top5:.2f} %")]
        return [("top-1", f"{100 * self.top1:.2f} %"), *five, ("loss", f"{self.loss:.4f}")]


@dataclass(frozen=True)
class Samples(task.Samples):
    """Per-sample results in the order of the split; arrays of equal length."""

    keys: np.ndarray  # str
    labels: np.ndarray  # int64
    predictions: np.ndarray  # int64
    losses: np.ndarray  # float32
    steps: np.ndarray  # (samples, recursive cells) int64: executed steps of each cell
    # Route vectors: the weights that controllers gave their units, (samples, components) float32,
    # and the components' names, `<pool>/<iteration>/<unit>`; none without controllers.
    routes: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    components: np.ndarray = field(default_factory=lambda: np.zeros(0, np.str_))


@dataclass(frozen=True)
class Classification(Task):
    """Cross entropy, and what gates add to it (DRNN Eq. 13); top-1 accuracy decides."""

    loss: Loss
    score: ClassVar[str] = "eval/top1"
    summary: ClassVar[type[task.Summary]] = Summary
    samples: ClassVar[type[task.Samples]] = Samples

    def loss_terms(
        self, output: Output, batch: Batch, world: World, progress: float = 0.0
    ) -> dict[str, Tensor]:
        return losses.terms(output, batch.labels, self.loss, world, progress)

    def training_metrics(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        correct = output.logits.detach().argmax(1) == batch.labels
        return {"top1": correct.float().mean()}

    def results(self, output: Output, batch: Batch, before: int) -> dict[str, Any]:
        logits, labels = output.logits.float(), batch.labels
        ranked = logits.topk(min(5, logits.shape[1])).indices
        in_top5 = (ranked == labels[:, None]).any(1).cpu().numpy()
        return {
            **({"in_top5": in_top5} if logits.shape[1] > 5 else {}),
            "labels": labels.cpu().numpy(),
            "predictions": ranked[:, 0].cpu().numpy(),
            "losses": F.cross_entropy(logits, labels, reduction="none").cpu().numpy(),
            "routes": _route_vectors(output),
            "components": output.components,
        }

    def conclude(
        self, parts: Sequence[Part], execution: task.Summary, keys: np.ndarray, steps: np.ndarray
    ) -> tuple[Summary, Samples]:
        labels, predictions, losses = (
            joined(parts, name) for name in ("labels", "predictions", "losses")
        )
        summary = Summary(
            **vars(execution),
            top1=float((predictions == labels).mean()),
            top5=float(joined(parts, "in_top5").mean()) if "in_top5" in parts[0] else None,
            loss=float(losses.astype(np.float64).mean()),
        )
        routes, components = joined(parts, "routes"), np.array(parts[0]["components"], np.str_)
        return summary, Samples(keys, labels, predictions, losses, steps, routes, components)


def _route_vectors(output: Output) -> np.ndarray:
    """(samples, components), in the order of `Output.components`."""
    found = [policy.weights.flatten(1).cpu().numpy() for policy in output.policies]
    return np.concatenate(found, 1) if found else np.zeros((len(output.prediction), 0), np.float32)
