"""What a network costs: parameters, and multiply-adds for one image, nominal and as executed.

Multiply-adds are those of convolutions and linear layers; norms, activations and pooling are not
counted, as in the papers' tables.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.models.network import Network
from pipeline.models.shapes import ShapesOnly
from pipeline.models.sharing import surplus
from pipeline.models.stage import RecursiveCell


@dataclass(frozen=True)
class CellCost:
    """Multiply-adds of one recursive cell or unit in each step, of its router per step asked.

    They differ between steps where the resolution does; a step that is not taken costs nothing.
    """

    per_step: tuple[int, ...]
    router: int
    target: float | None

    @property
    def steps(self) -> int:
        return len(self.per_step)

    def executed(self, rates: Sequence[float]) -> float:
        """At the given rate of executed samples for each step.

        A router is asked at a step for the samples still inside, which are those that executed the
        step before.
        """
        asked = (1.0, *rates[:-1])
        cell = math.fsum(cost * rate for cost, rate in zip(self.per_step, rates, strict=True))
        return cell + self.router * math.fsum(asked)


@dataclass(frozen=True)
class Cost:
    """`parameters` of the whole network; multiply-adds per image, of which `fixed` are outside the
    recursive cells and pools. `cells` are keyed by the name that their routes carry.

    Relaxed sharing trains a `surplus` of parameters besides, which consolidation folds away.
    """

    parameters: int
    fixed: int
    cells: Mapping[str, CellCost]
    surplus: int = 0

    @property
    def nominal(self) -> int:
        """All steps, without routers."""
        return self.fixed + sum(sum(cell.per_step) for cell in self.cells.values())

    @property
    def maximal(self) -> int:
        """All steps, and all routers at every step."""
        return self.nominal + sum(cell.router * cell.steps for cell in self.cells.values())

    @property
    def expected(self) -> float:
        """Every router at its target: step i (from 1) executed by t^i of the samples (DRNN 3.5)."""
        return self.executed(
            {
                name: [(cell.target or 1.0) ** i for i in range(1, cell.steps + 1)]
                for name, cell in self.cells.items()
            }
        )

    def executed(self, rates: Mapping[str, Sequence[float]]) -> float:
        """At the measured rate of executed samples, per cell and step.

        Raises:
            ValueError: cells or steps other than the network's.
        """
        for name in self.cells.keys() | rates.keys():
            expected = self.cells[name].steps if name in self.cells else 0
            given = len(rates.get(name, ()))
            if given != expected:
                raise ValueError(
                    f"{given} execution rates for cell {name!r} of {expected} steps: "
                    "give one rate per step of every recursive cell"
                )
        return self.fixed + math.fsum(
            cell.executed(rates[name]) for name, cell in self.cells.items()
        )


def measure(model: Network, image_size: int | None = None, steps: int | None = None) -> Cost:
    """Count on shapes alone: next to nothing is computed, and the model is left as it is.

    `image_size` is the side in pixels; None takes the one the network is meant for. `steps` is the
    number asked of a cost-adjustable network; None takes the largest.

    Raises:
        ValueError: a number of steps that the network was not built for; cells whose routes have
            other names than their modules.
    """
    size = image_size or model.image_size
    shadow = copy.deepcopy(model).to_empty(device="cpu").eval()
    recursive = {
        name: module
        for name, module in shadow.named_modules()
        if isinstance(module, RecursiveCell) and not module.is_static
    }
    for cell in (*recursive.values(), *shadow.pools):
        # The loop itself in training mode: it then takes every step, whatever the gates say.
        cell.training = True
    with ShapesOnly() as shapes, torch.no_grad():
        calls = {name: _count_calls(module.cell, shapes) for name, module in recursive.items()}
        asked = {name: _count_calls(module.router, shapes) for name, module in recursive.items()}
        always = {name: _count_always(module, shapes) for name, module in recursive.items()}
        units = {
            f"{pool.name}.units.{number}": _count_calls(unit, shapes)
            for pool in shadow.pools
            for number, unit in enumerate(pool.units)
        }
        routes = shadow(torch.zeros(1, model.channels, size, size), steps).routes
    if named := {route.cell for route in routes} ^ {*recursive, *units}:
        raise ValueError(
            f"cells of {type(model).__name__} are not named as the modules that they are: "
            f"{', '.join(sorted(named))}; give RecursiveCell and Pool their dotted module names"
        )
    cells = {
        name: CellCost(
            per_step=(
                *(count - sum(always[name]) for count in calls[name]),
                *[0] * (cell.steps - len(calls[name])),
            ),
            router=sum(asked[name]) // cell.steps,
            target=cell.router.target,
        )
        for name, cell in recursive.items()
    }
    # A controller is asked at every iteration by every sample, which is part of the fixed cost.
    cells |= {name: CellCost(tuple(count), router=0, target=None) for name, count in units.items()}
    looped = sum(sum(cell.per_step) + cell.steps * cell.router for cell in cells.values())
    folded = surplus(shadow.tied_sets())
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()) - folded,
        fixed=shapes.multiply_adds - looped,
        cells=cells,
        surplus=folded,
    )


def measure_choices(model: Network, image_size: int | None = None) -> dict[int | None, Cost]:
    """The cost of each number of steps that the network can be asked for, ascending.

    A network without choice has one cost, under None.
    """
    choices: Sequence[int | None] = model.step_choices or (None,)
    return {steps: measure(model, image_size, steps) for steps in choices}


def _count_calls(module: nn.Module, shapes: ShapesOnly) -> list[int]:
    """A list that will hold the multiply-adds of each call of the module, in order."""
    calls: list[int] = []
    before = [0]

    def enter(*_: object) -> None:
        before[0] = shapes.multiply_adds

    def leave(*_: object) -> None:
        calls.append(shapes.multiply_adds - before[0])

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)
    return calls


def _count_always(cell: RecursiveCell, shapes: ShapesOnly) -> list[int]:
    """The same of what skipped samples compute too: the projection beside a residual branch."""
    projection = cell.cell.projection if cell.weighs == "branch" else None
    return _count_calls(projection, shapes) if isinstance(projection, nn.Module) else []
