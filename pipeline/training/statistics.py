"""Running statistics of norms: a rank's own while training, averaged where they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distributed import World


class LocalStatistics:
    """The floating-point buffers of a model on this rank.

    Each rank keeps its own running statistics while it trains, so that saving or evaluating does
    not change what follows, bit by bit; `averaged` puts the mean over the ranks in their place for
    as long as it is needed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.buffers: dict[str, Tensor] = {
            name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()
        }

    @contextmanager
    def averaged(self, world: World) -> Iterator[None]:
        """Within, the buffers hold their mean over the ranks; after, this rank's own again."""
        if world.world_size == 1 or not self.buffers:
            yield
            return
        own = [buffer.clone() for buffer in self.buffers.values()]
        self.agree(world)
        try:
            yield
        finally:
            self._set(own)

    def agree(self, world: World) -> None:
        """Give every rank the mean over the ranks, for a phase in which they may be frozen.

        In double precision the mean of equal numbers is that number, for any number of ranks.
        """
        if world.world_size == 1 or not self.buffers:
            return
        buffers = list(self.buffers.values())
        total = world.sum(torch.cat([buffer.flatten().double() for buffer in buffers]))
        means = (total / world.world_size).split([buffer.numel() for buffer in buffers])
        self._set([mean.view_as(buffer) for mean, buffer in zip(means, buffers, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        return dict(self.buffers)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._set([state[name] for name in self.buffers])

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self.buffers.values(), values, strict=True):
            buffer.copy_(value)
