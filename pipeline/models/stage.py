"""The recursive stage: the one structure that the networks of all four papers are made of.

    cell x steps x norm bank x router x sharing

A *cell* F is applied again and again for a number of *steps*, x <- F(x). Its *norm bank* gives each
step its own statistics, its *router* says which samples take part in a step, and *sharing* says
which steps have the same weights:

| network                        | cell            | steps | norm bank      | router     | sharing |
|--------------------------------|-----------------|-------|----------------|------------|---------|
| static ResNet, MobileNetV2     | any             | 1     | per step       | fixed      | none    |
| stochastic depth               | residual        | 1     | per step       | drop       | none    |
| adaptive inference graph (AIG) | residual        | 1     | per step       | gate       | none    |
| DRNN, naive recursive          | any             | N     | shared         | fixed      | raw     |
| DRNN, LVBN                     | any             | N     | per step       | fixed      | raw     |
| DRNN, dynamic recursive        | any             | N     | gated per step | gate       | raw     |
| recurrent convolution          | pre-activation  | N     | per path       | fixed      | raw     |
| relaxed parameter sharing      | basic, biases   | N     | per step       | fixed      | relaxed |
| ReSet                          | residual branch | N     | per step       | controller | pool    |

(ReSet's is built in pool.py. For recurrent convolution the number of steps is drawn by the trainer,
one for the whole network, and is an argument here.)

`RecursiveCell` is one cell with its steps, norms and router: one set of convolutions, shared by all
its steps or, relaxed, one for each that are tied (sharing.py). `Stage` is a run of them at one
resolution; without sharing, it is a run of cells that are used once, so a static network is this
same code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.cells import ResidualCell
from pipeline.models.norms import GatedPerStepNorm, Step
from pipeline.models.routers import FixedRouter, RandomDrop, Router
from pipeline.models.routers.random_drop import survivals

Weighs = Literal["cell", "branch"]


class CellRoute(NamedTuple):
    """Which samples executed which steps of one recursive cell.

    `cell` is the dotted module name in the network. `weights` (N, steps), float32, is the weight of
    F(x) in each step: exactly 0 or 1, with the router's gradient; where stochastic depth is
    evaluated, the rate of survival. `executed` (N, steps), bool, says which are not 0. `target` is
    the t of DRNN Eq. 12: step i (from 1) should be executed by t^i of the samples; None where
    nothing is aimed at. `policy` is that of the pool whose unit the cell is: its weights may then
    be any from 0 to 1.
    """

    cell: str
    weights: Tensor
    executed: Tensor
    target: float | None
    policy: Policy | None = None


class Policy(NamedTuple):
    """What the controller of one pool decided.

    `pool` is the dotted module name in the network. `weights` (N, iterations, units + 1), float32,
    are those of the units, the last of the zero unit, with the scorer's gradient; `probabilities`,
    of the same shape, are the softmax of the logits, without noise.
    """

    pool: str
    weights: Tensor
    probabilities: Tensor

    @property
    def routes(self) -> tuple[CellRoute, ...]:
        """One route for each unit, over the iterations; the zero unit computes nothing."""
        return tuple(
            CellRoute(f"{self.pool}.units.{j}", weights, weights.detach() > 0, None, self)
            for j, weights in enumerate(self.weights[..., :-1].unbind(2))
        )


class RecursiveCell(nn.Module):
    """One cell, unrolled: x^{i+1} = G F(x^i) + (1 - G) x^i for i = 0 .. steps-1 (DRNN Eq. 7).

    F is the whole cell, its shortcut and last activation included. A sample that the router sends
    out of the loop stays out: G at step i is the product of the router's answers up to i. With
    `pool_midway`, 2x2 average pooling follows step ceil(n/2) of the n steps taken (RC Sec. 5).

    With weighs="branch", G is the weight of the residual branch instead, each step's by itself, so
    that a cell that changes the shape can be skipped too: relu(shortcut(x) + G residual(x)).

    Raises:
        ValueError: a norm bank that separates skipped samples, with a router that skips none; a
            pooling in the middle, with a router that lets every sample take its own steps; a branch
            to weigh in a cell that has none, or at several steps of a router that decides.
    """

    def __init__(
        self,
        name: str,
        cell: nn.Module,
        *,
        steps: int,
        router: Router,
        pool_midway: bool = False,
        weighs: Weighs = "cell",
    ) -> None:
        super().__init__()
        gated_norm = any(isinstance(module, GatedPerStepNorm) for module in cell.modules())
        if gated_norm and not router.decides:
            raise ValueError(
                "norm='gated_per_step' needs a router that skips samples, and the fixed router "
                "skips none: use norm='per_step', or a network with gates (dr_*)"
            )
        if pool_midway and router.decides:
            raise ValueError(
                "pool_midway with a router that decides: every sample then takes its own number of "
                "steps, and they have no common middle: use the fixed router"
            )
        if weighs == "branch" and not _can_weigh(cell, steps, router):
            raise ValueError(
                f"weighs='branch' with {steps} steps of {type(cell).__name__}: only a residual "
                "cell has a branch to weigh, and a router that decides weighs it once; use "
                "weighs='cell'"
            )
        self.name = name
        self.cell = cell
        self.steps = steps
        self.router = router
        self.pool_midway = pool_midway
        self.weighs = weighs

    @property
    def is_static(self) -> bool:
        """Used exactly once by every sample: an ordinary cell, about which there is no route."""
        return self.steps == 1 and not self.router.decides

    def forward(
        self, x: Tensor, most: int | None = None, upstream_steps: int = 1
    ) -> tuple[Tensor, CellRoute | None]:
        """(N, C, H, W) -> output of the last step, and who executed what.

        `most` steps are taken where the cell has more; `upstream_steps` is what the norms are told
        of the stage before.
        """
        if self.training or not self.router.decides:
            x, weights = self.masked(x, most, upstream_steps)
        elif self.weighs == "branch":
            x, weights = self.skipping_branch(x)
        else:
            x, weights = self.skipping(x)
        if self.is_static:
            return x, None
        return x, CellRoute(self.name, weights, weights.detach() > 0, self.router.target)

    def masked(
        self, x: Tensor, most: int | None = None, upstream_steps: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Compute every sample at every step, then mask: (N, C, H, W) -> output, G (N, steps).

        The gradient of G needs F(x) of the skipped samples too (Sec. 3.4), and all ranks of a
        distributed run must use the same parameters. Steps beyond `most` are executed by nobody.
        """
        taken = self.steps if most is None else min(most, self.steps)
        inside = torch.ones(len(x), device=x.device)
        weights = []
        for index in range(taken):
            gate = self.router(x, index)
            if gate is None:
                x = self.cell(x, Step(index, upstream_steps))  # Eq. 1
            else:
                inside = gate if self.weighs == "branch" else inside * gate
                step = Step(index, upstream_steps, inside.detach() > 0)
                weight = inside[:, None, None, None]
                if self.weighs == "branch":
                    x = self.cell(x, step, weight)
                else:  # Eq. 7; lerp is exact at 0 and 1
                    x = torch.lerp(x, self.cell(x, step), weight.to(x.dtype))
            weights.append(inside)
            if self.pool_midway and index + 1 == (taken + 1) // 2:
                x = F.avg_pool2d(x, 2)
        weights += [torch.zeros_like(inside)] * (self.steps - taken)
        return x, torch.stack(weights, 1)

    def skipping(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `masked`, but a sample that has left the loop is not computed any more."""
        weights = torch.zeros(len(x), self.steps, device=x.device)
        inside = torch.arange(len(x), device=x.device)
        for index in range(self.steps):
            current = x if len(inside) == len(x) else x[inside]
            stays = self.router(current, index) > 0
            inside = inside[stays]
            if len(inside) == 0:
                break
            weights[inside, index] = 1
            if len(inside) == len(x):
                x = self.cell(x, Step(index))
            else:
                x = x.index_copy(0, inside, self.cell(current[stays], Step(index)))
        return x, weights

    def skipping_branch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `masked` with weighs="branch"; the branch of a skipped sample is not computed."""
        assert isinstance(self.cell, ResidualCell)
        executed = self.router(x) > 0
        weights = executed.float()[:, None]
        inside = executed.nonzero()[:, 0]
        if len(inside) == len(x):
            return self.cell(x, Step(0)), weights
        y = self.cell.shortcut(x)
        if len(inside):
            y = y.index_add(0, inside, self.cell.residual(x[inside], Step(0)))
        else:
            y = y.clone()  # the activation writes in place, and this may still be x
        return self.cell.activation(y), weights


def _can_weigh(cell: nn.Module, steps: int, router: Router) -> bool:
    if router.decides:
        return steps == 1 and isinstance(cell, ResidualCell)
    return bool(cell.has_shortcut)


class Stage(nn.ModuleList):
    """Recursive cells in sequence, at one resolution after the first."""

    def __init__(self, cells: Iterable[RecursiveCell]) -> None:
        super().__init__(cells)

    def forward(
        self, x: Tensor, most: int | None = None, upstream_steps: int = 1
    ) -> tuple[Tensor, tuple[CellRoute, ...]]:
        """(N, C, H, W) -> output and the routes of the cells that have one, in order."""
        routes = []
        for cell in self:
            x, route = cell(x, most, upstream_steps)
            if route is not None:
                routes.append(route)
        return x, tuple(routes)


def routing(steps: Sequence[int], death_rate: float | None) -> list[tuple[Router, Weighs]]:
    """Routers for residual cells of so many steps, in order, and what they weigh.

    Stochastic depth that decays to `death_rate`; fixed ones without it.

    Raises:
        ValueError: death_rate is not in (0, 1).
    """
    found = survivals(steps, death_rate)
    if found is None:
        return [(FixedRouter(), "cell") for _ in steps]
    return [(RandomDrop(survival), "branch") for survival in found]
