"""From the weights of a static network to those of a recursive one: cells are folded into one.

A recursive network is a static one in which runs of identical cells became one cell of as many
steps (DRNN Sec. 3.2, Fig. 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.models.network import Network
from pipeline.models.norms import NormBank
from pipeline.models.pool import Pool
from pipeline.models.routers import Router
from pipeline.models.sharing import RelaxedConv
from pipeline.models.stage import RecursiveCell, Stage

Fold = Literal["mean", "first"]
SHOWN = 8  # names of differing weights in a message


def fold(saved: Mapping[str, Tensor], model: Network, how: Fold) -> dict[str, Tensor]:
    """A state of `model` from that of the static network that it was made of.

    A cell of n steps takes the next n cells of its stage, their `mean` or the `first` of them,
    norms and running statistics included; the norms of all its steps start alike. With relaxed
    sharing the convolution of each step is that of its own cell. Routers, which
    the static network has not, stay as they are. As there are floor((cells - 1) / steps) recursive
    cells (Sec. 4.1), the last cells of a stage may be left over, fewer than a cell has steps.

    The weights of the same network, its routers' or not, are taken as they are.

    A pool takes the blocks of a static stage as its units, the norms of all iterations alike
    (ReSet Sec. 5.1); from a network with controllers it takes everything.

    Args:
        saved: state of a network of the same family whose cells are all used once, or of the same
            network.

    Raises:
        ValueError: names or shapes that do not fit; the message has them.
    """
    own = model.state_dict()
    sources: dict[str, list[str]] = {name: [name] for name in own}
    spare: set[str] = set()
    if _is_of(model, saved):
        sources |= {name: [] for name in own.keys() - saved.keys()}
    else:
        _fold_modules(model, saved, sources, spare)
    used = {name for names in sources.values() for name in names}
    odd = [f"{name} (missing)" for name in used - saved.keys()]
    odd += [f"{name} (unknown)" for name in saved.keys() - used - spare]
    odd += [
        f"{name} {tuple(saved[source].shape)} instead of {tuple(own[name].shape)}"
        for name, names in sources.items()
        for source in names
        if source in saved and saved[source].shape != own[name].shape
    ]
    if odd:
        more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
        raise ValueError(
            "not the weights of this network or of its static form: "
            f"{', '.join(sorted(odd)[:SHOWN])}{more}"
        )
    folded = {
        name: _combined([saved[source] for source in names], how)
        for name, names in sources.items()
        if names
    }
    return own | folded


def _is_of(model: Network, saved: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of this very network, with or without those of its routers."""
    own = set(model.state_dict())
    routers = {
        name
        for prefix, module in model.named_modules()
        if isinstance(module, Router)
        for name in module.state_dict(prefix=f"{prefix}.")
    }
    return own - routers <= saved.keys() <= own


def _fold_modules(
    model: Network,
    saved: Mapping[str, Tensor],
    sources: dict[str, list[str]],
    spare: set[str],
) -> None:
    """Enter in `sources` what each tensor is made of, in `spare` what is left over."""
    for prefix, module in model.named_modules():
        if isinstance(module, Stage):
            _fold_stage(prefix, module, saved, sources, spare)
        elif isinstance(module, Pool) and not any(
            name.startswith(f"{prefix}.controller.") for name in saved
        ):
            _fill_pool(prefix, module, sources)


def _fold_stage(
    prefix: str,
    stage: Stage,
    saved: Mapping[str, Tensor],
    sources: dict[str, list[str]],
    spare: set[str],
) -> None:
    """Enter in `sources` what each tensor of the stage is made of, in `spare` what is left over."""
    depth = prefix.count(".") + 1  # where a name has the number of its cell
    cells = [cell for cell in stage if isinstance(cell, RecursiveCell)]
    theirs = {name: int(name.split(".")[depth]) for name in saved if name.startswith(f"{prefix}.")}
    available = max(theirs.values(), default=-1) + 1
    position = 0
    for index, cell in enumerate(cells):
        # The last cell may have more steps than there are cells left, but never none to start from.
        end = max(position + 1, min(position + cell.steps, available))
        for name, (theirs_name, step) in _names_in_a_static_cell(cell).items():
            places = range(position, end) if step is None else [min(position + step, end - 1)]
            sources[f"{prefix}.{index}.{name}"] = [
                f"{prefix}.{place}.{theirs_name}" for place in places
            ]
        for name in cell.router.state_dict(prefix=f"{prefix}.{index}.router."):
            sources[name] = []
        position += cell.steps
    if available - position < max(cell.steps for cell in cells):
        spare |= {name for name, place in theirs.items() if place >= position}


def _fill_pool(prefix: str, pool: Pool, sources: dict[str, list[str]]) -> None:
    """Enter in `sources` what the units are made of; a controller keeps its own weights."""
    for name in pool.state_dict(prefix=f"{prefix}."):
        if name.startswith(f"{prefix}.controller."):
            sources[name] = []
    for ours, (theirs, _) in _names_with_one_step(pool.units).items():
        sources[f"{prefix}.units.{ours}"] = [f"{prefix}.units.{theirs}"]


def _names_in_a_static_cell(cell: RecursiveCell) -> dict[str, tuple[str, int | None]]:
    """Names of the cell's tensors -> what the same tensors are called with one step.

    Those of relaxed convolutions come with the step that they alone are of.
    """
    names = _names_with_one_step(cell.cell)
    return {f"cell.{ours}": (f"cell.{theirs}", step) for ours, (theirs, step) in names.items()}


def _names_with_one_step(cell: nn.Module) -> dict[str, tuple[str, int | None]]:
    names: dict[str, tuple[str, int | None]] = {name: (name, None) for name in cell.state_dict()}
    for prefix, module in cell.named_modules():
        if isinstance(module, NormBank):
            for index, norm in enumerate(module.norms):
                for name in norm.state_dict():
                    names[f"{prefix}.norms.{index}.{name}"] = f"{prefix}.norms.0.{name}", None
        if isinstance(module, RelaxedConv):
            for index, conv in enumerate(module.convs):
                for name in conv.state_dict():
                    names[f"{prefix}.convs.{index}.{name}"] = f"{prefix}.{name}", index
    return names


def _combined(tensors: Sequence[Tensor], how: Fold) -> Tensor:
    if how == "first" or len(tensors) == 1 or not tensors[0].is_floating_point():
        return tensors[0]
    return torch.stack(list(tensors)).mean(0)
