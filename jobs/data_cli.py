"""The commands of `reprise` that make shard sets and look after them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import click

from jobs.errors import Exit
from jobs.options import ANY_PATH, FOLDER, QUIET

if TYPE_CHECKING:
    from data_prep.images import Treatment
    from jobs.shard_array import ShardArray


def _bytes(_: click.Context, option: click.Parameter, text: str | None) -> int | None:
    """`256MB` as 256,000,000."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(MB|GB)", text)
    if match is None or not int(match[1]):
        raise click.BadParameter(f"{text!r} is no size: give such as 256MB or 1GB")
    return int(match[1]) * {"MB": 10**6, "GB": 10**9}[match[2]]


@click.command()
@click.argument(
    "source_kind",
    metavar="KIND",
    type=click.Choice(["digits", "folder", "cifar", "cifar10.1", "bsd", "imagenet"]),
)
@click.option("--source", type=ANY_PATH, help="File or folder with the images; digits needs none.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the shards.")
@click.option("--seed", default=0, show_default=True, help="Of the global shuffle.")
@click.option("--samples-per-shard", type=click.IntRange(1), help="At most; default: 2048.")
@click.option("--shard-size", callback=_bytes, metavar="SIZE", help="At most, such as 256MB.")
@click.option("--resize-short", type=click.IntRange(8), help="Scale larger images down to this.")
@click.option("--quality", type=click.IntRange(1, 100), help="Of resized JPEGs; default: 90.")
@click.option("--trust", is_flag=True, help="Do not decode JPEGs; keep their bytes.")
@click.option("--allow-partial", is_flag=True, help="imagenet: whatever of it is there.")
@click.option("--estimate", is_flag=True, help="Say size and time from a sample; write nothing.")
@click.option("--workers", type=click.IntRange(1), help="Processes; default: one per core.")
@click.option("--cluster", metavar="NAME", help="Pack as --workers jobs of a cluster instead.")
@click.option("--time", default="12h", show_default=True, help="Limit of each job, such as 90m.")
@QUIET
def prep(
    source_kind: str,
    source: Path | None,
    out: Path,
    seed: int,
    samples_per_shard: int | None,
    shard_size: int | None,
    resize_short: int | None,
    quality: int | None,
    trust: bool,
    allow_partial: bool,
    estimate: bool,
    workers: int | None,
    cluster: str | None,
    time: str,
    quiet: bool,
) -> None:
    """Prepare images as WebDataset shards with DALI indices and a manifest.

    KIND is digits (scikit-learn's handwritten digits), folder (class folders below train/ and
    val/ or test/, or a tar of them), cifar (the original python batches, or class folders),
    cifar10.1 (the folder of its two arrays, a second test set), bsd (the Berkeley images for
    denoising, in DnCNN's folders train400/, test68/ and test12/) or imagenet (a folder with the
    archives of ILSVRC 2012 and its development kit, or with class folders train/ and val/). The
    same command goes on after an interruption.

    With --cluster, this lists the images, queues an array of --workers jobs that pack the shards,
    waits for them and makes a set of them, with the same bytes as without.
    """
    from data_prep.prepare import SAMPLES_PER_SHARD, prepare
    from data_prep.sources import open_source
    from jobs import console, describe

    _refuse_both("--samples-per-shard", samples_per_shard, "--shard-size", shard_size)
    _refuse_both("--estimate", estimate, "--cluster", cluster)
    treatment = _treatment(trust, resize_short, quality)
    opened = open_source(source_kind, source, allow_partial)
    console.configure(quiet)
    array = cluster and _array(cluster, time, workers, out, *([source] if source else []))
    if estimate:
        from data_prep.estimate import estimate as measure

        click.echo(describe.estimated(measure(opened, treatment, workers), out))
        return
    started = monotonic()
    with _interrupted_kindly(), console.preparation(f"preparing {out}", quiet) as report:
        manifest = prepare(
            opened,
            out,
            seed=seed,
            samples_per_shard=samples_per_shard or SAMPLES_PER_SHARD,
            shard_bytes=shard_size,
            treatment=treatment,
            workers=None if array else workers,
            progress=report,
            **({"pack": array} if array else {}),
        )
    click.echo(describe.prepared(manifest, monotonic() - started))


def _treatment(trust: bool, resize_short: int | None, quality: int | None) -> Treatment:
    from data_prep.images import Treatment

    _refuse_both("--trust", trust, "--resize-short", resize_short)
    if quality is not None and resize_short is None:
        raise click.UsageError("--quality is of resized images: give --resize-short too")
    return Treatment(trust, resize_short, 90 if quality is None else quality)


@contextmanager
def _interrupted_kindly() -> Iterator[None]:
    """Ctrl-C within ends the command, and says what to do then."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("interrupted; the same command goes on from here", err=True)
        raise click.exceptions.Exit(Exit.INTERRUPTED) from None


def _array(cluster: str, time: str, jobs: int | None, *paths: Path) -> ShardArray:
    """The jobs that are to pack, found to be what the cluster takes."""
    from jobs import clusters
    from jobs.shard_array import ShardArray
    from jobs.submit import Request

    if jobs is None:
        raise click.UsageError("--cluster needs a number of jobs: give --workers too")
    request = Request(clusters.load(cluster), 1, 0, clusters.minutes(time))
    array = ShardArray(request, jobs)
    array.check(*paths)
    return array


def _refuse_both(name: str, value: object, other: str, other_value: object) -> None:
    if value and other_value:
        raise click.UsageError(f"{name} and {other} exclude each other: leave one away")


def _refuse_run(path: Path) -> None:
    """Raises ValueError for a run directory: it is taken for its shard set easily."""
    from pipeline.run_directory import RunDirectory

    directory = RunDirectory(path)
    if directory.exists:
        raise ValueError(
            f"{path} is a run and not a shard set: give the one that it trains on, "
            f"{directory.read_config().data.path}"
        )


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--quick", is_flag=True, help="Sizes and indices only: seconds for 1,000 shards.")
@click.option("--workers", type=click.IntRange(1), help="Processes; default: one per core.")
@QUIET
def verify(folder: Path, quick: bool, workers: int | None, quiet: bool) -> None:
    """Check that a shard set is what its manifest says, to the last byte."""
    from data_prep.verify import verify as check
    from data_prep.verify import verify_quickly
    from jobs import console

    _refuse_run(folder)
    console.configure(quiet)
    if quick:
        findings = verify_quickly(folder)
    else:
        with console.progress(f"verifying {folder}", quiet) as report:
            findings = check(folder, workers=workers, progress=report)
    for finding in findings:
        click.echo(str(finding))
    if findings:
        raise click.ClickException(f"{len(findings)} problems in {folder}: prepare it again")
    click.echo(f"{folder}: {'sizes and indices are ' if quick else ''}as its manifest says")


@click.command()
@click.argument("path", metavar="DIR|SHARD", type=ANY_PATH)
@click.option("--samples", default=16, show_default=True, type=click.IntRange(1))
@click.option("--sheet", type=ANY_PATH, help="PNG to write with pictures of the samples.")
def inspect(path: Path, samples: int, sheet: Path | None) -> None:
    """List the first samples of a shard set or a shard, and its images per class."""
    from data_prep.inspection import inspect as look
    from jobs import describe

    _refuse_run(path)
    found = look(path, samples)
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet.write_bytes(found.sheet())
    click.echo(describe.inspected(found))


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--to", type=FOLDER, required=True, help="Folder on a faster disk.")
@click.option("--rank-aware", is_flag=True, help="Only this rank's share of the shards.")
@QUIET
def stage(folder: Path, to: Path, rank_aware: bool, quiet: bool) -> None:
    """Copy a shard set to a faster disk, every byte verified.

    Train with REPRISE_STAGED=FOLDER in the environment (several: with colons): what is not there is
    read from the set itself. With --rank-aware under srun or torchrun, the ranks of a node stage
    the set together into one folder, and those of several nodes a share each.
    """
    from data_prep.stage import stage as copy
    from jobs import console, describe

    _refuse_run(folder)
    console.configure(quiet)
    share, shares = 0, 1
    if rank_aware:
        from pipeline.distributed import World

        world = World.detect()
        share, shares = world.rank, world.world_size
    with console.progress(f"staging {folder}", quiet) as report:
        done = copy(folder, to, share=share, shares=shares, progress=report)
    click.echo(
        f"{to}: {describe.counted(done.copied, 'shard')} copied, {done.kept} there already, "
        f"{done.bytes / 1e6:,.1f} MB"
    )


COMMANDS = (prep, verify, inspect, stage)
