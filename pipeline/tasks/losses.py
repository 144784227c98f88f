"""What training minimises, term by term."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import Loss, Weight
from pipeline.distributed import World
from pipeline.models import CellRoute, Output, Policy


def terms(
    output: Output, labels: Tensor, config: Loss, world: World, progress: float = 0.0
) -> dict[str, Tensor]:
    """The weighted terms whose sum is the loss (DRNN Eq. 13, ReSet Eq. 9 and 13).

    Each is a scalar in fp32; `progress`, 0..1, is where the weights are on their way.
    """
    found = {
        "cross_entropy": F.cross_entropy(
            output.logits.float(), labels, label_smoothing=config.label_smoothing
        )
    }
    gated = [route for route in output.routes if route.target is not None]
    if gated and config.execution_rate:
        found["execution_rate"] = config.execution_rate * execution_rate(gated, world)
    if output.policies:
        for name, term in _POLICY_TERMS.items():
            weight: Weight = getattr(config, name)
            if weight.first or weight.last:
                found[name] = weight.at(progress) * term(output.policies, world)
    return found


def execution_rate(routes: Sequence[CellRoute], world: World) -> Tensor:
    """L_acc, DRNN Eq. 12: squared distance of each cell's executed steps from its target.

    The rate g_j^i of cell j at step i is over the micro-batch of all ranks; its target is t^i. With
    several ranks the value is the same on all of them and the gradients, once averaged, are those
    of one rank with the whole mini-batch.
    """
    # Numbers of the host are no tensor here: to make one on a device would wait for the device.
    off = [
        route.weights.float().mean(0).sum()  # sum_i g_j^i
        - sum(route.target**i for i in range(1, route.weights.shape[1] + 1))  # sum_i t^i
        for route in routes
        if route.target is not None
    ]
    return world.mean(torch.stack(off)).square().mean()


def different_routes(policies: Sequence[Policy], world: World) -> Tensor:
    """How far the mean policy is from uniform, summed over iterations: ReSet Eq. 13, lambda_1.

    That is the paper's negative entropy of the mean plus a constant, so that it is never negative;
    the mean is over the micro-batch of all ranks, as in `execution_rate`.
    """
    lacking = []
    for policy in policies:
        mean = world.mean(policy.probabilities.mean(0))
        lacking.append((math.log(mean.shape[1]) - _entropy(mean)).sum())
    return torch.stack(lacking).sum()


def decided_routes(policies: Sequence[Policy], world: World) -> Tensor:
    """Mean entropy of each sample's policy, summed over iterations: ReSet Eq. 13, lambda_2."""
    return torch.stack([_entropy(p.probabilities).mean(0).sum() for p in policies]).sum()


def skip_reward(policies: Sequence[Policy], world: World) -> Tensor:
    """Iterations without their reward for taking the zero unit, mean over samples: ReSet Eq. 9.

    The reward R y is written as the loss of R (1 - y): a constant apart, and never negative.
    """
    return torch.stack([(1 - p.weights[..., -1]).mean(0).sum() for p in policies]).sum()


def _entropy(probabilities: Tensor) -> Tensor:
    """In nats, over the last dimension."""
    entropies: Tensor = torch.special.entr(probabilities).sum(-1)
    return entropies


_POLICY_TERMS = {
    "different_routes": different_routes,
    "decided_routes": decided_routes,
    "skip_reward": skip_reward,
}
