"""Global average pooling whose gradient keeps the memory format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def global_average(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(N, C, H, W) -> (N, C), in x's own dtype unless another is given.

    As x.mean((2, 3)), whose gradient is contiguous even where x is channels_last: it would turn
    every gradient that it is added to, and the convolutions before it slow.
    """
    pooled: Tensor = _GlobalAverage.apply(x, dtype or x.dtype)
    return pooled


class _GlobalAverage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.memory_format = torch.contiguous_format
        if x.is_contiguous(memory_format=torch.channels_last):
            ctx.memory_format = torch.channels_last
        return x.mean((2, 3), dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        pixels = ctx.shape[2] * ctx.shape[3]
        share = (grad / pixels).to(ctx.dtype)[:, :, None, None].expand(ctx.shape)
        return share.contiguous(memory_format=ctx.memory_format), None
