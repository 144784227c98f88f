"""Work spread over processes that end with the one that started them."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def available_cores() -> int:
    """The cores this process may use, which on a cluster are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_parallel(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int | None
) -> Iterator[tuple[int, Result]]:
    """Yield (position of the task, its result) as results come in; ``workers=None``: all cores.

    The first exception of a task ends all and is raised here. What a worker is at is waited for
    then, but not after Ctrl-C or where the caller asks no further. One worker works in this
    process.

    Raises:
        ValueError: a worker was killed.
    """
    workers = min(available_cores() if workers is None else workers, len(tasks))
    if workers <= 1:
        yield from ((position, function(task)) for position, task in enumerate(tasks))
        return
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        with _interrupts_postponed():
            positions = {pool.submit(function, task): n for n, task in enumerate(tasks)}
        for future in as_completed(positions):
            yield positions[future], future.result()
    except BrokenProcessPool:
        raise ValueError(
            f"one of {workers} worker processes was killed, most likely for want of memory: call "
            "it again with fewer (--workers)"
        ) from None
    except (KeyboardInterrupt, GeneratorExit):  # here, or where results are used
        # A second Ctrl-C while a worker is waited for would leave it waiting for work, and this
        # process for its end.
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_postponed() -> Iterator[None]:
    """Ctrl-C within is heard at the end, and never reaches the workers that are started.

    It reaches the whole foreground group, and the parent alone decides how to end. A mask is what
    workers inherit from the start; it does not keep the signal from this process's other threads,
    upon which Python would raise it here, between a worker's start and what it is sent to begin.
    """
    came: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    heard_here = threading.current_thread() is threading.main_thread() and callable(handler)
    if heard_here:
        signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if heard_here:
            signal.signal(signal.SIGINT, handler)
    if came and callable(handler):
        handler(signal.SIGINT, None)


def _start_worker() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
