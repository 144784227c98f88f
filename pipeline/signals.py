"""The signals that ask a process to stop, and how to start one that they do not reach."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

# Of a terminal, of whoever ends a job, and of the scheduler before it ends one.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


@contextmanager
def withheld() -> Iterator[None]:
    """Within, none of them reaches this thread; processes that it starts never get them.

    A terminal and a scheduler signal all processes, also those that only serve the one that decides
    how to stop.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
