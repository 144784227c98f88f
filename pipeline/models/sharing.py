"""Sharing: which steps of a recursion have the same convolutions.

| sharing   | what the steps have                                                | source          |
|-----------|--------------------------------------------------------------------|-----------------|
| `raw`     | the same weights                                                   | DRNN, RC        |
| `relaxed` | weights of their own, which a loss pulls to the mean of their set, | Relaxed sharing |
|           | and which are replaced by it at the end: consolidation             | Sec. 3.1        |

Without sharing a network is a run of cells that are used once. Relaxed sharing: *Towards Efficient
Recurrent Visual Models*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.norms import Step

Sharing = Literal["raw", "relaxed"]
ConvFactory = Callable[..., nn.Module]  # called as nn.Conv2d is


class SharedConv(nn.Conv2d):
    """One weight for all steps, a bias for each: what relaxed ones with own biases consolidate to.

    `biases` is (steps, out_channels).
    """

    def __init__(self, *args: Any, steps: int, **options: Any) -> None:
        super().__init__(*args, **options | {"bias": False})
        self.biases = nn.Parameter(torch.zeros(steps, self.out_channels))

    def at(self, x: Tensor, step: Step) -> Tensor:
        y: Tensor = self._conv_forward(x, self.weight, self.biases[step.index])
        return y


class RelaxedConv(nn.Module):
    """One convolution per step, whose weights are tied; with `own_bias` the biases are not."""

    def __init__(self, *args: Any, steps: int, own_bias: bool, **options: Any) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(*args, **options) for _ in range(steps))
        self.tied = ["weight"]
        if self.convs[0].bias is not None and not own_bias:
            self.tied.append("bias")

    def at(self, x: Tensor, step: Step) -> Tensor:
        y: Tensor = self.convs[step.index](x)
        return y

    def consolidated(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This module's tensors as those of the convolution that is shared; names are relative."""
        steps = range(len(self.convs))
        found: dict[str, Tensor] = {}
        for name, _ in self.convs[0].named_parameters():
            members = torch.stack([saved[f"convs.{index}.{name}"] for index in steps])
            found |= {name: members.mean(0)} if name in self.tied else {"biases": members}
        return found


def convolution(sharing: Sharing, steps: int, *, own_bias: bool = False) -> ConvFactory:
    """What makes the convolutions of a cell of so many steps.

    With `own_bias`, those that have a bias have one for each step.
    """
    if steps == 1:
        return nn.Conv2d
    if sharing == "relaxed":
        return partial(RelaxedConv, steps=steps, own_bias=own_bias)
    return partial(SharedConv, steps=steps) if own_bias else nn.Conv2d


def convolve(conv: nn.Module, x: Tensor, step: Step) -> Tensor:
    """A convolution of a cell at a step."""
    y: Tensor = conv.at(x, step) if isinstance(conv, SharedConv | RelaxedConv) else conv(x)
    return y


def check(sharing: str, *, recursive: bool, name: str) -> Sharing:
    """Raises ValueError where an option `sharing` is unknown or makes no sense for the network."""
    if sharing not in get_args(Sharing):
        raise ValueError(
            f"sharing={sharing!r} is unknown: choose one of {', '.join(get_args(Sharing))}"
        )
    if sharing == "relaxed" and not recursive:
        raise ValueError(
            f"sharing='relaxed' with {name}: it uses every cell once, so there are no steps to "
            "tie; leave sharing out, or take a recursive network"
        )
    return sharing  # type: ignore[return-value]


@dataclass(frozen=True)
class TiedSet:
    """Tensors of one shape that a loss pulls together, by their names in the network.

    Raises:
        ValueError: tensors of different shapes, or fewer than two.
    """

    name: str
    members: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        shapes = {tuple(member.shape): name for name, member in self.members.items()}
        if len(self.members) < 2:
            raise ValueError(f"{self.name} ties {len(self.members)} tensors: give two or more")
        if len(shapes) > 1:
            found = ", ".join(f"{name} {shape}" for shape, name in shapes.items())
            raise ValueError(
                f"{self.name} ties tensors of different shapes, which have no mean: {found}; leave "
                "out the cell that changes the shape"
            )

    def spread(self) -> Tensor:
        """Sum of the squared distances of the members to their mean, with its gradient (Sec. 3.1).

        The mean is a constant here: its own gradient is the sum of the distances, which is zero.
        """
        members = torch.stack(list(self.members.values()))
        return (members - members.detach().mean(0)).square().sum()

    @torch.no_grad()
    def angle(self) -> Tensor:
        """Largest angle between two members as vectors, in degrees, float64 scalar."""
        vectors = torch.stack([member.flatten() for member in self.members.values()]).double()
        vectors = F.normalize(vectors, dim=1)
        return (vectors @ vectors.T).clamp(-1, 1).min().acos().rad2deg()


def tied_sets(model: nn.Module) -> list[TiedSet]:
    """The sets of a network with relaxed sharing, in the order of its modules; else none."""
    found = []
    for prefix, module in model.named_modules():
        if isinstance(module, RelaxedConv):
            place = prefix.replace(".cell.", ".")
            for name in module.tied:
                members = {
                    f"{prefix}.convs.{index}.{name}": getattr(conv, name)
                    for index, conv in enumerate(module.convs)
                }
                found.append(TiedSet(place if name == "weight" else f"{place}.{name}", members))
    return found


def surplus(sets: Sequence[TiedSet]) -> int:
    """Parameters that consolidation folds away."""
    return sum((len(tied.members) - 1) * next(iter(tied.members.values())).numel() for tied in sets)


def consolidate(saved: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state of the network with raw sharing from that of `model`, the same with relaxed sharing.

    Every tied tensor is replaced by the mean of its set (Sec. 3.1).
    """
    kept = dict(saved)
    for prefix, module in model.named_modules():
        if isinstance(module, RelaxedConv):
            own = {name: kept.pop(f"{prefix}.{name}") for name in module.state_dict()}
            kept |= {f"{prefix}.{name}": value for name, value in module.consolidated(own).items()}
    return kept
