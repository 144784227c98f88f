"""MobileNetV2, static, recursive and dynamic recursive (DRNN Sec. 4.2, Table 2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models import options
from pipeline.models.cells import InvertedResidual
from pipeline.models.network import Network, Output
from pipeline.models.norms import BANKS, BatchNorm
from pipeline.models.options import PREFIXES, Kind, Options
from pipeline.models.pooling import global_average
from pipeline.models.routers import FixedRouter, Gate, RandomDrop, Router
from pipeline.models.routers.random_drop import survivals
from pipeline.models.sharing import convolution
from pipeline.models.stage import CellRoute, RecursiveCell, Stage, Weighs

STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


class Group(NamedTuple):
    """One row of Sandler et al., MobileNetV2 (2018), Table 2, without its repeats."""

    expansion: int
    channels: int
    stride: int  # of the first cell


GROUPS = (
    Group(1, 16, 1),
    Group(6, 24, 2),
    Group(6, 32, 2),
    Group(6, 64, 2),
    Group(6, 96, 1),
    Group(6, 160, 2),
    Group(6, 320, 1),
)
Layout = tuple[tuple[int, ...], ...]  # the steps of every cell, group by group
STATIC: Layout = tuple((1,) * cells for cells in (1, 2, 3, 4, 3, 3, 1))
RECURSIVE: Layout = ((1,), (1, 1), (1, 2), (1, 3), (1, 2), (1, 2), (1,))


class MobileNetV2(Network):
    """Stem, groups of inverted residuals, 1x1 head, global average pooling, linear classifier.

    Without dropout. The gates have one linear layer (DRNN Sec. 4.2).
    """

    image_size = 224

    def __init__(self, layout: Layout, chosen: Options) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, STEM_CHANNELS, 3, stride=2, padding=1, bias=False)
        self.norm = BatchNorm(STEM_CHANNELS, sync=chosen.sync_norm)
        self.stages = nn.ModuleList()
        channels = STEM_CHANNELS
        # The first cell of a group changes the shape: it has no shortcut, and is never left out.
        survival = survivals([n for cells in layout for n in cells[1:]], chosen.death_rate)
        for s, (group, repeats) in enumerate(zip(GROUPS, layout, strict=True)):
            cells = []
            for c, steps in enumerate(repeats):
                bank = BANKS[chosen.norm if steps > 1 else "per_step"]
                cell = InvertedResidual(
                    channels,
                    group.channels,
                    stride=group.stride if c == 0 else 1,
                    expansion=group.expansion,
                    norm=partial(bank, steps=steps, sync=chosen.sync_norm),
                    conv=convolution(chosen.sharing, steps),
                )
                router: Router = FixedRouter()
                if steps > 1 and chosen.target is not None:
                    router = Gate(channels, target=chosen.target, hidden=None)
                weighs: Weighs = "cell"
                if survival is not None and cell.has_shortcut:
                    router, weighs = RandomDrop(survival.pop(0)), "branch"
                cells.append(
                    RecursiveCell(
                        f"stages.{s}.{c}", cell, steps=steps, router=router, weighs=weighs
                    )
                )
                channels = group.channels
            self.stages.append(Stage(cells))
        self.head = nn.Conv2d(channels, HEAD_CHANNELS, 1, bias=False)
        self.head_norm = BatchNorm(HEAD_CHANNELS, sync=chosen.sync_norm)
        self.classifier = nn.Linear(HEAD_CHANNELS, chosen.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images: Tensor, steps: int | None = None) -> Output:
        """images (N, 3, H, W), of any size that the strides leave a pixel of."""
        self.steps_taken(steps)  # refuses every number
        x = F.relu6(self.norm(self.stem(images)), inplace=True)
        routes: tuple[CellRoute, ...] = ()
        for stage in self.stages:
            x, stage_routes = stage(x)
            routes += stage_routes
        x = F.relu6(self.head_norm(self.head(x)), inplace=True)
        return Output(self.classifier(global_average(x)), routes)


def _mobilenet_v2(
    name: str,
    kind: Kind,
    *,
    num_classes: int = 1000,
    norm: str | None = None,
    target_rate: float | None = None,
    sync_norm: bool = False,
    sharing: str = "raw",
    death_rate: float | None = None,
) -> MobileNetV2:
    chosen = options.check(
        name,
        kind,
        num_classes=num_classes,
        norm=norm,
        target_rate=target_rate,
        default_target=0.9,  # Sec. 4.2
        sync_norm=sync_norm,
        sharing=sharing,
        death_rate=death_rate,
    )
    return MobileNetV2(RECURSIVE if kind in options.RECURSIVE else STATIC, chosen)


_KINDS: tuple[Kind, ...] = ("static", "recursive", "dynamic")
MODELS: dict[str, Callable[..., Network]] = {
    f"{PREFIXES[kind]}mobilenet_v2": partial(_mobilenet_v2, f"{PREFIXES[kind]}mobilenet_v2", kind)
    for kind in _KINDS
}
