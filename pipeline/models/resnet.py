"""ResNets for CIFAR and ImageNet: static, recursive and dynamic recursive (DRNN Tables 1 to 3),
and the baselines of those tables: stochastic depth, adaptive inference graphs (AIG) and, on CIFAR,
pre-activation, whose shortcuts are 1x1 convolutions where the shape changes.

A layout gives the steps of every cell, stage by stage. On CIFAR the first stage is never recursive;
the first cell of a stage, which changes the shape, is recursive nowhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models import options
from pipeline.models.cells import BasicCell, Bottleneck, PreActivationCell, ResidualCell, StrideOn
from pipeline.models.network import Network, Output
from pipeline.models.norms import BANKS, BatchNorm
from pipeline.models.options import PREFIXES, Kind, Options
from pipeline.models.pooling import global_average
from pipeline.models.routers import FixedRouter, Gate, RandomDrop, Router
from pipeline.models.routers.gate import HIDDEN
from pipeline.models.routers.random_drop import linear_decay, survivals
from pipeline.models.sharing import convolution
from pipeline.models.stage import CellRoute, RecursiveCell, Stage

Layout = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Form:
    """What the ResNets for images of one size have in common."""

    image_size: int
    large_stem: bool
    stem_channels: int
    widths: tuple[int, ...]  # output channels of each stage
    cell: Callable[..., ResidualCell | PreActivationCell]
    pre_activation: bool = False  # norm and ReLU stand before the convolutions


CIFAR = Form(32, large_stem=False, stem_channels=16, widths=(16, 32, 64), cell=BasicCell)
PRE_ACTIVATION = replace(CIFAR, cell=PreActivationCell, pre_activation=True)
IMAGENET = Form(
    224, large_stem=True, stem_channels=64, widths=(256, 512, 1024, 2048), cell=Bottleneck
)


class ResNet(Network):
    """A stem, stages of residual cells, global average pooling and a linear classifier.

    The stem is a 3x3 convolution, or for large images a 7x7 one and a maximum, each of stride 2.
    Norm and ReLU follow it, or, where cells begin with their own, the last stage.
    """

    def __init__(
        self,
        layout: Layout,
        form: Form,
        chosen: Options,
        own_targets: Mapping[int, float] | None = None,
    ) -> None:
        """Args:
        own_targets: of the gates of these cells, counted through all stages, in the place of
            ``chosen.target``.
        """
        super().__init__()
        self.image_size = form.image_size
        self.large_stem = form.large_stem
        channels = form.stem_channels
        if self.large_stem:
            self.stem = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        else:
            self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.pre_activation = form.pre_activation
        normed = form.widths[-1] if self.pre_activation else channels
        self.norm = BatchNorm(normed, sync=chosen.sync_norm)
        self.stages = nn.ModuleList(
            Stage(cells) for cells in _cells(layout, form, chosen, own_targets or {})
        )
        self.classifier = nn.Linear(form.widths[-1], chosen.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor, steps: int | None = None) -> Output:
        """images (N, 3, H, W), of any size that the strides leave a pixel of."""
        self.steps_taken(steps)  # refuses every number
        x = self.stem(images)
        if not self.pre_activation:
            x = F.relu(self.norm(x), inplace=True)
        if self.large_stem:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        routes: tuple[CellRoute, ...] = ()
        for stage in self.stages:
            x, stage_routes = stage(x)
            routes += stage_routes
        if self.pre_activation:
            x = F.relu(self.norm(x), inplace=True)
        return Output(self.classifier(global_average(x)), routes)


def _cells(
    layout: Layout, form: Form, chosen: Options, own_targets: Mapping[int, float]
) -> Iterator[list[RecursiveCell]]:
    """The cells of each stage."""
    channels, numbers = form.stem_channels, itertools.count()
    survival = _survival(layout, chosen)
    for s, (width, stage) in enumerate(zip(form.widths, layout, strict=True)):
        cells = []
        for c, steps in enumerate(stage):
            # The bank of a cell used once has one norm, whatever the recursive ones have.
            bank = BANKS[chosen.norm if steps > 1 else "per_step"]
            cell = form.cell(
                channels,
                width,
                stride=2 if s > 0 and c == 0 else 1,
                norm=partial(bank, steps=steps, sync=chosen.sync_norm),
                conv=convolution(chosen.sharing, steps),
            )
            target = own_targets.get(next(numbers), chosen.target)
            router = next(survival) if survival else _router(chosen, target, channels, steps)
            branch = survival is not None or chosen.kind == "adaptive"
            cells.append(
                RecursiveCell(
                    f"stages.{s}.{c}",
                    cell,
                    steps=steps,
                    router=router,
                    weighs="branch" if branch else "cell",
                )
            )
            channels = width
        yield cells


def _survival(layout: Layout, chosen: Options) -> Iterator[RandomDrop] | None:
    """The routers of stochastic depth, cell by cell; None without it."""
    steps = [cell for stage in layout for cell in stage]
    if chosen.kind == "stochastic_depth":
        return (RandomDrop([linear_decay(n, len(steps))]) for n in range(1, len(steps) + 1))
    found = survivals(steps, chosen.death_rate)
    return map(RandomDrop, found) if found else None


def _router(chosen: Options, target: float | None, channels: int, steps: int) -> Router:
    """The router of one cell: that of a cell with one step decides only where all have one."""
    if target is not None and chosen.kind == "adaptive":
        return Gate(channels, target=target, norm=BatchNorm(HIDDEN, sync=chosen.sync_norm))
    if target is not None and steps > 1:
        return Gate(channels, target=target)
    return FixedRouter()


def _on_cifar(
    name: str,
    layout: Layout,
    kind: Kind,
    form: Form = CIFAR,
    *,
    num_classes: int = 10,
    norm: str | None = None,
    target_rate: float | None = None,
    sync_norm: bool = False,
    sharing: str = "raw",
    death_rate: float | None = None,
) -> ResNet:
    chosen = options.check(
        name,
        kind,
        num_classes=num_classes,
        norm=norm,
        target_rate=target_rate,
        default_target=0.7,  # Sec. 4.1
        sync_norm=sync_norm,
        sharing=sharing,
        death_rate=death_rate,
    )
    return ResNet(layout, form, chosen)


def _on_imagenet(
    name: str,
    layout: Layout,
    kind: Kind,
    default_target: float,
    *,
    num_classes: int = 1000,
    norm: str | None = None,
    target_rate: float | None = None,
    sync_norm: bool = False,
    sharing: str = "raw",
    death_rate: float | None = None,
    stride_on: StrideOn = "1x1",
) -> ResNet:
    if stride_on not in get_args(StrideOn):
        raise ValueError(
            f"stride_on={stride_on!r} is unknown: choose one of {', '.join(get_args(StrideOn))}"
        )
    chosen = options.check(
        name,
        kind,
        num_classes=num_classes,
        norm=norm,
        target_rate=target_rate,
        default_target=default_target,
        sync_norm=sync_norm,
        sharing=sharing,
        death_rate=death_rate,
    )
    form = replace(IMAGENET, cell=partial(Bottleneck, stride_on=stride_on))
    return ResNet(layout, form, chosen, AIG_TARGETS.get(name))


def _static(*cells: int) -> Layout:
    return tuple((1,) * stage for stage in cells)


def _recursive(first: int, cells: int, steps: int) -> Layout:
    """CIFAR: `first` cells in the first stage; `cells` recursive ones in each of the others."""
    later = (1, *(steps,) * cells)
    return ((1,) * first, later, later)


def _deep_third(cells: int, steps: int) -> Layout:
    """ImageNet: `cells` recursive ones in the third stage; one in the fourth, of two steps."""
    return (*_static(3, 4), (1, *(steps,) * cells), (1, 2))


CIFAR_STATIC = {f"resnet{6 * n + 2}": _static(n, n, n) for n in (3, 9, 18)}
CIFAR_RECURSIVE = {
    "resnet16": _recursive(3, 1, steps=2),
    "resnet32": _recursive(9, 2, steps=4),
    "resnet40": _recursive(9, 4, steps=2),
    "resnet54": _recursive(18, 3, steps=5),
    "resnet58": _recursive(18, 4, steps=4),
    # Six cells, where the paper's floor(17 / 3) gives five: only six give its depth and its size.
    "resnet66": _recursive(18, 6, steps=3),
    "resnet74": _recursive(18, 8, steps=2),
}
IMAGENET_STATIC = {"resnet50": _static(3, 4, 6, 3), "resnet101": _static(3, 4, 23, 3)}
IMAGENET_RECURSIVE = {
    "resnet35": ((1, 1, 1), (1, 1, 2), (1, 2, 2), (1, 2)),
    "resnet44": _deep_third(4, steps=5),
    "resnet47": _deep_third(5, steps=4),
    "resnet53": _deep_third(7, steps=3),
    "resnet65": _deep_third(11, steps=2),
}
# Sec. 4.2. DRNN names none for AIG: these are the t of Veit and Belongie (2018) whose multiply-adds
# are nearest to Table 2's, 3.15 and 5.11 billion.
IMAGENET_TARGETS = {"dr_resnet35": 0.8, "aig_resnet50": 0.7, "aig_resnet101": 0.5}
# Cells of AIG whose target is not t, by their schedules: those with 1 are to be executed always.
AIG_TARGETS: dict[str, dict[int, float]] = {
    "aig_resnet50": {0: 1.0, 1: 1.0, 2: 0.8, 3: 1.0, 7: 1.0, 13: 1.0, 14: 0.7, 15: 1.0},
    "aig_resnet101": dict.fromkeys(range(8), 1.0),
}

MODELS: dict[str, Callable[..., Network]] = {}
for _kind, _prefix in PREFIXES.items():
    _repeats = _kind in options.RECURSIVE
    for _name, _layout in (CIFAR_RECURSIVE if _repeats else CIFAR_STATIC).items():
        _name = _prefix + _name
        MODELS[_name] = partial(_on_cifar, _name, _layout, _kind)
    for _name, _layout in (IMAGENET_RECURSIVE if _repeats else IMAGENET_STATIC).items():
        _name = _prefix + _name
        _target = IMAGENET_TARGETS.get(_name, 0.7)
        MODELS[_name] = partial(_on_imagenet, _name, _layout, _kind, _target)
MODELS["preact_resnet110"] = partial(
    _on_cifar, "preact_resnet110", _static(18, 18, 18), "static", PRE_ACTIVATION
)
