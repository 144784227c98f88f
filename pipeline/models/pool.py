"""ReSet's module: a pool of units, of which a controller chooses at every iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.cells import ResidualBranch
from pipeline.models.norms import Step
from pipeline.models.routers.controller import Controller
from pipeline.models.stage import Policy

Scores = Callable[[Tensor, bool], Tensor]


class Pool(nn.Module):
    """x <- x + sum_j y_j F_j(x) for a number of iterations: ReSet Eq. 12, Algorithm 1.

    The units F_j are residual branches with norms per iteration. Beside them stands a unit that
    always returns zero (Sec. 3.4), so that an iteration can leave x as it is. Without a controller
    the policy is fixed and sequential: iteration j applies unit j, with weight one, and each unit
    is used once. That is a static stage of residual cells.
    """

    def __init__(
        self,
        name: str,
        units: Sequence[ResidualBranch],
        controller: Controller | None,
        iterations: int,
    ) -> None:
        super().__init__()
        self.name = name
        self.units = nn.ModuleList(units)
        self.controller = controller
        self.iterations = iterations

    def forward(self, x: Tensor, score: Scores) -> tuple[Tensor, Policy | None]:
        """(N, C, H, W) -> (N, C, H, W) and the policy; None where it is fixed."""
        if self.controller is None:
            for unit in self.units:
                x = x + unit(x, Step(0))
            return x, None
        state: Any = None
        weights, probabilities = [], []
        for index in range(self.iterations):
            logits, state = self.controller(x, state, Step(index))
            y = score(logits, self.training)
            x = self.masked(x, y, Step(index)) if self.training else self.skipping(x, y, index)
            weights.append(y)
            probabilities.append(logits.softmax(1))
        return x, Policy(self.name, torch.stack(weights, 1), torch.stack(probabilities, 1))

    def masked(self, x: Tensor, y: Tensor, step: Step) -> Tensor:
        """Every unit for every sample: the gradient of y needs F(x), and so do several ranks."""
        total = x
        for unit, weight in zip(self.units, y.unbind(1), strict=False):
            total = total + unit(x, step, weight[:, None, None, None])
        return total

    def skipping(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        """As `masked`, but a unit is not computed for the samples that give it no weight."""
        total = x
        for unit, weight in zip(self.units, y.unbind(1), strict=False):
            chosen = (weight > 0).nonzero()[:, 0]
            if len(chosen) == len(x):
                total = total + unit(x, Step(index), weight[:, None, None, None])
            elif len(chosen):
                branch = unit(x[chosen], Step(index), weight[chosen, None, None, None])
                total = total.index_add(0, chosen, branch.to(total.dtype))
        return total
