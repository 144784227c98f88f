"""Relaxed weight sharing: *Towards Efficient Recurrent Visual Models*, Sec. 4, Tables 1 to 3.

| name                                 | what it is                                             |
|--------------------------------------|--------------------------------------------------------|
| rs_18, rs_3                          | non-shared: so many cells in each of the three levels  |
| rs_18_middle, rs_3_middle            | the cells of the middle level share their convolutions |
| rs_18_all, rs_3_all                  | those of every level do                                |
| rs_18_middle_minimal, ..._all_minimal | one cell in place of those that would share           |

`sharing` is raw unless the option says relaxed. Convolutions have biases, which stay per cell, as
norms do. The cell that changes the channels shares nothing. As the paper's counts of parameters
have it, a level of 18 cells includes it, and one of 3 has it besides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.cells import BasicCell
from pipeline.models.network import Network, Output, check_common_options
from pipeline.models.norms import BatchNorm, PerStepNorm
from pipeline.models.pooling import global_average
from pipeline.models.sharing import Sharing, check, convolution
from pipeline.models.stage import CellRoute, RecursiveCell, Stage, routing

WIDTHS = (16, 32, 64)
# The steps of every cell, level by level; the first cell of the later levels changes the channels.
Layout = tuple[tuple[int, ...], ...]


class ThreeLevels(Network):
    """A 3x3 stem, three levels of basic cells, global average pooling and a linear classifier."""

    image_size = 32

    def __init__(
        self,
        layout: Layout,
        *,
        num_classes: int,
        sync_norm: bool,
        sharing: Sharing,
        death_rate: float | None,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, padding=1)
        self.norm = BatchNorm(WIDTHS[0], sync=sync_norm)
        self.stages = nn.ModuleList()
        channels = WIDTHS[0]
        routers = iter(routing([steps for level in layout for steps in level], death_rate))
        for number, (width, level) in enumerate(zip(WIDTHS, layout, strict=True)):
            cells = []
            for index, steps in enumerate(level):
                cell = BasicCell(
                    channels,
                    width,
                    stride=width // channels,
                    norm=partial(PerStepNorm, steps=steps, sync=sync_norm),
                    conv=convolution(sharing, steps, own_bias=True),
                    bias=True,
                )
                router, weighs = next(routers)
                cells.append(
                    RecursiveCell(
                        f"stages.{number}.{index}", cell, steps=steps, router=router, weighs=weighs
                    )
                )
                channels = width
            self.stages.append(Stage(cells))
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, steps: int | None = None) -> Output:
        """images (N, 3, H, W), of any size that the strides leave a pixel of."""
        self.steps_taken(steps)  # refuses every number
        x = F.relu(self.norm(self.stem(images)), inplace=True)
        routes: tuple[CellRoute, ...] = ()
        for stage in self.stages:
            x, stage_routes = stage(x)
            routes += stage_routes
        return Output(self.classifier(global_average(x)), routes)


def _three_levels(
    name: str,
    layout: Layout,
    *,
    num_classes: int = 10,
    sync_norm: bool = False,
    sharing: str = "raw",
    death_rate: float | None = None,
) -> ThreeLevels:
    check_common_options(num_classes, sync_norm)
    recursive = any(steps > 1 for level in layout for steps in level)
    return ThreeLevels(
        layout,
        num_classes=num_classes,
        sync_norm=sync_norm,
        sharing=check(sharing, recursive=recursive, name=name),
        death_rate=death_rate,
    )


def _layouts(cells: int, repeated: int) -> dict[str, Layout]:
    """`cells` in the first level, `repeated` in the others after the one that changes channels."""
    own = ((1,) * cells, (1,) * (1 + repeated), (1,) * (1 + repeated))
    shared, minimal = ((cells,), (1, repeated), (1, repeated)), ((1,), (1, 1), (1, 1))
    return {
        "": own,
        "_middle": (own[0], shared[1], own[2]),
        "_all": shared,
        "_middle_minimal": (own[0], minimal[1], own[2]),
        "_all_minimal": minimal,
    }


LAYOUTS = {
    f"rs_{cells}{form}": layout
    for cells, repeated in ((18, 17), (3, 3))
    for form, layout in _layouts(cells, repeated).items()
}
MODELS: dict[str, Callable[..., Network]] = {
    name: partial(_three_levels, name, layout) for name, layout in LAYOUTS.items()
}
