"""Exponential moving average of the weights."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.models import Network


class WeightAverage:
    """Average of the parameters after each update; buffers are always the model's own."""

    def __init__(self, model: Network, decay: float) -> None:
        self._average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def update(self, model: Network) -> None:
        self._average.update_parameters(model)

    @torch.no_grad()
    def network(self, model: Network) -> Network:
        """The averaged network, with the model's present buffers."""
        averaged = cast(Network, self._average.module)
        for own, buffer in zip(averaged.buffers(), model.buffers(), strict=True):
            own.copy_(buffer)
        averaged.scorer = model.scorer
        return averaged

    def state_dict(self, model: Network) -> dict[str, Any]:
        return {
            "updates": self._average.n_averaged,
            "network": dict(self.network(model).state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average.n_averaged.copy_(state["updates"])
        self._average.module.load_state_dict(state["network"])
