"""Parameters that no gradient reaches in an optimizer step: the norms of paths not taken.

torch's optimizers skip a parameter without gradient, but DeepSpeed gives it a zero gradient, with
which weight decay and momentum move it: the more, the more rarely its path is taken. Here it stays
as it is, at any ZeRO stage and number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import EllipsisType

import torch
from torch import Tensor, nn

# A tensor that an optimizer updates, and where in it a parameter lies.
Place = tuple[Tensor, slice | EllipsisType]


class IdleParameters:
    """Which parameters no gradient has reached since the last call of `take`."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._reached: set[str] = set()
        self._hooks = [
            parameter.register_hook(partial(self._reach, name))
            for name, parameter in self._parameters.items()
        ]

    def close(self) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()

    def _reach(self, name: str, gradient: Tensor) -> None:
        self._reached.add(name)

    def take(self) -> dict[str, nn.Parameter]:
        """They, by name; what comes is counted anew."""
        idle = {n: p for n, p in self._parameters.items() if n not in self._reached}
        self._reached.clear()
        return idle


@contextmanager
def kept(
    parameters: Mapping[str, Tensor],
    places: Sequence[Place],
    state: Mapping[Tensor, Mapping[str, object]],
) -> Iterator[None]:
    """Within, an update changes neither these parameters nor their moments.

    Args:
        places: where the optimizer of this rank has the parameters or its part of them.
        state: the optimizer's; a moment that the update creates is zero for these parameters.
    """
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    before = [
        (flat.detach()[place].clone(), {k: v[place].clone() for k, v in _moments(state, flat)})
        for flat, place in places
    ]
    yield
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
        for (flat, place), (weight, moments) in zip(places, before, strict=True):
            flat[place] = weight
            for kind, value in _moments(state, flat):
                value[place] = moments.get(kind, 0.0)


def _moments(
    state: Mapping[Tensor, Mapping[str, object]], flat: Tensor
) -> Iterator[tuple[str, Tensor]]:
    for kind, value in state.get(flat, {}).items():
        if is_moment(value):
            assert isinstance(value, Tensor)
            yield kind, value


def is_moment(value: object) -> bool:
    """Whether an optimizer's state value has an element for each of the parameter's."""
    return isinstance(value, Tensor) and value.ndim > 0
