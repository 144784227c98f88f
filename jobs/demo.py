"""The whole way in one command: images, shards, training, evaluation, report."""

from __future__ import annotations

from pathlib import Path

import click

from jobs import console, describe, tasks, trained


def run(folder: Path, seed: int, quiet: bool) -> int:
    """The exit status. Every part may be done already: then it is not done again."""
    from data_prep.prepare import prepare
    from data_prep.sources import open_source
    from data_prep.verify import verify
    from pipeline import recipes
    from pipeline.analysis import report
    from pipeline.run_directory import RunDirectory

    console.configure(quiet)
    shards, directory = folder / "digits", folder / "runs" / f"digits-seed{seed}"
    click.echo("1. preparing 1,797 handwritten digits as WebDataset shards")
    with console.preparation("preparing", quiet) as progress:
        prepare(open_source("digits", None), shards, progress=progress)
    if findings := verify(shards):
        raise ValueError(f"{findings[0]}: delete {shards} and call the demo again")
    click.echo("2. training DR-ResNet-16, whose cells are used up to twice per image")
    config = recipes.load("drnn/digits/dr_resnet16", [f"data.path={shards}", f"seed={seed}"])
    if code := tasks.Train(config, directory, quiet)():
        return code
    click.echo("3. evaluating")
    ((summary, _),) = trained.Evaluate(directory, quiet=quiet)()
    page = report.write(RunDirectory(directory))
    click.echo(describe.summary(summary))
    click.echo(
        "\n".join(
            [
                "",
                f"look at:     {page}",
                f"compare:     reprise ui --runs {folder / 'runs'}",
                f"try also:    reprise demo --seed {seed + 1}",
                "go on with:  reprise recipes",
                "own images:  reprise prep folder --source IMAGES --out data/mine",
            ]
        )
    )
    return 0
