"""The random states of one rank."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from pipeline.distributed import World


def seed_everything(seed: int, world: World) -> None:
    """Seed every generator of this rank, each rank differently."""
    own = int(np.random.SeedSequence([seed, world.rank]).generate_state(1)[0])
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)


class RandomStates:
    """States of torch's, numpy's and Python's generators."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def state_dict(self) -> dict[str, Any]:
        name, keys, position, has_gauss, gauss = np.random.get_state()
        version, internal, gauss_next = random.getstate()
        state: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "numpy": [name, [int(key) for key in keys], position, has_gauss, gauss],
            "python": [version, list(internal), gauss_next],
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        name, keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
        version, internal, gauss_next = state["python"]
        random.setstate((version, tuple(internal), gauss_next))
        if "cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
