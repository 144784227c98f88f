"""Stochastic depth: whole cells are left out at random. Ablation: chosen ones are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.models.distributed import several_ranks
from pipeline.models.routers.base import Router


class RandomDrop(Router):
    """One draw per mini-batch and step: Huang et al., Deep networks with stochastic depth (2016),
    Sec. 3.

    In training all samples of the global mini-batch keep the residual branch of step i with
    probability `survival[i]`, or all lose it (Eq. 2); in evaluation all keep it, with that weight
    (Eq. 5), except at the steps in `ablated`, where they lose it. The draw is rank 0's, so that the
    ranks drop the same cells. A dropped branch is computed and weighted with zero: its gradients
    are then zero on all ranks, not missing, as sharded optimizers want them.

    Raises:
        ValueError: a survival that is not in (0, 1].
    """

    decides = False

    def __init__(self, survival: Sequence[float]) -> None:
        super().__init__()
        for probability in survival:
            if not 0 < probability <= 1:
                raise ValueError(
                    f"survival={probability} is not in (0, 1]: give the probability that a "
                    "mini-batch keeps the cell, such as 0.5"
                )
        self.survival = tuple(survival)
        self.ablated: frozenset[int] = frozenset()

    def forward(self, x: Tensor, index: int = 0) -> Tensor:
        """(N, C, H, W) -> weight of the residual branch (N,), the same for all samples."""
        survival = self.survival[index]
        if not self.training:
            weight = 0.0 if index in self.ablated else survival
            return torch.full((len(x),), weight, device=x.device)
        survives = (torch.rand((), device=x.device) < survival).float()
        if several_ranks():
            dist.broadcast(survives, src=0)
        return survives.expand(len(x))


def linear_decay(cell: int, cells: int, *, last: float = 0.5) -> float:
    """Survival of cell 1 .. cells: from 1 at the input to `last` (Huang et al., Eq. 4)."""
    return 1 - cell / cells * (1 - last)


def survivals(steps: Sequence[int], death_rate: float | None) -> list[tuple[float, ...]] | None:
    """Survival of every step of the cells with so many steps, in order; None for no `death_rate`.

    The death rate is 0 at the first step of the first cell and grows linearly to `death_rate` at
    the last step of the last (Relaxed sharing, Sec. 3.2).

    Raises:
        ValueError: death_rate is not in (0, 1).
    """
    if death_rate is None:
        return None
    if not isinstance(death_rate, float) or not 0 < death_rate < 1:
        raise ValueError(
            f"death_rate={death_rate!r} is not in (0, 1): give the probability that the last cell "
            "is left out, such as 0.5, or leave it out"
        )
    last = max(sum(steps) - 1, 1)
    decay = iter([1 - death_rate * place / last for place in range(last + 1)])
    return [tuple(itertools.islice(decay, count)) for count in steps]
