"""The commands of `reprise` that have to do with a cluster."""

from __future__ import annotations

from pathlib import Path

import click

from jobs.options import FOLDER, QUIET

CLUSTER = click.option(
    "--cluster", metavar="NAME", help="A profile; default: this machine, where it has no SLURM."
)


RUNS = click.option("--runs", type=FOLDER, default=Path("runs"), show_default=True)
RUN = click.argument("run", metavar="RUN")


@click.command()
@click.argument("recipe", metavar="RECIPE|FILE")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@CLUSTER
@click.option("--nodes", default=1, show_default=True, type=click.IntRange(1))
@click.option("--gpus-per-node", type=click.IntRange(0), help="Default: the profile's.")
@click.option("--time", default="12h", show_default=True, help="Limit: such as 90m, 24h or 2d.")
@click.option("--run", "run_dir", type=FOLDER, help="Run directory; default: below runs/.")
@click.option("--sweep", is_flag=True, help="A run for every combination of KEY=A,B settings.")
@click.option("--max-parallel", type=click.IntRange(1), help="Runs of a sweep at a time.")
@click.option("--dry-run", is_flag=True, help="Show what would be queued, and queue nothing.")
@QUIET
def submit(
    recipe: str,
    overrides: tuple[str, ...],
    cluster: str | None,
    nodes: int,
    gpus_per_node: int | None,
    time: str,
    run_dir: Path | None,
    sweep: bool,
    max_parallel: int | None,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Train a recipe as a job: on a SLURM cluster, or in the background here.

    One rank for each GPU of each node. The job runs the code and the configuration of now, is
    queued again after a preemption, a time limit or a lost node, and goes on where it was.
    """
    from jobs import clusters, console, submit
    from jobs import sweep as sweeps
    from pipeline import recipes

    console.configure(quiet)
    profile = clusters.load(cluster)
    gpus = profile.gpus_per_node if gpus_per_node is None else gpus_per_node
    request = submit.Request(profile, nodes, gpus, clusters.minutes(time))
    stem = Path("runs") / recipe.removesuffix(".yaml").strip("./").replace("/", "-")
    if sweep:
        folder = run_dir or stem.with_name(f"{stem.name}-sweep")
        runs = sweeps.members(recipe, overrides, folder)
    else:
        config = recipes.load(recipe, overrides)
        name = f"{config.name.replace('/', '-')}-seed{config.seed}"
        folder = run_dir or Path("runs") / name
        runs = {folder: config}
    if dry_run:
        submit.check_all(runs, request)
        if not profile.is_local:
            click.echo(submit.sbatch_text(request, list(runs), folder))
        if sweep:
            for run in runs:
                click.echo(f"member: {run}")
            click.echo("of the first, from which the others differ by the settings in their names:")
        click.echo(next(iter(runs.values())).to_yaml(), nl=False)
        return
    if sweep:
        jobs = sweeps.start(runs, folder, request, max_parallel)
    else:
        jobs = [submit.submit(config, folder, request)]
    for run, job in zip(runs, jobs, strict=True):
        click.echo(f"job {job.id} on {job.cluster}: {run}")


@click.command()
@RUNS
def runs(runs: Path) -> None:
    """List the runs: state, epoch, accuracy, time left, nodes and job."""
    from jobs import runs as all_runs

    click.echo(all_runs.shown(all_runs.table(runs), runs))


@click.command()
@RUN
@RUNS
@click.option("-f", "follow", is_flag=True, help="Go on while the job lives.")
@click.option("--rank", default=0, show_default=True, type=click.IntRange(0))
def logs(run: str, runs: Path, follow: bool, rank: int) -> None:
    """Print what a rank of a run has logged."""
    from jobs import runs as all_runs

    for line in all_runs.logs(all_runs.find(run, runs), rank, follow):
        click.echo(line, nl=False)


@click.command()
@RUN
@RUNS
def cancel(run: str, runs: Path) -> None:
    """End the job of a run, which saves a checkpoint first where it trains."""
    from jobs import runs as all_runs

    click.echo(f"cancelled job {all_runs.cancel(all_runs.find(run, runs))}")


@click.command()
@RUN
@RUNS
@click.option("--nodes", type=click.IntRange(1), help="Default: as before.")
@click.option("--gpus-per-node", type=click.IntRange(0), help="Default: as before.")
@click.option("--time", help="Default: as before.")
@QUIET
def resume(
    run: str,
    runs: Path,
    nodes: int | None,
    gpus_per_node: int | None,
    time: str | None,
    quiet: bool,
) -> None:
    """Submit a run again that was stopped, from its newest checkpoint, also on other nodes.

    The global batch, the order of its samples and the weights go on as they were; the random states
    of the ranks do so only on the same number of ranks.
    """
    from jobs import console
    from jobs import runs as all_runs

    console.configure(quiet)
    path = all_runs.find(run, runs)
    job = all_runs.resume(path, nodes, gpus_per_node, time)
    click.echo(f"job {job.id} on {job.cluster}: {path}")


@click.command()
@CLUSTER
@click.option("--data", type=FOLDER, help="A shard set to be trained on.")
@click.option("--ranks", default=1, show_default=True, type=click.IntRange(1))
def doctor(cluster: str | None, data: Path | None, ranks: int) -> None:
    """Check this installation and, with --cluster, two nodes of a cluster.

    Each line says ok, or what to do.
    """
    from jobs import clusters
    from jobs import doctor as examination

    profile = clusters.load(cluster) if cluster else None
    bad = 0
    for finding in examination.examine(profile, data, ranks):
        click.echo(str(finding))
        bad += finding.cure is not None
    if bad:
        raise click.ClickException(f"{bad} of these must be mended")


@click.command()
@CLUSTER
@click.option("--nodes", default=2, show_default=True, type=click.IntRange(1))
@click.option("--gpus-per-node", default=1, show_default=True, type=click.IntRange(0))
@click.option("--folder", type=FOLDER, default=Path("runs/drill"), show_default=True)
@QUIET
def drill(cluster: str | None, nodes: int, gpus_per_node: int, folder: Path, quiet: bool) -> None:
    """Prove on a cluster that a preempted job is queued again and loses nothing.

    A small network trains twice on handwritten digits, once with the signal of a preemption; both
    must have the same weights at the same step.
    """
    from jobs import clusters, console, submit
    from jobs import drill as proof
    from pipeline.config import ConfigError

    console.configure(quiet)
    profile = clusters.load(cluster)
    if profile.is_local:
        raise ConfigError("a drill needs a scheduler: give --cluster with a cluster's name")
    request = submit.Request(profile, nodes, gpus_per_node, minutes=30)
    for line in proof.drill(request, folder):
        click.echo(line)


COMMANDS = (submit, runs, logs, cancel, resume, doctor, drill)
