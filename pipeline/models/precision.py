"""Where a network keeps full precision whatever its own is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Within, operations keep the dtype of their inputs: decisions have no small errors."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # shapes alone are followed on "meta", which knows no autocast
