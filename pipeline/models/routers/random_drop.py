"""Stochastic depth: whole cells are left out at random."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.models.distributed import several_ranks
from pipeline.models.routers.base import Router


class RandomDrop(Router):
    """One draw per mini-batch: Huang et al., Deep networks with stochastic depth (2016), Sec. 3.

    In training all samples of the global mini-batch keep the residual branch with probability
    `survival`, or all lose it (Eq. 2); in evaluation all keep it, with the weight `survival`
    (Eq. 5). The draw is rank 0's, so that the ranks drop the same cells. A dropped branch is
    computed and weighted with zero: its gradients are then zero on all ranks, not missing, as
    sharded optimizers want them.

    Raises:
        ValueError: survival is not in (0, 1].
    """

    decides = False

    def __init__(self, *, survival: float) -> None:
        super().__init__()
        if not 0 < survival <= 1:
            raise ValueError(
                f"survival={survival} is not in (0, 1]: give the probability that a mini-batch "
                "keeps the cell, such as 0.5"
            )
        self.survival = survival

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> weight of the residual branch (N,), the same for all samples."""
        if not self.training:
            return torch.full((len(x),), self.survival, device=x.device)
        survives = (torch.rand((), device=x.device) < self.survival).float()
        if several_ranks():
            dist.broadcast(survives, src=0)
        return survives.expand(len(x))


def linear_decay(cell: int, cells: int, *, last: float = 0.5) -> float:
    """Survival of cell 1 .. cells: from 1 at the input to `last` (Huang et al., Eq. 4)."""
    return 1 - cell / cells * (1 - last)
