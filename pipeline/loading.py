"""Processes that load large libraries, and how to start and end them quickly.

PyTorch, DeepSpeed and MLflow make a million objects while they are loaded, all of which stay.
Python's collector of garbage walks over them again and again: for a quarter of the time of a start,
and for most of the seconds that a process takes to end once its work is done.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Within, no garbage is collected.

    What is there at its end is never looked at again, unless all modules had been loaded before.
    """
    before = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        gc.enable()


def end_quickly() -> None:
    """Collect no garbage when this process ends."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
