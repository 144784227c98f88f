"""DRNN's gate: each sample decides for itself, from its own features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.norms import BatchNorm
from pipeline.models.pooling import global_average
from pipeline.models.precision import without_autocast
from pipeline.models.routers.base import Router

INITIAL_RATE = 0.85
HIDDEN = 16
SKIP, EXECUTE = 0, 1


class Gate(Router):
    """Global average pooling and two linear layers score `skip` and `execute`: DRNN Fig. 4, Eq. 8.

    In training the decision is drawn by the straight-through Gumbel softmax: hard forward, softmax
    backward (Eq. 9 and 10). In evaluation it is the larger score, without noise. Scores are float32
    whatever the precision of the network, because a decision has no small errors.

    Args:
        target: t of Eq. 12.
        hidden: width of the first linear layer (d of Sec. 3.3); None leaves it out, as
            DR-MobileNetV2 does (Sec. 4.2).
        norm: of the first layer's output; None in DRNN. Veit and Belongie, Convolutional networks
            with adaptive inference graphs (2018), Sec. 3.2, have one.

    Raises:
        ValueError: target is not in (0, 1].
    """

    decides = True

    def __init__(
        self,
        channels: int,
        *,
        target: float,
        hidden: int | None = HIDDEN,
        norm: BatchNorm | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(target, int | float) or not 0 < target <= 1:
            raise ValueError(
                f"target_rate={target!r} is not in (0, 1]: give the rate of samples that should "
                "execute a step, such as 0.7"
            )
        self.target = target
        self.hidden = nn.Linear(channels, hidden) if hidden else None
        self.norm = norm
        self.scores = nn.Linear(hidden or channels, 2)
        # Nearly constant scores at first, so that the rate before training is INITIAL_RATE.
        nn.init.normal_(self.scores.weight, std=0.01)
        nn.init.zeros_(self.scores.bias)
        with torch.no_grad():
            self.scores.bias[EXECUTE] = math.log(INITIAL_RATE / (1 - INITIAL_RATE))

    def forward(self, x: Tensor, index: int = 0) -> Tensor:
        """(N, C, H, W) -> decision (N,), exactly 0 or 1."""
        with without_autocast(x.device):
            features = global_average(x, torch.float32)
            if self.hidden is not None:
                features = self.hidden(features)
                if self.norm is not None:
                    features = self.norm(features[:, :, None, None]).flatten(1)
                features = F.relu(features)
            scores = self.scores(features)  # Eq. 8
            if self.training:
                scores = scores - torch.empty_like(scores).exponential_().log()  # Eq. 9: s_k + G_k
            soft = scores.softmax(1)[:, EXECUTE]
            hard = (scores.argmax(1) == EXECUTE).float()
            # Eq. 10. The bracket is exactly zero forward; F.gumbel_softmax leaves rounding errors.
            decision: Tensor = hard + (soft - soft.detach())
            return decision
