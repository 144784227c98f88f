"""Scorers: from a controller's logits to the weights of the units (ReSet Sec. 3, 5.2 and 5.4.3).

| name               | training                               | evaluation          | source      |
|--------------------|----------------------------------------|---------------------|-------------|
| `softmax`          | softmax                                | the same            | Eq. 5       |
| `gumbel`           | softmax of (logits + noise) / tau      | without noise       | Eq. 7 and 8 |
| `straight_through` | one-hot of that, its gradient backward | one-hot, no noise   | Sec. 3.3    |
| `top_k`            | softmax, all but the k largest zero    | the same            | Sec. 5.4.3  |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ScorerName = Literal["softmax", "gumbel", "straight_through", "top_k"]


@dataclass(frozen=True)
class Scorer:
    """Called with logits (N, components), float32; gives weights of the same shape, each >= 0.

    `temperature` is the tau of the two with noise, `k` of top_k. A weight that is exactly zero is
    that of a unit which is not computed in evaluation.
    """

    name: ScorerName = "softmax"
    temperature: float = 1.0
    k: int = 1

    def __call__(self, logits: Tensor, training: bool) -> Tensor:
        return _SCORERS[self.name](self, logits, training)


def _softmax(_: Scorer, logits: Tensor, training: bool) -> Tensor:
    return logits.softmax(1)


def _gumbel(scorer: Scorer, logits: Tensor, training: bool) -> Tensor:
    if training:
        logits = logits - torch.empty_like(logits).exponential_().log()  # Eq. 8
    return (logits / scorer.temperature).softmax(1)


def _straight_through(scorer: Scorer, logits: Tensor, training: bool) -> Tensor:
    soft = _gumbel(scorer, logits, training)
    hard = torch.zeros_like(soft).scatter(1, soft.argmax(1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())  # the bracket is exactly zero forward


def _top_k(scorer: Scorer, logits: Tensor, training: bool) -> Tensor:
    soft = logits.softmax(1)
    largest = torch.zeros_like(soft).scatter(1, soft.topk(scorer.k, 1).indices, 1.0)
    return soft * largest


_SCORERS: dict[ScorerName, Callable[[Scorer, Tensor, bool], Tensor]] = {
    "softmax": _softmax,
    "gumbel": _gumbel,
    "straight_through": _straight_through,
    "top_k": _top_k,
}
