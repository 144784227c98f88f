"""Recurrent convolution for denoising, and its unrolled standard networks (RC Sec. 5, Eq. 9).

    C_1^n(64) -> C_2^n(64) -> C_3^n(64)

between a first layer (convolution, ReLU) and a last one (convolution), which Eq. 9 omits; those
have the form that DnCNN gives them, whose settings the paper follows. R_3^n uses each of its three
cells n times; S_3^n is the same graph with a cell of its own at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.cells import ConvCell
from pipeline.models.network import Network, Output, check_sync_norm
from pipeline.models.norms import BANKS
from pipeline.models.routers import FixedRouter
from pipeline.models.sharing import Sharing, check, convolution
from pipeline.models.stage import RecursiveCell, Stage

WIDTH = 64
CELLS = 3
STEPS = (1, 2, 3, 4)
DEFAULT_NORM = "per_step"


class Denoiser(Network):
    """Adds to a grey image what its cells make of it: x + f(x), residual learning (Eq. 7)."""

    image_size = 40
    channels = 1

    def __init__(
        self, steps: tuple[int, ...], *, norm: str, sync_norm: bool, sharing: Sharing
    ) -> None:
        """`steps` of each cell, in order."""
        super().__init__()
        self.first = nn.Conv2d(1, WIDTH, 3, padding=1)
        cells = []
        for number, of_cell in enumerate(steps):
            bank = partial(BANKS[norm], steps=of_cell, sync=sync_norm)
            cell = ConvCell(WIDTH, norm=bank, conv=convolution(sharing, of_cell))
            cells.append(
                RecursiveCell(f"cells.{number}", cell, steps=of_cell, router=FixedRouter())
            )
        self.cells = Stage(cells)
        self.last = nn.Conv2d(WIDTH, 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.last.weight)  # training begins at the noisy image itself

    def forward(self, images: Tensor, steps: int | None = None) -> Output:
        """Noisy images (N, 1, H, W) in 0..1, of any size -> restored images of that size."""
        self.steps_taken(steps)  # refuses every number
        features = F.relu(self.first(images), inplace=True)
        # An image of one channel does not say which layout it has, and convolutions that are not
        # told take the slower one: several times as long in bf16 on CPUs.
        features = features.contiguous(memory_format=torch.channels_last)
        features, routes = self.cells(features)
        return Output(images + self.last(features), routes)


def _denoiser(
    name: str,
    steps: tuple[int, ...],
    *,
    norm: str | None = None,
    sync_norm: bool = False,
    sharing: str = "raw",
) -> Denoiser:
    """Refuse what makes no sense for this network, fill in its defaults, build it."""
    check_sync_norm(sync_norm)
    if norm is not None and norm not in list(BANKS):
        raise ValueError(f"norm={norm!r} is unknown: choose one of {', '.join(BANKS)}")
    if norm is not None and name in STANDARD:
        raise ValueError(
            f"norm={norm!r} with {name}: it uses every cell once, so there are no steps to choose "
            "norms for; leave norm out, or take a recursive network (rc_r3_*)"
        )
    shared = check(sharing, recursive=max(steps) > 1, name=name)
    return Denoiser(steps, norm=norm or DEFAULT_NORM, sync_norm=sync_norm, sharing=shared)


RECURRENT = {f"rc_r3_{n}": (n,) * CELLS for n in STEPS}
STANDARD = {f"rc_s3_{n}": (1,) * CELLS * n for n in STEPS}

MODELS: dict[str, Callable[..., Network]] = {
    name: partial(_denoiser, name, steps) for name, steps in (RECURRENT | STANDARD).items()
}
