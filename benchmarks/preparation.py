"""Seconds that `reprise prep cifar` takes, from the start of the command to its end.

python -m benchmarks.preparation --source cifar10-jpeg.tar.gz
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from benchmarks.measure import Spread, alternate, machine
from data_prep.manifest import Manifest


@click.command(help=__doc__)
@click.option("--source", type=Path, required=True, help="CIFAR-10 as JPEGs in class folders.")
@click.option("--rounds", default=3, show_default=True)
def main(source: Path, rounds: int) -> None:
    before = machine()
    images = 0
    reprise = Path(sys.executable).parent / "reprise"

    def prepare() -> float:
        nonlocal images
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "shards"
            command = [reprise, "prep", "cifar", "--source", source, "--out", out, "--quiet"]
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - started
            images = sum(split.samples for split in Manifest.load(out).splits.values())
        return seconds

    seconds = alternate({"seconds": prepare}, rounds)["seconds"]
    print(f"reprise prep cifar --source {source.name}: {images:,} images\n{before}")
    rates = [images / value for value in seconds]
    print(f"{Spread.of(seconds).text(1)} s, {Spread.of(rates).text(0)} images/s")


if __name__ == "__main__":
    main()
