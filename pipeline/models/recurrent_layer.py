"""The recurrent convolutional layer of Liang and Hu (2015)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

ALPHA, BETA = 1e-3, 0.75  # of local response normalisation


class RecurrentLayer(nn.Module):
    """x_t = lrn(relu(W_f * u + W_r * x_{t-1} + b)), t = 0 .. recurrences, x_{-1} = 0.

    Local response normalisation divides by (1 + alpha / n sum x^2)^beta, the sum over the
    n = channels / 8 + 1 nearest channels: it keeps the states from growing.
    """

    def __init__(self, channels: int, *, recurrences: int) -> None:
        super().__init__()
        self.recurrences = recurrences
        self.neighbours = channels // 8 + 1
        self.feedforward = nn.Conv2d(channels, channels, 3, padding=1)
        self.recurrent = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        # A state is the sum of two convolutions, which would want half of He's variance each, and
        # the maxima and the dropout between the layers make states larger still. (Ours.)
        for conv in (self.feedforward, self.recurrent):
            nn.init.normal_(conv.weight, std=0.5 / (9 * channels) ** 0.5)

    def forward(self, u: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, channels, H, W): the last state."""
        driven = self.feedforward(u)
        x = self._state(driven)
        for _ in range(self.recurrences):
            x = self._state(driven + self.recurrent(x))
        return x

    def _state(self, z: Tensor) -> Tensor:
        return F.local_response_norm(F.relu(z), self.neighbours, ALPHA, BETA, k=1.0)
