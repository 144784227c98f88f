"""The options that the networks of DRNN share: what is refused, and what is the default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.models import sharing as of_steps
from pipeline.models.network import check_common_options
from pipeline.models.norms import BANKS
from pipeline.models.sharing import Sharing

Kind = Literal["static", "recursive", "dynamic", "stochastic_depth", "adaptive"]
# The prefix that a kind gives to a network's name.
PREFIXES: dict[Kind, str] = {
    "static": "",
    "recursive": "r_",
    "dynamic": "dr_",
    "stochastic_depth": "sd_",
    "adaptive": "aig_",
}
GATED: tuple[Kind, ...] = ("dynamic", "adaptive")
RECURSIVE: tuple[Kind, ...] = ("recursive", "dynamic")


@dataclass(frozen=True)
class Options:
    """Checked options, defaults filled in. `norm` is of the recursive cells; `target` of the gates,
    None without gates; `death_rate` of the last cell, None without stochastic depth.
    """

    kind: Kind
    num_classes: int
    norm: str
    target: float | None
    sync_norm: bool
    sharing: Sharing
    death_rate: float | None


def check(
    name: str,
    kind: Kind,
    *,
    num_classes: int,
    norm: str | None,
    target_rate: float | None,
    default_target: float,
    sync_norm: bool,
    sharing: str,
    death_rate: float | None,
) -> Options:
    """Fill in the defaults of this kind of network.

    Raises:
        ValueError: a value that is not valid, or makes no sense for this kind of network.
    """
    check_common_options(num_classes, sync_norm)
    if norm is not None and norm not in list(BANKS):
        raise ValueError(f"norm={norm!r} is unknown: choose one of {', '.join(BANKS)}")
    if norm is not None and kind not in RECURSIVE:
        raise ValueError(
            f"norm={norm!r} with {name}: it uses every cell once, so there are no steps to choose "
            "norms for; leave norm out, or take a recursive network (r_*, dr_*)"
        )
    if target_rate is not None and kind not in GATED:
        raise ValueError(
            f"target_rate={target_rate} with {name}: it has no gates, so everything is executed; "
            "leave target_rate out, or take a network with gates (dr_*)"
        )
    if death_rate is not None and kind in (*GATED, "stochastic_depth"):
        raise ValueError(
            f"death_rate={death_rate} with {name}: its cells are left out by a router of their own "
            "already; leave death_rate out, or take a network without one (resnet*, r_*)"
        )
    if kind in GATED and target_rate is None:
        target_rate = default_target
    default_norm = "gated_per_step" if kind == "dynamic" else "per_step"
    return Options(
        kind,
        num_classes,
        norm or default_norm,
        target_rate,
        sync_norm,
        of_steps.check(sharing, recursive=kind in RECURSIVE, name=name),
        death_rate,
    )
