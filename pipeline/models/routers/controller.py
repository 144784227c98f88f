"""ReSet's controllers: which units of a pool an iteration applies, and with what weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.norms import PerStepNorm, Step
from pipeline.models.pooling import global_average
from pipeline.models.precision import without_autocast

HIDDEN = 64  # of the LSTM cell


class Controller(nn.Module):
    """Called as `controller(x, state, step)` with x (N, C, H, W): ReSet Eq. 4.

    The answer is the logits (N, components), float32, and the state for the next iteration of the
    same module, None before the first.
    """

    def forward(self, x: Tensor, state: Any, step: Step) -> tuple[Tensor, Any]:
        raise NotImplementedError


class ConvolutionalController(Controller):
    """A shallow convolutional network without biases, with norms per iteration: Sec. 4, Fig. 2a.

    The paper gives neither depth nor width: two 3x3 convolutions of stride 2 that keep the width.
    """

    def __init__(self, channels: int, components: int, *, iterations: int, sync: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.norm1 = PerStepNorm(channels, steps=iterations, sync=sync)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.norm2 = PerStepNorm(channels, steps=iterations, sync=sync)
        self.scores = nn.Linear(channels, components, bias=False)

    def forward(self, x: Tensor, state: None, step: Step) -> tuple[Tensor, None]:
        y = F.relu(self.norm1(self.conv1(x), step), inplace=True)
        y = F.relu(self.norm2(self.conv2(y), step), inplace=True)
        with without_autocast(x.device):
            return self.scores(global_average(y, torch.float32)), None


class RecurrentController(Controller):
    """Pooled features into an LSTM cell whose state lives through one module: Sec. 4, Fig. 2b."""

    def __init__(self, channels: int, components: int, *, iterations: int, sync: bool) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(channels, HIDDEN)
        self.scores = nn.Linear(HIDDEN, components)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None, step: Step
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        with without_autocast(x.device):
            state = self.cell(global_average(x, torch.float32), state)
            return self.scores(state[0]), state


CONTROLLERS: dict[str, type[ConvolutionalController] | type[RecurrentController]] = {
    "cnn": ConvolutionalController,
    "rnn": RecurrentController,
}
