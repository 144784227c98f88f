"""ResNets for CIFAR: static, recursive and dynamic recursive (DRNN Sec. 4.1, Table 1).

A layout gives the steps of every cell, stage by stage. The first stage is never recursive, nor is
the first cell of the others, which halves the resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.cells import BasicCell
from pipeline.models.network import Network, Output
from pipeline.models.norms import BANKS, BatchNorm
from pipeline.models.routers import FixedRouter, Gate, Router
from pipeline.models.stage import CellRoute, RecursiveCell, Stage

Kind = Literal["static", "recursive", "dynamic"]
Layout = tuple[tuple[int, ...], ...]

CHANNELS = (16, 32, 64)
DEFAULT_NORM: dict[Kind, str] = {
    "static": "per_step",
    "recursive": "per_step",
    "dynamic": "gated_per_step",
}
DEFAULT_TARGET = 0.7


class ResNet(Network):
    """A 3x3 stem, three stages of basic cells, global average pooling and a linear classifier."""

    image_size = 32

    def __init__(
        self, layout: Layout, *, num_classes: int, norm: str, target: float | None, sync_norm: bool
    ) -> None:
        """`target` None builds recursion without gates."""
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS[0], 3, padding=1, bias=False)
        self.norm = BatchNorm(CHANNELS[0], sync=sync_norm)
        self.stages = nn.ModuleList()
        channels = CHANNELS[0]
        for s, (width, stage) in enumerate(zip(CHANNELS, layout, strict=True)):
            cells = []
            for c, steps in enumerate(stage):
                # The bank of a cell used once has one norm, whatever the recursive ones have.
                bank = BANKS[norm if steps > 1 else "per_step"]
                cell = BasicCell(
                    channels,
                    width,
                    stride=2 if s > 0 and c == 0 else 1,
                    norm=partial(bank, steps=steps, sync=sync_norm),
                )
                router: Router = FixedRouter()
                if steps > 1 and target is not None:
                    router = Gate(width, target=target)
                cells.append(RecursiveCell(f"stages.{s}.{c}", cell, steps=steps, router=router))
                channels = width
            self.stages.append(Stage(cells))
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor, steps: int | None = None) -> Output:
        """images (N, 3, H, W), of any size."""
        self.steps_taken(steps)  # refuses every number
        x = F.relu(self.norm(self.stem(images)))
        routes: tuple[CellRoute, ...] = ()
        for stage in self.stages:
            x, stage_routes = stage(x)
            routes += stage_routes
        return Output(self.classifier(x.mean((2, 3))), routes)


def _resnet(
    name: str,
    layout: Layout,
    kind: Kind,
    *,
    num_classes: int = 10,
    norm: str | None = None,
    target_rate: float | None = None,
    sync_norm: bool = False,
) -> ResNet:
    """Refuse what makes no sense for this kind of network, fill in its defaults, build it."""
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(
            f"num_classes={num_classes!r} is not a positive integer: count the classes"
        )
    if not isinstance(sync_norm, bool):
        raise ValueError(f"sync_norm={sync_norm!r} is neither true nor false: give one of them")
    if norm is not None and norm not in list(BANKS):
        raise ValueError(f"norm={norm!r} is unknown: choose one of {', '.join(BANKS)}")
    if norm is not None and kind == "static":
        raise ValueError(
            f"norm={norm!r} with {name}: it uses every cell once, so there are no steps to choose "
            "norms for; leave norm out, or take a recursive network (r_*, dr_*)"
        )
    if target_rate is not None and kind != "dynamic":
        raise ValueError(
            f"target_rate={target_rate} with {name}: it has no gates, so everything is executed; "
            "leave target_rate out, or take a network with gates (dr_*)"
        )
    if kind == "dynamic" and target_rate is None:
        target_rate = DEFAULT_TARGET
    return ResNet(
        layout,
        num_classes=num_classes,
        norm=norm or DEFAULT_NORM[kind],
        target=target_rate,
        sync_norm=sync_norm,
    )


def _static(cells: int) -> Layout:
    return ((1,) * cells,) * 3


def _recursive(first: int, cells: int, steps: int) -> Layout:
    """`first` cells in the first stage; `cells` recursive ones in each of the others."""
    later = (1, *(steps,) * cells)
    return ((1,) * first, later, later)


STATIC = {"resnet20": _static(3), "resnet56": _static(9), "resnet110": _static(18)}
RECURSIVE = {
    "resnet16": _recursive(3, 1, steps=2),
    "resnet32": _recursive(9, 2, steps=4),
    "resnet40": _recursive(9, 4, steps=2),
    "resnet54": _recursive(18, 3, steps=5),
    "resnet58": _recursive(18, 4, steps=4),
    # Six cells, where the paper's floor(17 / 3) gives five: only six give its depth and its size.
    "resnet66": _recursive(18, 6, steps=3),
    "resnet74": _recursive(18, 8, steps=2),
}

_BY_KIND: tuple[tuple[str, Kind, dict[str, Layout]], ...] = (
    ("", "static", STATIC),
    ("r_", "recursive", RECURSIVE),
    ("dr_", "dynamic", RECURSIVE),
)

MODELS: dict[str, Callable[..., Network]] = {
    prefix + name: partial(_resnet, prefix + name, layout, kind)
    for prefix, kind, layouts in _BY_KIND
    for name, layout in layouts.items()
}
