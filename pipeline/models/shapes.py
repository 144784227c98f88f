"""Networks of which only the shapes matter: built without drawing, called without computing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class ShapesOnly(TorchFunctionMode):
    """Within, no random numbers are drawn, and layers with weights answer with zeros.

    A network that is built within has weights of any value. One that is called answers with tensors
    of the right shapes, at the cost of what lies between its layers; `multiply_adds` counts what
    its convolutions, linear layers and LSTM cells would have taken.

    PyTorch's own device for shapes, "meta", and its counter load its compiler, which takes longer
    than all else that a command does before it starts to train.
    """

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        if function not in _LAYERS:
            return function(*args, **kwargs)
        answer, multiply_adds = _LAYERS[function](*args, **kwargs)
        self.multiply_adds += multiply_adds
        return answer


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> tuple[Tensor, int]:
    sides = [
        (side + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for side, kernel, step, pad, spread in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    y = x.new_zeros(len(x), len(weight), *sides)
    return y, y.numel() * weight[0].numel()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, int]:
    y = x.new_zeros(*x.shape[:-1], len(weight))
    return y, y.numel() * weight.shape[1]


def _lstm_cell(
    x: Tensor, state: tuple[Tensor, Tensor], from_input: Tensor, from_hidden: Tensor, *_: Tensor
) -> tuple[tuple[Tensor, Tensor], int]:
    hidden, cell = state
    return (
        (torch.zeros_like(hidden), torch.zeros_like(cell)),
        len(x) * (from_input.numel() + from_hidden.numel()),
    )


def _batch_norm(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, int]:
    return torch.zeros_like(x), 0


_LAYERS: dict[Callable[..., Any], Callable[..., tuple[Any, int]]] = {
    torch.conv2d: _convolution,
    F.linear: _linear,
    torch.lstm_cell: _lstm_cell,
    F.batch_norm: _batch_norm,
}
# A function that asks modes itself calls what it is made of without them.
_DRAWS = {
    Tensor.normal_,
    Tensor.uniform_,
    Tensor.exponential_,
    nn.init.normal_,
    nn.init.uniform_,
    nn.init.kaiming_normal_,
    nn.init.kaiming_uniform_,
}
