"""Which parameters and statistics a phase of training moves, by the parts that it names."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import nn

from pipeline.models.network import Network
from pipeline.models.norms import BatchNorm
from pipeline.models.routers import Router
from pipeline.models.routers.controller import Controller
from pipeline.models.stage import RecursiveCell


class Selection(NamedTuple):
    """Names of the parameters that train, and of the norms whose running statistics move."""

    parameters: frozenset[str]
    norms: frozenset[str]


def select(network: Network, parts: Collection[str]) -> Selection:
    """What the named parts consist of.

    `all`; `controller`: controllers and gates; `body`: everything else; `units`: cells used at more
    than one step; `norms`: every batch norm; `stage1`, `stage2`, ...; `stem` and `classifier`: what
    is before and after the stages. A part includes the norms within. The statistics of a norm move
    where its parameters train; `statistics` are those of all norms.

    Raises:
        ValueError: a part that this network has not.
    """
    chosen = {id(m) for part in parts for top in _modules(network, part) for m in top.modules()}
    parameters: set[str] = set()
    norms: set[str] = set()
    for prefix, module in network.named_modules():
        if id(module) in chosen:
            parameters |= {name for name, _ in module.named_parameters(prefix, recurse=False)}
        if isinstance(module, BatchNorm) and (id(module) in chosen or "statistics" in parts):
            norms.add(prefix)
    return Selection(frozenset(parameters), frozenset(norms))


def freeze_all_but(network: Network, chosen: Selection) -> None:
    """Let the chosen parameters and statistics train, and nothing else."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in chosen.parameters)
    for name, module in network.named_modules():
        if isinstance(module, BatchNorm):
            module.frozen = name not in chosen.norms
    network.train(network.training)


def _modules(network: Network, part: str) -> list[nn.Module]:
    names = [name for name, _ in network.named_children()]
    children = list(network.children())
    place = names.index("stages") if "stages" in names else len(names)
    stages = list(children[place].children()) if place < len(names) else []
    match part:
        case "statistics":
            return []  # they have no parameters
        case "all":
            found: list[nn.Module] = [network]
        case "controller":
            found = [module for module in _choosers(network) if [*module.parameters()]]
        case "body":
            outside = {id(m) for chooser in _choosers(network) for m in chooser.modules()}
            leaves = [m for m in network.modules() if not [*m.children()]]
            found = [leaf for leaf in leaves if id(leaf) not in outside]
        case "units":
            cells = [m for m in network.modules() if isinstance(m, RecursiveCell)]
            found = [unit for pool in network.pools for unit in pool.units]
            found += [cell.cell for cell in cells if cell.steps > 1]
        case "norms":
            found = [m for m in network.modules() if isinstance(m, BatchNorm)]
        case "stem":
            found = children[:place] if stages else []
        case "classifier":
            found = children[place + 1 :]
        case _:
            number = int(part.removeprefix("stage"))
            found = stages[number - 1 : number]
    if not found:
        raise ValueError(
            f"{part!r} selects nothing in this network, which has {len(stages)} stages: leave it "
            "out of what trains"
        )
    return found


def _choosers(network: Network) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, Router | Controller)]
