"""CPU seconds and memory of the plan for a set of ImageNet's size, in a process of its own.

python -m benchmarks.planning
"""

from __future__ import annotations

import json
import subprocess
import sys

import click

from benchmarks.measure import ROOT, Spread, machine

PROGRAM = """
import json, resource, sys, tempfile, time
from pathlib import Path
from data_prep.items import Item, Items
from data_prep.plan import Plan, plan

entries = int(sys.argv[1])

def listed():
    for n in range(entries):
        wnid = f"n{n % 1000:08d}"
        origin = f"train/{wnid}/{wnid}_{n}.JPEG"
        yield Item("train", n % 1000, origin, 110_000 * n, 100_000 + n % 999)

started = time.process_time()
items = Items.of(listed())
listing = time.process_time()
digest = items.digest([]).hexdigest()
hashed = time.process_time()
made = plan(items, 0, shard_bytes=256 * 10**6)
planned = time.process_time()
with tempfile.TemporaryDirectory() as folder:
    made.save(Path(folder))
    saved = time.process_time()
    first = Plan.load(Path(folder)).of(made.shards[0])
print(json.dumps({
    "items in columns, s": listing - started,
    "hash of the listing, s": hashed - listing,
    "plan, s": planned - hashed,
    "plan to disk, s": saved - planned,
    "all, s": saved - started,
    "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "shards": len(made.shards),
}))
"""


@click.command(help=__doc__)
@click.option("--entries", default=1_300_000, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(entries: int, rounds: int) -> None:
    before = machine()
    command = [sys.executable, "-c", PROGRAM, str(entries)]
    figures: dict[str, list[float]] = {}
    for _ in range(rounds):
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        for name, value in json.loads(done.stdout).items():
            figures.setdefault(name, []).append(value)
    print(f"{entries:,} entries\n{before}")
    for name, values in figures.items():
        print(f"{name:24} {Spread.of(values).text(1)}")


if __name__ == "__main__":
    main()
