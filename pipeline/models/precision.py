"""Where a network keeps full precision whatever its own is."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Within, operations keep the dtype of their inputs: decisions have no small errors."""
    return torch.autocast(device.type, enabled=False)
