"""What precision and memory format are worth in training: the bare loop, with nothing else changed.

python -m benchmarks.formats
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import click
import torch

from benchmarks.measure import Spread, alternate, machine, ratio
from benchmarks.trainer import IN_MEMORY, WARM, Watch, bare_loop, configuration, network
from pipeline.data import Batch
from pipeline.distributed import World
from pipeline.training import optim

CLASSES, SIZE = 10, 32


def batches(size: int, memory_format: torch.memory_format, device: torch.device) -> list[Batch]:
    """Noise: neither precision nor layout takes longer for one image than for another."""
    torch.manual_seed(0)
    return [
        Batch(
            torch.randn(size, 3, SIZE, SIZE).to(device, memory_format=memory_format),
            torch.randint(CLASSES, (size,)).to(device),
            keys=(),
        )
        for _ in range(IN_MEMORY)
    ]


def contestant(
    model_name: str,
    precision: str,
    inputs: torch.memory_format,
    weights: torch.memory_format,
    batch_size: int,
    watch: Watch,
) -> Callable[[], float]:
    """One round of the bare loop, in images/s."""
    config = configuration(Path(), f"drnn/cifar10/{model_name}", batch_size, precision)
    model = network(config, CLASSES).to(watch.device, memory_format=weights)
    optimizer = optim.build(model, config.optimizer)
    held = batches(batch_size, inputs, watch.device)

    def measure() -> float:
        watch.start()
        some = itertools.islice(itertools.cycle(held), watch.warm + watch.steps)
        bare_loop(model, optimizer, some, config, watch.step)
        return watch.steps * batch_size / watch.seconds

    return measure


@click.command(help=__doc__)
@click.option("--model", default="dr_resnet16", show_default=True)
@click.option("--batch-size", default=256, show_default=True)
@click.option("--steps", default=6, show_default=True, help="Timed steps per round.")
@click.option("--rounds", default=7, show_default=True)
def main(model: str, batch_size: int, steps: int, rounds: int) -> None:
    before = machine()
    watch = Watch(WARM, steps, World.detect().device)
    last, first = torch.channels_last, torch.contiguous_format
    layouts = {"channels_last images": (last, first), "channels_last": (last, last)}
    layouts = {"contiguous": (first, first), **layouts}
    figures = alternate(
        {
            f"{precision}, {name}": contestant(model, precision, inputs, weights, batch_size, watch)
            for precision in ("fp32", "bf16")
            for name, (inputs, weights) in layouts.items()
        },
        rounds,
    )
    print(f"{model}, batch {batch_size}, {steps} steps per round\n{before}")
    reference = "fp32, channels_last images"  # as the trainer trains by default
    for name, values in figures.items():
        compared = ratio(figures, name, reference).text(2)
        print(f"{name:28} {Spread.of(values).text(0):>28} images/s, to {reference} {compared}")


if __name__ == "__main__":
    main()
