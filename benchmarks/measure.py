"""Shared by the benchmarks: alternating rounds, medians with spread, the machine in words."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "deepspeed", "nvidia-dali-cuda130", "webdataset", "pillow")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `n` values."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    def text(self, decimals: int) -> str:
        median, low, high = (f"{v:,.{decimals}f}" for v in (self.median, self.low, self.high))
        return f"{median} ({low} to {high}, n={self.n})"


Rounds = dict[str, list[float]]


def alternate(contestants: Mapping[str, Callable[[], float]], rounds: int) -> Rounds:
    """Measure each contestant once per round, in turn: other load on the machine hits all alike.

    Every other round goes backwards, or one contestant would always find what the same other one
    leaves: memory that was just in use, say, or that the host has taken back.
    """
    figures: Rounds = {name: [] for name in contestants}
    for number in range(rounds):
        turn = list(contestants.items())
        for name, measure in turn[::-1] if number % 2 else turn:
            figures[name].append(measure())
        latest = ", ".join(f"{name} {values[-1]:,.1f}" for name, values in figures.items())
        print(f"round {number + 1} of {rounds}: {latest}", file=sys.stderr, flush=True)
    return figures


def ratio(figures: Rounds, name: str, to: str) -> Spread:
    """Of two contestants, round by round."""
    return Spread.of([a / b for a, b in zip(figures[name], figures[to], strict=True)])


def now(device: torch.device) -> float:
    """Seconds on a clock, when all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine() -> str:
    """Hardware, versions, commit and load, without which a figure means nothing."""
    cores = sorted(os.sched_getaffinity(0))
    lines = [
        f"cpu: {_cpu()}, {len(cores)} cores used of {os.cpu_count()}, "
        f"{torch.get_num_threads()} torch threads, load {os.getloadavg()[0]:.2f} before",
        f"python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        f"commit: {_commit()}",
    ]
    if torch.cuda.is_available():
        lines.insert(1, f"gpu: {torch.cuda.get_device_name()}")
    return "\n".join(lines)


def _cpu() -> str:
    """Model name and family: some hosts hide the model but not the generation."""
    cpuinfo = Path("/proc/cpuinfo")
    facts: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    if "model name" not in facts:
        return platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family', '?')})"


def _commit() -> str:
    """The commit whose code ran; `+changes` where the code is not that commit's."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    code = ["benchmarks", "data_prep", "jobs", "pipeline"]
    status = [*git, "status", "--porcelain", "--", *code]
    changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    return head.stdout.strip() + ("+changes" if changed else "")
