"""What tracking costs a training step, whatever the server does.

    python -m benchmarks.tracking --data data/cifar10

One trainer, on batches held in memory and with a point of metrics for every step, tells in turn
nobody, a sqlite store, a server that is down, and one that takes connections and never answers.
Target: each at least 0.98 of the first. A machine may vary by more than that, so beside the median
stands the range that holds it with 95 % confidence, and beside both what the parts take: the time
that a step spends in telling, and that of a core in the sender, which is stopped while others are
measured and catches up in its rounds.
"""

from __future__ import annotations

import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import click
import psutil
from scipy.stats import quantile_test

from benchmarks.measure import Spread, alternate, machine
from benchmarks.trainer import WARM, Bench, NoSink, Watch, configuration
from data_prep.manifest import Manifest
from pipeline.distributed import World
from pipeline.tracking import Tracker
from pipeline.training.trainer import MetricSink

NOBODY = "no tracking"
STARTING_SECONDS = 10.0  # in which senders load MLflow and make a store


@dataclass
class Switch:
    """The trainer's sink, which hands on to the contestant whose round it is."""

    to: MetricSink = field(default_factory=NoSink)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.to.metrics(values, step)


@dataclass
class Tracked:
    """The trainer while one tracker is told of its steps, and no other's sender is at work."""

    switch: Switch
    measure: Callable[[], float]
    tracker: Tracker
    sender: psutil.Process
    points: int = 0
    telling_s: float = 0.0
    sending_s: float = 0.0

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        begun = time.perf_counter()
        self.tracker.metrics(values, step)
        self.telling_s += time.perf_counter() - begun
        self.points += 1

    def __call__(self) -> float:
        """One round, in images/s."""
        self.switch.to = self
        self.sender.resume()
        begun = cpu_seconds(self.sender)
        rate = self.measure()
        self.sending_s += cpu_seconds(self.sender) - begun
        self.sender.suspend()
        self.switch.to = NoSink()
        return rate

    def forget(self) -> None:
        """Count from here on."""
        self.points, self.telling_s, self.sending_s = 0, 0.0, 0.0

    def finish(self) -> None:
        self.sender.resume()
        self.tracker.finish("FINISHED", timeout=5)

    def parts(self, step_s: float) -> str:
        """What a step of so many seconds may lose."""
        telling, sending = (s / self.points / step_s for s in (self.telling_s, self.sending_s))
        return f"telling {telling:.2%} of a step, sender {sending:.2%} of a core"


def sender_of(run_dir: Path) -> psutil.Process:
    found = psutil.Process().children()
    (process,) = [process for process in found if str(run_dir) in process.cmdline()]
    return process


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@click.command(help=__doc__)
@click.option("--data", type=Path, required=True, help="A prepared shard set of 32x32 images.")
@click.option("--model", default="dr_resnet16", show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--steps", default=12, show_default=True, help="Timed steps per round.")
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(6))
def main(data: Path, model: str, batch_size: int, steps: int, rounds: int) -> None:
    before = machine()
    world = World.detect()
    world.start()
    config = configuration(data, f"drnn/cifar10/{model}", batch_size, "fp32", ["train.log_every=1"])
    with (
        tempfile.TemporaryDirectory() as name,
        socket.socket() as silent,
        socket.socket() as closed,
    ):
        folder = Path(name).resolve()
        for server in (silent, closed):
            server.bind(("127.0.0.1", 0))
        silent.listen(64)
        stores = {
            "sqlite": f"sqlite:///{folder / 'mlflow.db'}",
            "server down": f"http://127.0.0.1:{closed.getsockname()[1]}",
            "server silent": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        watch = Watch(WARM, steps, world.device)
        bench = Bench(config, world, Manifest.load(data), folder, watch)
        switch = Switch()
        measure = bench.trained("run", bench.in_memory(), switch)
        tracked = {}
        for what, uri in stores.items():
            tracker = Tracker(folder / what, run_name=what, experiment="benchmark", uri=uri)
            tracker.start()
            tracked[what] = Tracked(switch, measure, tracker, sender_of(folder / what))
        time.sleep(STARTING_SECONDS)
        alternate(tracked, 2)
        for one in tracked.values():
            one.forget()
        figures = alternate({NOBODY: measure, **tracked}, rounds)
        for one in tracked.values():
            one.finish()
    world.stop()
    print(f"{model}, batch {batch_size}, {steps} steps per round\n{before}")
    alone = figures[NOBODY]
    print(f"{NOBODY:14} {Spread.of(alone).text(0):>32} images/s")
    for what, one in tracked.items():
        ratios = [a / b for a, b in zip(figures[what], alone, strict=True)]
        low, high = quantile_test(ratios, q=1, p=0.5).confidence_interval(0.95)
        print(
            f"{what:14} {Spread.of(figures[what]).text(0):>32} images/s, "
            f"ratio {statistics.median(ratios):.3f} (95 %: {low:.3f} to {high:.3f}), "
            f"{one.parts(batch_size / statistics.median(alone))}"
        )


if __name__ == "__main__":
    main()
