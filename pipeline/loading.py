"""Processes that load large libraries, and how to start and end them quickly.

PyTorch, DeepSpeed and MLflow make a million objects while they are loaded, all of which stay.
Python's collector of garbage walks over them again and again: for a quarter of the time of a start,
and for most of the seconds that a process takes to end once its work is done.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Within, no garbage is collected; what is there at its end is never looked at again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def end_quickly() -> None:
    """Collect no garbage when this process ends."""
    atexit.register(gc.freeze)
