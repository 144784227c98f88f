"""Preparation and loading of ImageNet's photographs beside what others do, in one run each.

    python -m benchmarks.imagenet trust --images imagenet-sample.tar
    python -m benchmarks.imagenet check --images imagenet-sample.tar
    python -m benchmarks.imagenet resize --images imagenet-sample.tar --streaming PYTHON
    python -m benchmarks.imagenet loading --images imagenet-sample.tar --streaming PYTHON
    python -m benchmarks.imagenet cost --images imagenet-sample.tar

The photographs in a tar stand for ImageNet, so many times over; they lie in an archive of class
archives. PYTHON is that of an environment with mosaicml-streaming, torch and torchvision, made with
`python -m venv streaming && streaming/bin/pip install mosaicml-streaming`.
"""

from __future__ import annotations

import io
import itertools
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import streaming_peer
from benchmarks.imagenet_loaders import (
    BATCH,
    bare_crop,
    crop_share,
    loaded,
    loading_cost,
    our_loader,
    pillow_loader,
    webdataset_loader,
)
from benchmarks.measure import Rounds, Spread, alternate, machine, ratio
from data_prep.images import AS_FOUND, Treatment
from data_prep.pack import PackShard, PackShards, Work
from data_prep.parallel import available_cores, run_parallel
from data_prep.plan import plan
from data_prep.prepare import prepare
from data_prep.sources.imagenet import TRAIN_ARCHIVE, ImageNetSource
from pipeline.training.engine import keep_freed_memory

RESIZED = ("--resize-short", str(streaming_peer.SHORT), "--quality", str(streaming_peer.QUALITY))


@contextmanager
def nested(images: Path, copies: int, work: Path | None) -> Iterator[Path]:
    """A folder with the photographs in ten class archives within one archive."""
    encoded = streaming_peer.encoded(str(images))
    with tempfile.TemporaryDirectory(dir=work) as folder:
        root = Path(folder) / "imagenet"
        root.mkdir()
        with tarfile.open(root / TRAIN_ARCHIVE, "w") as outer:
            for label in range(10):
                wnid = f"n{label:08d}"
                buffer = io.BytesIO()
                with tarfile.open(fileobj=buffer, mode="w") as inner:
                    for number in range(label, copies * len(encoded), 10):
                        data = encoded[number % len(encoded)]
                        add(inner, f"{wnid}_{number}.JPEG", data)
                add(outer, f"{wnid}.tar", buffer.getvalue())
        yield root


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def ours(root: Path, *options: str) -> float:
    """Seconds of `reprise prep`, from the start of the command to its end."""
    out = root.parent / "set"
    started = time.perf_counter()
    prep(root, out, *options)
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return seconds


def prep(root: Path, out: Path, *options: str) -> None:
    """Prepare in a process of its own: spawned workers would load what this module loads."""
    command = [Path(sys.executable).parent / "reprise", "prep", "imagenet", "--source", root]
    command += ["--out", out, "--allow-partial", "--quiet", *options]
    subprocess.run(command, check=True, capture_output=True)


def copied(root: Path, sync: bool) -> float:
    """Seconds of `cp`, with the bytes on the disk at the end or only in memory."""
    started = time.perf_counter()
    subprocess.run(["cp", root / TRAIN_ARCHIVE, root.parent / "copy"], check=True)
    if sync:
        subprocess.run(["sync", root.parent / "copy"], check=True)
    seconds = time.perf_counter() - started
    (root.parent / "copy").unlink()
    return seconds


def shard_writer(root: Path) -> float:
    """Seconds of webdataset's writer, fed by tarfile."""
    import webdataset as wds

    out = root.parent / "wds"
    out.mkdir()
    started = time.perf_counter()
    with (
        wds.ShardWriter(str(out / "train-%06d.tar"), maxcount=2048, verbose=0) as sink,
        tarfile.open(root / TRAIN_ARCHIVE) as outer,
    ):
        for label, member in enumerate(outer):
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                for image in inner:
                    data = inner.extractfile(image).read()
                    sink.write({"__key__": image.name[:-5], "jpg": data, "cls": label})
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return seconds


def decode_share(task: tuple[str, str, int]) -> float:
    """CPU seconds in which one process decodes so many images that are in memory."""
    decoder, images, count = task
    encoded = streaming_peer.encoded(images)
    decode: Callable[[Any], object]
    if decoder == "simplejpeg":
        import simplejpeg

        decode = partial(simplejpeg.decode_jpeg, colorspace="RGB")
    else:
        from torchvision.io import ImageReadMode, decode_jpeg

        torch.set_num_threads(1)
        encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in encoded]
        decode = partial(decode_jpeg, mode=ImageReadMode.RGB)
    for data in encoded[:20]:
        decode(data)
    started = time.process_time()
    for data in itertools.islice(itertools.cycle(encoded), count):
        decode(data)
    return time.process_time() - started


def bare_decode(decoder: str, images: Path, count: int) -> float:
    """Images per CPU second, all cores at work."""
    cores = available_cores()
    tasks = [(decoder, str(images), count // cores)] * cores
    return cores * (count // cores) / sum(s for _, s in run_parallel(decode_share, tasks, cores))


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process and of those it waits for: what other work does not change."""
    before = sum(os.times()[:4])
    work()
    return sum(os.times()[:4]) - before


def peer(python: Path, *arguments: object) -> float:
    command = [str(python), streaming_peer.__file__, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def peer_writes(python: Path, images: Path, copies: int, folder: Path) -> float:
    shutil.rmtree(folder / "mds", ignore_errors=True)
    return peer(python, "write", images, copies, available_cores(), folder / "mds")


def show(figures: Rounds, unit: str, to: tuple[str, ...], decimals: int = 0) -> None:
    for name, values in figures.items():
        compared = "; ".join(f"to {other} {ratio(figures, name, other).text(2)}" for other in to)
        print(f"{name:26} {Spread.of(values).text(decimals):>30} {unit}, {compared}")


IMAGES = click.option("--images", type=Path, required=True, help="A tar of photographs.")
WORK = click.option("--work", type=Path, help="Folder on the disk to work on.")
STREAMING = click.option("--streaming", type=Path, required=True, help="Python with streaming.")


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@IMAGES
@WORK
@click.option("--copies", default=20, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def trust(images: Path, work: Path | None, copies: int, rounds: int) -> None:
    """Unchanged bytes, not decoded, beside cp and webdataset's ShardWriter."""
    before = machine()
    with nested(images, copies, work) as root:
        size = (root / TRAIN_ARCHIVE).stat().st_size / 1e6
        contestants = {
            "cp": lambda: size / copied(root, sync=False),
            "cp, synced": lambda: size / copied(root, sync=True),
            "prep --trust": lambda: size / ours(root, "--trust"),
            "prep --trust --workers 1": lambda: size / ours(root, "--trust", "--workers", "1"),
            "ShardWriter": lambda: size / shard_writer(root),
        }
        figures = alternate(contestants, rounds)
        cpu = {
            "cp": lambda: size / cpu_seconds(lambda: copied(root, sync=False)),
            "prep --trust": lambda: size / cpu_seconds(lambda: ours(root, "--trust")),
            "ShardWriter": lambda: size / cpu_seconds(lambda: shard_writer(root)),
        }
        per_cpu = alternate(cpu, rounds)
    print(f"{size:,.0f} MB\n{before}")
    show(figures, "MB/s", ("cp", "cp, synced", "ShardWriter"))
    show(per_cpu, "MB per CPU second", ("cp", "ShardWriter"))


@main.command()
@IMAGES
@WORK
@click.option("--copies", default=8, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def check(images: Path, work: Path | None, copies: int, rounds: int) -> None:
    """Unchanged bytes, decoded, beside bare decoders on all cores, per CPU second."""
    before = machine()
    count = copies * len(streaming_peer.encoded(str(images)))
    with nested(images, copies, work) as root:
        contestants = {
            "simplejpeg alone": lambda: bare_decode("simplejpeg", images, count),
            "torchvision alone": lambda: bare_decode("torchvision", images, count),
            "prep": lambda: count / cpu_seconds(lambda: ours(root)),
        }
        figures = alternate(contestants, rounds)
    print(f"{count:,} images\n{before}")
    show(figures, "images per CPU second", ("simplejpeg alone", "torchvision alone"))


@main.command()
@IMAGES
@WORK
@STREAMING
@click.option("--copies", default=4, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def resize(images: Path, work: Path | None, streaming: Path, copies: int, rounds: int) -> None:
    """Resized to 256 at quality 90, beside MDSWriter doing the same."""
    before = machine()
    count = copies * len(streaming_peer.encoded(str(images)))
    with nested(images, copies, work) as root:
        contestants = {
            "prep --resize-short 256": lambda: count / ours(root, *RESIZED),
            "MDSWriter": lambda: peer_writes(streaming, images, copies, root.parent),
        }
        figures = alternate(contestants, rounds)
    print(f"{count:,} images\n{before}")
    show(figures, "images/s", ("MDSWriter",))


@main.command()
@IMAGES
@WORK
@STREAMING
@click.option("--cores", default=2, show_default=True)
@click.option("--batches", default=12, show_default=True, help="Of 64 images, per round.")
@click.option("--rounds", default=5, show_default=True)
def loading(
    images: Path, work: Path | None, streaming: Path, cores: int, batches: int, rounds: int
) -> None:
    """Random resized crops of 224 pixels, from unchanged and from resized shards."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(cores)
    keep_freed_memory()  # as training does; for all in this process
    before = machine()
    with nested(images, 1, work) as root:
        sets = {name: root.parent / name for name in ("unchanged", "resized")}
        prep(root, sets["unchanged"], "--samples-per-shard", "128")
        prep(root, sets["resized"], "--samples-per-shard", "128", *RESIZED)
        peer_writes(streaming, images, 1, root.parent)
        sources = {
            "dali reader": partial(our_loader, sets["unchanged"], "dali", cores),
            "torch reader": partial(our_loader, sets["unchanged"], "torch", cores),
            "dali reader, resized": partial(our_loader, sets["resized"], "dali", cores),
            "torch reader, resized": partial(our_loader, sets["resized"], "torch", cores),
            "DataLoader with Pillow": partial(pillow_loader, images, cores),
            "webdataset with Pillow": partial(webdataset_loader, sets["unchanged"], cores),
        }
        contestants = {
            "bare decode and crop": lambda: bare_crop(images, batches * BATCH, cores),
            **{name: partial(loaded, source, batches) for name, source in sources.items()},
            "streaming, resized": lambda: peer(
                streaming, "read", root.parent / "mds", cores, batches
            ),
        }
        figures = alternate(contestants, rounds)
    print(f"batch {BATCH}, {batches} batches per round, {cores} cores\n{before}")
    show(figures, "images/s", ("bare decode and crop", "dali reader"))


def packing(root: Path, treatment: Treatment) -> float:
    """CPU seconds of packing alone, in this process: no listing, no plan, no card."""
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        work = Work(Path(folder))
        for place in (work.plan, work.set, work.records):
            place.mkdir()
        listing = ImageNetSource(root, allow_partial=True).open(work.root)
        made = plan(listing.items, 0, samples_per_shard=2048)
        made.save(work.plan)
        pack = PackShard(work, listing.reader, len(listing.classes), treatment)
        return cpu_seconds(PackShards(pack, 0, len(made.shards), workers=1))


def pillow_resizes(images: Path) -> None:
    for data in streaming_peer.encoded(str(images)):
        streaming_peer.resized(data)


@main.command()
@IMAGES
@WORK
@click.option("--batches", default=4, show_default=True, help="Of 64 images, per round.")
@click.option("--rounds", default=3, show_default=True)
def cost(images: Path, work: Path | None, batches: int, rounds: int) -> None:
    """Images per CPU second of every part in one process: what busy cores do not change."""
    logging.disable(logging.WARNING)
    before = machine()
    count = len(streaming_peer.encoded(str(images)))
    resized = Treatment(resize_short=streaming_peer.SHORT, quality=streaming_peer.QUALITY)
    with nested(images, 1, work) as root:
        sets = {"unchanged": AS_FOUND, "resized": resized}
        for name, treatment in sets.items():
            source = ImageNetSource(root, allow_partial=True)
            prepare(source, root.parent / name, treatment=treatment, workers=1)
        preparation = {
            "cp": lambda: cpu_seconds(lambda: copied(root, sync=False)),
            "packing, --trust": lambda: packing(root, Treatment(trust=True)),
            "ShardWriter": lambda: cpu_seconds(lambda: shard_writer(root)),
            "simplejpeg alone": lambda: decode_share(("simplejpeg", str(images), count)),
            "torchvision alone": lambda: decode_share(("torchvision", str(images), count)),
            "packing": lambda: packing(root, AS_FOUND),
            "packing, resized": lambda: packing(root, resized),
            "Pillow resizes, no writer": lambda: cpu_seconds(lambda: pillow_resizes(images)),
        }
        figures = alternate(
            {name: partial(_rate, run, count) for name, run in preparation.items()}, rounds
        )
        keep_freed_memory()  # as training does; for all in this process
        loaders = {
            f"{reader} reader, {name}": partial(our_loader, root.parent / name, reader, 0)
            for name in sets
            for reader in ("dali", "torch")
        }
        loaders["Pillow"] = partial(pillow_loader, images, 0)
        loaders["webdataset with Pillow"] = partial(webdataset_loader, root.parent / "unchanged", 0)
        contestants = {name: partial(loading_cost, run, batches) for name, run in loaders.items()}
        contestants["decode and crop alone"] = lambda: count / crop_share((str(images), count))
        loading = alternate(contestants, rounds)
    print(f"{count:,} images\n{before}")
    show(figures, "images", ("cp", "ShardWriter", "simplejpeg alone", "Pillow resizes, no writer"))
    show(loading, "images", ("dali reader, unchanged", "torch reader, unchanged"))


def _rate(run: Callable[[], float], count: int) -> float:
    return count / run()


if __name__ == "__main__":
    main()
