"""What tracking costs a training step, whatever the server does.

    python -m benchmarks.tracking --data data/cifar10

Four contestants alternate in one process, on batches held in memory and with a point of metrics for
every step: without tracking, with a sqlite store, with a server that is down, and with one that
takes connections and never answers. Target: each at least 0.98 of the first. Beside the median
stands the range that holds it with 95 % confidence: a machine may vary by more than the target.
"""

from __future__ import annotations

import socket
import statistics
import tempfile
from pathlib import Path

import click
from scipy.stats import quantile_test

from benchmarks.measure import Spread, alternate, machine
from benchmarks.trainer import WARM, Bench, Watch, configuration
from data_prep.manifest import Manifest
from pipeline.distributed import World
from pipeline.tracking import Tracker


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
    config = configuration(data, model, batch_size, "fp32", ["train.log_every=1"])
    with (
        tempfile.TemporaryDirectory() as name,
        socket.socket() as silent,
        socket.socket() as closed,
    ):
        folder = Path(name)
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
        memory = bench.in_memory()
        contestants = {"no tracking": bench.trained("none", memory)}
        trackers = []
        for what, uri in stores.items():
            tracker = Tracker(folder / what, run_name=what, experiment="benchmark", uri=uri)
            tracker.start()
            trackers.append(tracker)
            contestants[what] = bench.trained(what, memory, tracker)
        figures = alternate(contestants, rounds)
        for tracker in trackers:
            tracker.finish("FINISHED", timeout=5)
    world.stop()
    print(f"{model}, batch {batch_size}, {steps} steps per round\n{before}")
    for what, values in figures.items():
        ratios = [a / b for a, b in zip(values, figures["no tracking"], strict=True)]
        low, high = quantile_test(ratios, q=1, p=0.5).confidence_interval(0.95)
        compared = f"{statistics.median(ratios):.3f} (95 %: {low:.3f} to {high:.3f})"
        print(f"{what:14} {Spread.of(values).text(0):>32} images/s, ratio {compared}")


if __name__ == "__main__":
    main()
