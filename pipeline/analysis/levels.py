"""The levels of a residual network, unrolled: blocks that take a place in one common vector space.

A level is a stage of the network, counted from 1. Its blocks are the cells, step by step, that keep
the shape, so that the identity can stand for each: *Towards Efficient Recurrent Visual Models*,
Sec. 4.3 and 4.4.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.models import Network
from pipeline.models.shapes import ShapesOnly
from pipeline.models.stage import RecursiveCell, Stage


class Block(NamedTuple):
    """One step of one cell; `cell` is the name of the module."""

    cell: str
    step: int


def levels(model: Network) -> int:
    """How many there are; raises ValueError where there are none."""
    return len(_stages(model))


def blocks(model: Network, level: int, size: int) -> list[Block]:
    """The blocks of a level, from the one closest to the input; `size` is the images' side.

    Raises:
        ValueError: no levels, no such level, no cell in it that keeps the shape, or cells that no
            identity can stand for: without shortcut, or with a router that decides for each sample.
    """
    stages = _stages(model)
    if not 1 <= level <= len(stages):
        raise ValueError(
            f"level {level}: this network has the levels 1 to {len(stages)}: give one of them"
        )
    shadow = copy.deepcopy(model).to_empty(device="cpu").eval()
    cells = {
        name: cell
        for name, cell in shadow.named_modules()
        if isinstance(cell, RecursiveCell) and name.startswith(f"{stages[level - 1]}.")
    }
    for name, cell in cells.items():
        if cell.router.decides:
            raise ValueError(
                f"{name} is gated, so that not every image passes it: give a run of a residual "
                "network without gates"
            )
        if not cell.cell.has_shortcut:
            raise ValueError(
                f"{name} has no shortcut, so that the identity cannot stand for it: give a run of "
                "a residual network"
            )
    shapes = watch(shadow, list(cells))
    with ShapesOnly(), torch.no_grad():
        shadow(torch.zeros(1, model.channels, size, size))
    found = [
        Block(name, step)
        for name, calls in shapes.items()
        for step, (before, after) in enumerate(calls)
        if before.shape == after.shape
    ]
    if not found:
        raise ValueError(f"level {level}: none of its cells keeps the shape: give another level")
    return found


def watch(model: Network, cells: list[str]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """What will go into and come out of each call of the cells, which the lists will hold."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in cells}

    def keep(name: str) -> None:
        cell = model.get_submodule(name).cell
        assert isinstance(cell, nn.Module)
        cell.register_forward_hook(
            lambda _, inputs, output: calls[name].append((inputs[0].detach(), output.detach()))
        )

    for name in cells:
        keep(name)
    return calls


def _stages(model: Network) -> list[str]:
    found = [name for name, module in model.named_modules() if isinstance(module, Stage)]
    if not found:
        raise ValueError(
            "this network has no stages, and so no levels: give a run of a residual network such "
            "as resnet20 or r_resnet16"
        )
    return found
