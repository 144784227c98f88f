"""ReSet (Kemaev et al.): residual units in pools, chosen by a controller for each image.

| name            | in the paper   | what it is                                           |
|-----------------|----------------|------------------------------------------------------|
| reset38         | ReSet-38       | three pools of 5 units and a zero unit, 5 iterations |
| reset38_6x6     | Sec. 5.1       | pools of 6 units, which take ResNet-38's blocks      |
| reset_1_1_5 ..  | Table 1        | one pool of 5 units, one block in the other stages   |
| reset_6x2 ..    | Table 3        | a first pool of units x iterations, then two blocks  |
| resnet38        | ResNet-38      | 6 blocks a stage                                     |
| resnet_1_1_5 .. | Tables 1 and 3 | the same with fewer blocks                           |

The ResNets are the same code without controllers: every unit is used once, in order.

The paper gives no size for the stem's max pooling. Its time for one of five units an iteration is
1.08 of that of six blocks a stage, which leaves no room for a stride: it is 3x3 with stride 1. Nor
does it say what follows the convolutions between the stages: norm and ReLU, as in the stem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.cells import ResidualBranch
from pipeline.models.network import Network, Output, check_common_options
from pipeline.models.norms import BatchNorm, PerStepNorm
from pipeline.models.pool import Pool, Scores
from pipeline.models.pooling import global_average
from pipeline.models.routers.controller import CONTROLLERS
from pipeline.models.stage import CellRoute, Policy

WIDTHS = (16, 32, 64)


@dataclass(frozen=True)
class Shape:
    """Of one stage: its units and how often it iterates; None where every unit is used once."""

    units: int
    iterations: int | None = None


class Downsampling(nn.Module):
    """relu(norm(conv(x))), a 3x3 convolution of stride 2."""

    def __init__(self, channels: int, width: int, *, sync: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
        self.norm = BatchNorm(width, sync=sync)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, width, H / 2, W / 2)."""
        return F.relu(self.norm(self.conv(x)), inplace=True)


class ReSetStage(nn.Module):
    """What changes the shape, in all stages but the first, and the pool."""

    def __init__(self, downsampling: Downsampling | None, pool: Pool) -> None:
        super().__init__()
        self.downsampling = downsampling
        self.pool = pool

    def forward(self, x: Tensor, score: Scores) -> tuple[Tensor, Policy | None]:
        """(N, C, H, W) -> output and the policy of the pool; None where it is fixed."""
        if self.downsampling is not None:
            x = self.downsampling(x)
        return self.pool(x, score)  # type: ignore[no-any-return]


class ReSet(Network):
    """A stem, three pools with strided convolutions between, average pooling, a classifier: Fig. 3.

    `scorer` makes weights of the controllers' logits; training and evaluation may set another.
    """

    image_size = 32

    def __init__(
        self, shapes: Sequence[Shape], *, controller: str, num_classes: int, sync: bool
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.norm = BatchNorm(WIDTHS[0], sync=sync)
        self.stages = nn.ModuleList()
        for number, (width, shape) in enumerate(zip(WIDTHS, shapes, strict=True)):
            before = Downsampling(WIDTHS[number - 1], width, sync=sync) if number else None
            pool = _pool(f"stages.{number}.pool", width, shape, controller, sync)
            self.stages.append(ReSetStage(before, pool))
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor, steps: int | None = None) -> Output:
        """images (N, 3, H, W), of any size that the strides leave a pixel of."""
        self.steps_taken(steps)  # refuses every number
        x = F.relu(self.norm(self.stem(images)), inplace=True)
        x = F.max_pool2d(x, 3, stride=1, padding=1)
        routes: tuple[CellRoute, ...] = ()
        for stage in self.stages:
            x, policy = stage(x, self.scorer)
            if policy is not None:
                routes += policy.routes
        return Output(self.classifier(global_average(x)), routes)


def _pool(name: str, width: int, shape: Shape, controller: str, sync: bool) -> Pool:
    iterations = shape.iterations or 1
    norm = partial(PerStepNorm, steps=iterations, sync=sync)
    chooser = None
    if shape.iterations:
        kind = CONTROLLERS[controller]
        chooser = kind(width, shape.units + 1, iterations=iterations, sync=sync)
    units = [ResidualBranch(width, norm=norm) for _ in range(shape.units)]
    return Pool(name, units, chooser, iterations)


def _static(shapes: Sequence[Shape], *, num_classes: int = 10, sync_norm: bool = False) -> Network:
    check_common_options(num_classes, sync_norm)
    return ReSet(shapes, controller="rnn", num_classes=num_classes, sync=sync_norm)


def _routed(
    shapes: Sequence[Shape],
    *,
    num_classes: int = 10,
    controller: str = "rnn",
    sync_norm: bool = False,
) -> Network:
    check_common_options(num_classes, sync_norm)
    if controller not in list(CONTROLLERS):
        raise ValueError(
            f"controller={controller!r} is unknown: choose one of {', '.join(CONTROLLERS)}"
        )
    return ReSet(shapes, controller=controller, num_classes=num_classes, sync=sync_norm)


def _blocks(*stages: int) -> tuple[Shape, ...]:
    return tuple(Shape(blocks) for blocks in stages)


def _pooled(*stages: int) -> tuple[Shape, ...]:
    """A stage of one block has nothing to choose from; a larger one iterates over its units."""
    return tuple(Shape(units, units if units > 1 else None) for units in stages)


SHORTENED = ((1, 1, 5), (1, 5, 1), (5, 1, 1))
# Table 3: units x iterations of the first stage.
POOLS = ((6, 2), (3, 2), (2, 3), (2, 6))

MODELS: dict[str, Callable[..., Network]] = {
    "resnet38": partial(_static, _blocks(6, 6, 6)),
    "reset38": partial(_routed, _pooled(5, 5, 5)),
    "reset38_6x6": partial(_routed, _pooled(6, 6, 6)),
}
for _stages in SHORTENED:
    _name = "_".join(map(str, _stages))
    MODELS[f"resnet_{_name}"] = partial(_static, _blocks(*_stages))
    MODELS[f"reset_{_name}"] = partial(_routed, _pooled(*_stages))
MODELS["resnet_2_1_1"] = partial(_static, _blocks(2, 1, 1))
for _units, _iterations in POOLS:
    MODELS[f"reset_{_units}x{_iterations}"] = partial(
        _routed, (Shape(_units, _iterations), *_blocks(1, 1))
    )
