"""Cells: the residual functions F(x) that a recursion applies again and again.

A cell is called as `cell(x, step)`; its convolutions are the same at every step, its norms are the
bank's for that step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.norms import NoNorm, NormBank, Step

NormFactory = Callable[[int], NormBank]


class BasicCell(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))), 3x3 convolutions without bias.

    He et al., Deep residual learning (2016), Fig. 5 left, in its CIFAR form: a cell that changes
    the shape has the parameter-free shortcut A (subsample, pad new channels with zeros).
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, norm: NormFactory
    ) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = out_channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = norm(out_channels)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""
        # In place where no backward pass needs what is overwritten: norms keep their input only.
        y = F.relu(self.norm1(self.conv1(x), step), inplace=True)
        y = self.norm2(self.conv2(y), step)
        return F.relu(y.add_(self._shortcut(x)), inplace=True)

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            x = F.pad(x, (0, 0, 0, 0, 0, self.new_channels))
        return x


class ConvCell(nn.Module):
    """relu(norm(conv(x))), a 3x3 convolution that keeps the shape: RC Eq. 9.

    The convolution has a bias only where no norm follows that would take it away.
    """

    def __init__(self, channels: int, *, norm: NormFactory) -> None:
        super().__init__()
        self.norm = norm(channels)
        bias = isinstance(self.norm, NoNorm)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """(N, channels, H, W) -> (N, channels, H, W)."""
        return F.relu(self.norm(self.conv(x), step), inplace=True)
