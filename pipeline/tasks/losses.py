"""What training minimises, term by term."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import Loss
from pipeline.distributed import World
from pipeline.models import CellRoute, Output


def terms(output: Output, labels: Tensor, config: Loss, world: World) -> dict[str, Tensor]:
    """The weighted terms whose sum is the loss (DRNN Eq. 13); each a scalar in fp32."""
    found = {
        "cross_entropy": F.cross_entropy(
            output.logits.float(), labels, label_smoothing=config.label_smoothing
        )
    }
    gated = [route for route in output.routes if route.target is not None]
    if gated and config.execution_rate:
        found["execution_rate"] = config.execution_rate * execution_rate(gated, world)
    return found


def execution_rate(routes: Sequence[CellRoute], world: World) -> Tensor:
    """L_acc, DRNN Eq. 12: squared distance of each cell's executed steps from its target.

    The rate g_j^i of cell j at step i is over the global mini-batch; its target is t^i. With
    several ranks the value is the same on all of them and the gradients, once averaged, are those
    of one rank with the whole mini-batch.
    """
    executed = torch.stack([route.weights.float().mean(0).sum() for route in routes])  # sum_i g_j^i
    expected = executed.new_tensor(
        [
            sum(route.target**i for i in range(1, route.weights.shape[1] + 1))  # sum_i t^i
            for route in routes
            if route.target is not None
        ]
    )
    return (world.mean(executed) - expected).square().mean()
