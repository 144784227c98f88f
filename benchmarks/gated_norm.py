"""What gates with their norms (I-LVBN) cost in training, over the same unrolled network without.

    python -m benchmarks.gated_norm

One contestant has gates and norms by groups of samples (dr_*), one has neither (r_*: every step
executed, ordinary batch norms); both compute every step in training. They alternate in one process.
"""

from __future__ import annotations

import click
import torch

from benchmarks.formats import contestant
from benchmarks.measure import Spread, alternate, machine, ratio
from benchmarks.trainer import WARM, Watch
from pipeline.distributed import World


@click.command(help=__doc__)
@click.option("--network", default="resnet16", show_default=True, help="With prefixes r_ and dr_.")
@click.option("--batch-size", default=256, show_default=True)
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16"]))
@click.option("--steps", default=6, show_default=True, help="Timed steps per round.")
@click.option("--rounds", default=9, show_default=True)
def main(network: str, batch_size: int, precision: str, steps: int, rounds: int) -> None:
    before = machine()
    watch = Watch(WARM, steps, World.detect().device)
    images, weights = torch.channels_last, torch.contiguous_format  # as the trainer has them
    gated, plain = f"dr_{network}", f"r_{network}"
    figures = alternate(
        {
            name: contestant(name, precision, images, weights, batch_size, watch)
            for name in (gated, plain)
        },
        rounds,
    )
    print(f"batch {batch_size}, {precision}, {steps} steps per round\n{before}")
    for name, values in figures.items():
        print(f"{name:16} {Spread.of(values).text(0):>28} images/s")
    print(f"step of {gated} over step of {plain}: {ratio(figures, plain, gated).text(3)}")


if __name__ == "__main__":
    main()
