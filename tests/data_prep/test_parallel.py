"""Work in other processes: results with their places, and what ends it."""

import os
import signal

import pytest

from data_prep.parallel import run_parallel


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
