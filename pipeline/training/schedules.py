"""Schedules, pure functions of the optimizer step: one factor for all learning rates, the pull."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from pipeline.config import Pull, Schedule

# Fractions of the peak at both ends of one-cycle; the values of Smith & Topin (2018) as torch has.
ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = 1 / 25e4


def factor(schedule: Schedule, steps_per_epoch: int, total: int) -> Callable[[int], float]:
    """Function of the optimizer step (from 0, of `total`) that gives the factor on every base rate.

    The value belongs to the update made at that step: step 0 is the first update.
    """
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    shape = _SHAPES[schedule.name](schedule, steps_per_epoch, warmup, total)

    def at(step: int) -> float:
        # The first warm-up step already moves: (step + 1) / warmup, as Goyal et al. (2017).
        if step < warmup:
            return (step + 1) / warmup
        return shape(min(step, total))

    return at


def pull(config: Pull, total: int) -> Callable[[int], float]:
    """Function of the optimizer step (from 0 to total - 1) that gives the weight of the pull."""
    shares, weights = np.array(config.points).T

    def at(step: int) -> float:
        share = step / max(1, total - 1)
        match config.between:
            case "exponential":
                return float(np.exp(np.interp(share, shares, np.log(weights))))
            case "linear":
                return float(np.interp(share, shares, weights))
            case "steps":
                return float(weights[max(0, np.searchsorted(shares, share, side="right") - 1)])

    return at


def _constant(schedule: Schedule, per_epoch: int, start: int, total: int) -> Callable[[int], float]:
    return lambda step: 1.0


def _step(schedule: Schedule, per_epoch: int, start: int, total: int) -> Callable[[int], float]:
    edges = [round(milestone * per_epoch) for milestone in schedule.milestones]
    return lambda step: schedule.gamma ** sum(step >= edge for edge in edges)


def _staircase(
    schedule: Schedule, per_epoch: int, start: int, total: int
) -> Callable[[int], float]:
    every = schedule.every_steps
    assert every is not None
    return lambda step: float(schedule.gamma ** (step // every))


def _cosine(schedule: Schedule, per_epoch: int, start: int, total: int) -> Callable[[int], float]:
    return lambda step: _anneal(1.0, 0.0, (step - start) / max(1, total - start))


def _one_cycle(
    schedule: Schedule, per_epoch: int, start: int, total: int
) -> Callable[[int], float]:
    peak = max(1, round(schedule.peak * total))

    def at(step: int) -> float:
        if step <= peak:
            return _anneal(ONE_CYCLE_START, 1.0, step / peak)
        return _anneal(1.0, ONE_CYCLE_END, (step - peak) / max(1, total - 1 - peak))

    return at


def _anneal(start: float, end: float, progress: float) -> float:
    """Half a cosine from start to end; progress in 0..1."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


_SHAPES = {
    "constant": _constant,
    "step": _step,
    "staircase": _staircase,
    "cosine": _cosine,
    "one_cycle": _one_cycle,
}
