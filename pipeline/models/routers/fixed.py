"""Everybody, at every step."""

from __future__ import annotations

from torch import Tensor

from pipeline.models.routers.base import Router


class FixedRouter(Router):
    """All samples execute all steps: DRNN Eq. 1, Fig. 1b; a static network has steps = 1."""

    decides = False

    def forward(self, x: Tensor, index: int = 0) -> None:
        return None
