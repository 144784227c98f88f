"""Signals that ask this process to stop: noted, so that training ends with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.signals import STOPS


class StopRequest:
    """A handler of signals that remembers whether one came."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def note() -> StopRequest:
    """Note the signals from now on, also for those that call this later in this process.

    To be called before modules are loaded that take long to load: Python drops a KeyboardInterrupt
    that is raised in a destructor, of which loading runs many.
    """
    installed = signal.getsignal(signal.SIGINT)
    if isinstance(installed, StopRequest):
        return installed
    request = StopRequest()
    for number in STOPS:
        signal.signal(number, request)
    return request


@contextmanager
def noted() -> Iterator[StopRequest]:
    """Note the signals in the block; what handled them before does so again after it."""
    before = {number: signal.getsignal(number) for number in STOPS}
    try:
        yield note()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def heed() -> bool:
    """Let noted signals end this process again; whether one was noted until now."""
    request = signal.getsignal(signal.SIGINT)
    if not isinstance(request, StopRequest):
        return False
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    return request.asked
