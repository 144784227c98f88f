"""Training in phases: what each trains, how long it lasts, and whether its policy has converged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.config import Config, ConfigError, Convergence, Loss, Phase
from pipeline.distributed import World
from pipeline.models import Network, Output
from pipeline.models.parts import Selection, freeze_all_but, select
from pipeline.models.routers import Router
from pipeline.models.scorers import Scorer


def check(model: Network, config: Config) -> None:
    """Refuse phases and scorers that make no sense for this network.

    Raises:
        ConfigError: a part that it has not, a scorer or a convergence without controllers, a k
            larger than the pool, a weight of the execution rate without gates.
    """
    for phase in config.all_phases:
        selection(model, phase)
        own = config.during(phase)
        where = f"phase {phase.name!r}: " if config.phases else ""
        if not model.pools:
            _refuse_controllers(own, phase, where)
        aims = any(m.target is not None for m in model.modules() if isinstance(m, Router))
        weight = own.loss.execution_rate
        if not aims and weight != Loss().execution_rate:
            raise ConfigError(
                f"{where}loss.execution_rate={weight:g} with model={config.model}, which has no "
                "gates: leave it out, or take a network with gates (dr_*, aig_*)"
            )
        smallest = min((len(pool.units) for pool in model.pools), default=own.scorer.k)
        if own.scorer.name == "top_k" and own.scorer.k > smallest:
            raise ConfigError(
                f"{where}scorer.k={own.scorer.k} is more than the {smallest} units of a pool of "
                f"model={config.model}: give 1 to {smallest}"
            )


def _refuse_controllers(own: Config, phase: Phase, where: str) -> None:
    odd = [f"scorer.name={own.scorer.name}"] if own.scorer.name != "softmax" else []
    odd += ["until"] if phase.until else []
    odd += [
        f"loss.{name}"
        for name in ("different_routes", "decided_routes", "skip_reward")
        if (weight := getattr(own.loss, name)).first or weight.last
    ]
    if odd:
        raise ConfigError(
            f"{where}{odd[0]} with model={own.model}, which has no controllers: leave it out, or "
            "take a network with pools (reset*)"
        )


def selection(model: Network, phase: Phase) -> Selection:
    """What the phase trains.

    Raises:
        ConfigError: the network has no such part.
    """
    try:
        return select(model, phase.trains)
    except ValueError as error:
        raise ConfigError(f"phase {phase.name!r}: {error}") from None


def prepare(model: Network, config: Config, phase: Phase) -> None:
    """Freeze what the phase does not train, and give the network its scorer."""
    freeze_all_but(model, selection(model, phase))
    model.scorer = scorer(config.during(phase))


def scorer(config: Config) -> Scorer:
    return Scorer(**config.scorer.model_dump())


def most_steps(phase: Phase, steps_per_epoch: int) -> int:
    """Optimizer steps of the phase if it does not end before."""
    if phase.steps is not None:
        return phase.steps
    assert phase.epochs is not None
    return max(1, round(phase.epochs * steps_per_epoch))


class PolicyMovement:
    """How much the mean policy moves from one window of steps to the next: see `Convergence`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.restart()

    def restart(self) -> None:
        """Forget everything: a new phase has begun."""
        self._steps = 0
        self._sums: list[Tensor] = []
        self._before: list[Tensor] = []

    def add(self, output: Output) -> None:
        """Count one micro-batch."""
        means = [policy.probabilities.detach().mean(0) for policy in output.policies]
        self._sums = (
            [a + b for a, b in zip(self._sums, means, strict=True)] if self._sums else means
        )

    def settled(self, criterion: Convergence) -> bool:
        """After each optimizer step: whether a window ends here that is like the one before.

        Collective at the end of a window; the same on all ranks.
        """
        self._steps += 1
        if self._steps % criterion.window:
            return False
        # Summed, not averaged with a gradient: every rank must come to the same numbers.
        means = [self._world.sum(total) for total in self._sums]
        means = [total / total.sum(1, keepdim=True) for total in means]
        moved = [
            0.5 * (a - b).abs().sum(1).max() for a, b in zip(means, self._before, strict=False)
        ]
        self._sums, self._before = [], means
        return bool(moved) and float(torch.stack(moved).max()) < criterion.change

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self._steps,
            "sums": {str(number): value for number, value in enumerate(self._sums)},
            "before": {str(number): value for number, value in enumerate(self._before)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]
        self._sums, self._before = (
            [state[name][str(n)].to(self._world.device) for n in range(len(state[name]))]
            for name in ("sums", "before")
        )
