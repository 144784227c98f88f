"""What every router is."""

from __future__ import annotations

from torch import Tensor, nn


class Router(nn.Module):
    """Asked before every step with that step's input (N, C, H, W) and number, from 0.

    The answer is a float32 tensor (N,), 1 for a sample that executes the step and 0 for one that
    skips it, with a gradient where the decision is learned; or None where everybody executes.
    `decides` says whether samples can have different answers. `target` is the rate of executed
    samples that training aims at (t of DRNN Eq. 12), None where nothing is aimed at.
    """

    decides: bool
    target: float | None = None

    def forward(self, x: Tensor, index: int = 0) -> Tensor | None:
        raise NotImplementedError
