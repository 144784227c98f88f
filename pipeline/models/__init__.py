"""The networks, by name. The structure they share is in stage.py."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from pipeline.models import mobilenet, recurrent_convolution, resnet
from pipeline.models.network import Network, Output, Role
from pipeline.models.stage import CellRoute

__all__ = ["CellRoute", "Network", "Output", "Role", "create_model", "list_models"]

_MODELS: dict[str, Callable[..., Network]] = {
    **resnet.MODELS,
    **mobilenet.MODELS,
    **recurrent_convolution.MODELS,
}


def create_model(name: str, **options: Any) -> Network:
    """Build a network, its weights drawn from torch's default generator.

    Options: num_classes, norm (of the recursive cells: none, shared, per_step, gated_per_step,
    per_path), target_rate (of the gates), steps (to choose from, of cost-adjustable networks),
    sync_norm (batch statistics over all ranks), stride_on (of the bottleneck cells: 1x1, 3x3).

    Raises:
        ValueError: an unknown name or option, or options that make no sense for the network.
    """
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}{_nearest(name, _MODELS)}")
    build = _MODELS[name]
    valid = [
        p.name for p in inspect.signature(build).parameters.values() if p.kind == p.KEYWORD_ONLY
    ]
    for option in options:
        if option not in valid:
            raise ValueError(f"unknown option {option!r} of {name}{_nearest(option, valid)}")
    return build(**options)


def list_models(pattern: str = "*") -> list[str]:
    """Names that match a shell pattern such as `dr_*`, sorted."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def _nearest(name: str, valid: Iterable[str]) -> str:
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    return f": did you mean {close[0]!r}?" if close else f": choose one of {', '.join(valid)}"
