"""Work spread over processes that end with the one that started them."""

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

# One process loads what workers need, and they fork from it: on many cores, or from a file system
# that all nodes share, loading it in each takes longer than packing a shard.
_WORKERS = multiprocessing.get_context("forkserver")


def available_cores() -> int:
    """The cores this process may use, which on a cluster are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def expect_parallel(module: str) -> None:
    """Start to load ``module`` for workers to come, while the caller goes on."""
    # Ctrl-C reaches the whole foreground group; the parent alone decides how to end. What it starts
    # here, and what that forks, inherits the mask. The tracker would lift it in passing.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        _WORKERS.set_forkserver_preload([module])
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_parallel(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int | None
) -> Iterator[tuple[int, Result]]:
    """Yield (position of the task, its result) as results come in; ``workers=None``: all cores.

    The first exception of a task ends all and is raised here. One worker works in this process.

    Raises:
        ValueError: a worker was killed.
    """
    workers = min(available_cores() if workers is None else workers, len(tasks))
    if workers <= 1:
        yield from ((position, function(task)) for position, task in enumerate(tasks))
        return
    expect_parallel(function.__module__)
    pool = ProcessPoolExecutor(workers, mp_context=_WORKERS, initializer=_start_worker)
    try:
        positions = {pool.submit(function, task): n for n, task in enumerate(tasks)}
        for future in as_completed(positions):
            yield positions[future], future.result()
    except BrokenProcessPool:
        raise ValueError(
            f"one of {workers} worker processes was killed, most likely for want of memory: call "
            "it again with fewer (--workers)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
