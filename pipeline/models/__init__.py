"""The networks, by name. The structure they share is in stage.py."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal

from pipeline.models import (
    denoising,
    mobilenet,
    rcnn,
    recurrent_convolution,
    relaxed,
    reset,
    resnet,
)
from pipeline.models.names import nearest
from pipeline.models.network import Network, Output, Role
from pipeline.models.stage import CellRoute, Policy

__all__ = [
    "CellRoute",
    "Network",
    "Output",
    "Policy",
    "Role",
    "create_model",
    "list_models",
    "task_of",
]

_MODELS: dict[str, Callable[..., Network]] = {
    **resnet.MODELS,
    **mobilenet.MODELS,
    **rcnn.MODELS,
    **recurrent_convolution.MODELS,
    **denoising.MODELS,
    **reset.MODELS,
    **relaxed.MODELS,
}


def create_model(name: str, **options: Any) -> Network:
    """Build a network, its weights drawn from torch's default generator.

    Options, as far as the network has a use for them: num_classes, norm (of the recursive cells:
    none, shared, per_step, gated_per_step, per_path), target_rate (of the gates), steps (to choose
    from, of cost-adjustable networks), sync_norm (batch statistics over all ranks), stride_on (of
    the bottleneck cells: 1x1, 3x3), controller (of ReSet's pools: cnn, rnn), sharing (between the
    steps of a cell: raw, relaxed), death_rate (of the last residual cell in stochastic depth; None
    without it).

    Raises:
        ValueError: an unknown name or option, or options that make no sense for the network.
    """
    build = _builder(name)
    valid = [
        p.name for p in inspect.signature(build).parameters.values() if p.kind == p.KEYWORD_ONLY
    ]
    for option in options:
        if option not in valid:
            raise ValueError(f"unknown option {option!r} of {name}{_nearest(option, valid)}")
    return build(**options)


def list_models(pattern: str = "*") -> list[str]:
    """Names that match a shell pattern such as `dr_*`, or hold a text such as `dr_`, sorted."""
    return sorted(fnmatch.filter(_MODELS, pattern) or (n for n in _MODELS if pattern in n))


def task_of(name: str) -> Literal["classification", "denoising"]:
    """What a network is for.

    Raises:
        ValueError: an unknown name.
    """
    _builder(name)
    return "denoising" if name in denoising.MODELS else "classification"


def _builder(name: str) -> Callable[..., Network]:
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}{_nearest(name, _MODELS)}")
    return _MODELS[name]


def _nearest(name: str, valid: Iterable[str]) -> str:
    valid = sorted(valid)
    close = nearest(name, valid)
    return f": did you mean {close!r}?" if close else f": choose one of {', '.join(valid)}"
