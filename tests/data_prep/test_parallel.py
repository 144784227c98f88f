"""Work in other processes: results with their places, and what ends it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.parallel import run_parallel
from tests.jobs.command import group, until

ROOT = Path(__file__).resolve().parents[2]


def square(number: int) -> int:
    return number * number


def killed(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_every_result_comes_with_the_place_of_its_task(workers: int) -> None:
    assert sorted(run_parallel(square, [5, 6, 7], workers)) == [(0, 25), (1, 36), (2, 49)]


def test_a_killed_worker_is_said_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"one of 2 worker processes was killed.*--workers"):
        list(run_parallel(killed, [1, 2, 3], 2))


def test_ctrl_c_reaches_the_parent_alone() -> None:
    # In a process of its own, where the first call also starts multiprocessing's resource tracker.
    code = """
import signal
from functools import partial
from data_prep.parallel import run_parallel
for _, blocked in run_parallel(partial(signal.pthread_sigmask, signal.SIG_BLOCK), [[], []], 2):
    print(signal.SIGINT in blocked)
print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "False"]


def slow(begun: Path) -> None:
    begun.touch()
    time.sleep(600)


def test_ctrl_c_pressed_twice_ends_all_at_once(tmp_path: Path) -> None:
    tasks = [tmp_path / "a", tmp_path / "b"]
    code = f"""
from pathlib import Path
from data_prep.parallel import run_parallel
from tests.data_prep.test_parallel import slow
list(run_parallel(slow, [Path({str(tasks[0])!r}), Path({str(tasks[1])!r})], 2))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        until(lambda: all(task.exists() for task in tasks), "both workers are at work")
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.1)
        process.communicate(timeout=60)
        until(lambda: not group(process.pid), "no worker is left")
    finally:
        for left in group(process.pid):
            left.kill()
        process.communicate()
