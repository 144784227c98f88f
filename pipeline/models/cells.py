"""Cells: the functions F(x) that a recursion applies again and again.

A cell is called as `cell(x, step)`; its norms are the bank's for that step, its convolutions the
same at every step unless their factory (`sharing.convolution`) ties different ones. Where
`has_shortcut` says so, x goes around the branch of convolutions, and `cell(x, step, weight)` weighs
that branch: `weight` (N, 1, 1, 1) is that of each sample, None is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.norms import NoNorm, NormBank, Step
from pipeline.models.sharing import ConvFactory, convolve

NormFactory = Callable[[int], NormBank]
StrideOn = Literal["1x1", "3x3"]
ONCE = Step(0)  # of what changes the shape, which cannot be repeated


def _weighed(branch: Tensor, weight: Tensor | None) -> Tensor:
    return branch if weight is None else (branch * weight).to(branch.dtype)


class ResidualCell(nn.Module):
    """relu(shortcut(x) + weight residual(x)): the two branches can be asked for apart.

    `projection` is the shortcut of a cell that changes the shape, None where it has no parameters.
    """

    has_shortcut = True

    def __init__(self) -> None:
        super().__init__()
        self.projection: Projection | None = None

    def forward(self, x: Tensor, step: Step, weight: Tensor | None = None) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""
        y = _weighed(self.residual(x, step), weight)
        return self.activation(y.add_(self.shortcut(x)))

    def residual(self, x: Tensor, step: Step) -> Tensor:
        raise NotImplementedError

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.projection is None else self.projection(x)

    def activation(self, y: Tensor) -> Tensor:
        """In place: no backward pass needs what is overwritten, norms keep their input only."""
        return F.relu(y, inplace=True)


class BasicCell(ResidualCell):
    """Residual branch norm(conv(relu(norm(conv(x))))), 3x3 convolutions.

    He et al., Deep residual learning (2016), Fig. 5 left, in its CIFAR form: a cell that changes
    the shape has the parameter-free shortcut A (subsample, pad new channels with zeros).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        norm: NormFactory,
        conv: ConvFactory = nn.Conv2d,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = out_channels - in_channels
        self.conv1 = conv(in_channels, out_channels, 3, stride, padding=1, bias=bias)
        self.norm1 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1, bias=bias)
        self.norm2 = norm(out_channels)

    def residual(self, x: Tensor, step: Step) -> Tensor:
        y = F.relu(self.norm1(convolve(self.conv1, x, step), step), inplace=True)
        branch: Tensor = self.norm2(convolve(self.conv2, y, step), step)
        return branch

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            # Each stride-th pixel; slices give it too, but their gradient is not channels_last.
            x = F.avg_pool2d(x, 1, self.stride)
        if self.new_channels:
            x = F.pad(x, (0, 0, 0, 0, 0, self.new_channels))
        return x


class ResidualBranch(BasicCell):
    """The residual branch alone: a computational unit of ReSet, F of its Eq. 12."""

    def __init__(self, channels: int, *, norm: NormFactory) -> None:
        super().__init__(channels, channels, norm=norm)

    def forward(self, x: Tensor, step: Step, weight: Tensor | None = None) -> Tensor:
        """(N, channels, H, W) -> (N, channels, H, W), `weight` (N, 1, 1, 1) times the branch."""
        y = self.residual(x, step)
        return y if weight is None else (y * weight).to(y.dtype)


class Projection(nn.Module):
    """Shortcut B of He et al. (2016): a 1x1 convolution and its norm."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, norm: NormFactory
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.norm = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x), ONCE)
        return y


class Bottleneck(ResidualCell):
    """Residual branch of 1x1, 3x3 and 1x1 convolutions, the inner ones a quarter as wide.

    He et al. (2016), Fig. 5 right, with shortcut B where the shape changes. `stride_on` says which
    convolution has the stride: the first 1x1 as in that paper and in DRNN, whose multiply-adds are
    those of this form, or the 3x3 as in torchvision ("v1.5").
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        norm: NormFactory,
        conv: ConvFactory = nn.Conv2d,
        stride_on: StrideOn = "1x1",
    ) -> None:
        super().__init__()
        self.stride_on = stride_on
        width = out_channels // 4
        first, second = (stride, 1) if stride_on == "1x1" else (1, stride)
        self.conv1 = conv(in_channels, width, 1, first, bias=False)
        self.norm1 = norm(width)
        self.conv2 = conv(width, width, 3, second, padding=1, bias=False)
        self.norm2 = norm(width)
        self.conv3 = conv(width, out_channels, 1, bias=False)
        self.norm3 = norm(out_channels)
        if stride > 1 or in_channels != out_channels:
            self.projection = Projection(in_channels, out_channels, stride=stride, norm=norm)

    def residual(self, x: Tensor, step: Step) -> Tensor:
        y = F.relu(self.norm1(convolve(self.conv1, x, step), step), inplace=True)
        y = F.relu(self.norm2(convolve(self.conv2, y, step), step), inplace=True)
        branch: Tensor = self.norm3(convolve(self.conv3, y, step), step)
        return branch


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise and linear 1x1 convolution, without activation at the end.

    Sandler et al., MobileNetV2 (2018), Fig. 4d and Table 1. Only a cell that keeps the shape has a
    shortcut; one with expansion=1 has no expanding convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        expansion: int,
        norm: NormFactory,
        conv: ConvFactory = nn.Conv2d,
    ) -> None:
        super().__init__()
        width = in_channels * expansion
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.expands = expansion > 1
        if self.expands:
            self.conv1 = conv(in_channels, width, 1, bias=False)
            self.norm1 = norm(width)
        self.conv2 = conv(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.norm2 = norm(width)
        self.conv3 = conv(width, out_channels, 1, bias=False)
        self.norm3 = norm(out_channels)

    def forward(self, x: Tensor, step: Step, weight: Tensor | None = None) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""
        y = x
        if self.expands:
            y = F.relu6(self.norm1(convolve(self.conv1, y, step), step), inplace=True)
        y = F.relu6(self.norm2(convolve(self.conv2, y, step), step), inplace=True)
        branch = _weighed(self.norm3(convolve(self.conv3, y, step), step), weight)
        return branch.add_(x) if self.has_shortcut else branch


class PreActivationCell(nn.Module):
    """shortcut + conv(relu(norm(conv(relu(norm(x)))))), 3x3 convolutions without bias.

    He et al., Identity mappings in deep residual networks (2016), Fig. 4e. The shortcut is x; in a
    cell that changes the shape it is a 1x1 convolution of relu(norm(x)).
    """

    has_shortcut = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        norm: NormFactory,
        conv: ConvFactory = nn.Conv2d,
    ) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1, bias=False)
        self.projection = (
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            if stride > 1 or in_channels != out_channels
            else None
        )

    def forward(self, x: Tensor, step: Step, weight: Tensor | None = None) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""
        # Not in place: without norms this is x itself, which the shortcut still needs.
        activated = F.relu(self.norm1(x, step))
        shortcut = x if self.projection is None else self.projection(activated)
        y = F.relu(self.norm2(convolve(self.conv1, activated, step), step), inplace=True)
        y = _weighed(convolve(self.conv2, y, step), weight)
        y.add_(shortcut)
        return y


class ConvCell(nn.Module):
    """relu(norm(conv(x))), a 3x3 convolution that keeps the shape: RC Eq. 9.

    The convolution has a bias only where no norm follows that would take it away.
    """

    has_shortcut = False

    def __init__(self, channels: int, *, norm: NormFactory, conv: ConvFactory = nn.Conv2d) -> None:
        super().__init__()
        self.norm = norm(channels)
        bias = isinstance(self.norm, NoNorm)
        self.conv = conv(channels, channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """(N, channels, H, W) -> (N, channels, H, W)."""
        return F.relu(self.norm(convolve(self.conv, x, step), step), inplace=True)
