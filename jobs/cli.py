"""`reprise`: the command line. Heavy imports stay inside the commands, so that help is instant."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs import cluster_cli, data_cli
from jobs.errors import Exit, guarded
from jobs.options import ANY_PATH, FOLDER, QUIET, RUN
from pipeline.loading import end_quickly, loading

if TYPE_CHECKING:
    from pipeline.config import Config


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="reprise")
def cli() -> None:
    """Train recursive and dynamic vision networks, from raw images to a compared run.

    Start with `reprise demo`; `reprise recipes` lists what can be trained.
    """


@cli.command()
@click.argument("recipe", metavar="RECIPE|FILE|RUN")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--run", "run_dir", type=FOLDER, help="Run directory; default: below runs/.")
@click.option("--nproc", default=1, show_default=True, type=click.IntRange(1), help="Local ranks.")
@click.option("--stop-after", type=click.IntRange(1), help="Stop cleanly after this step.")
@click.option("--dry-run", is_flag=True, help="Show what would be done and start nothing.")
@QUIET
def train(
    recipe: str,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    nproc: int,
    stop_after: int | None,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Train a recipe, or resume a run.

    RECIPE is a name from `reprise recipes`, a YAML file, or an earlier run, by its directory or its
    name below runs/, which goes on where its newest checkpoint is.
    """
    from jobs import stopping

    stopping.note()
    with loading():
        from jobs import console, describe, record, tasks
        from pipeline.config import ConfigError
        from pipeline.distributed import World
        from pipeline.run_directory import RunDirectory
        from pipeline.training import initial
        from pipeline.training.plan import plan

    console.configure(quiet)
    config, run_dir = _named(recipe, overrides, run_dir)
    world = World.detect()
    if nproc > 1 and world.world_size > 1:
        raise ConfigError(
            f"--nproc {nproc} inside a launcher that started {world.world_size} ranks already: "
            "leave --nproc away"
        )
    if stop_after is not None and stop_after <= (at := record.newest_step(run_dir)):
        raise ConfigError(
            f"--stop-after {stop_after}: {run_dir} is at step {at} already: give a later step"
        )
    planned = plan(config, max(nproc, world.world_size))
    if dry_run:
        if not RunDirectory(run_dir).exists:
            initial.check(config, len(planned.manifest.classes))
        if world.is_main and not quiet:
            click.echo(describe.plan(planned))
        click.echo(config.to_yaml(), nl=False)
        return
    task = tasks.Train(config, run_dir, quiet, stop_after)
    code = tasks.LocalRanks(task, nproc)() if nproc > 1 else task()
    if code:
        raise click.exceptions.Exit(code)
    if world.is_main and (stop_after is None or _has_finished(run_dir)):
        click.echo(describe.next_steps(run_dir))


def _named(recipe: str, overrides: tuple[str, ...], run_dir: Path | None) -> tuple[Config, Path]:
    """Configuration and run directory of a recipe, a file or an earlier run.

    Raises:
        ConfigError: it is none of them, or a run that is to have other settings.
    """
    from pipeline import recipes
    from pipeline.config import ConfigError
    from pipeline.run_directory import RunDirectory

    run = Path(recipe)
    if recipe not in recipes.RECIPES and not RunDirectory(run).exists:
        run = Path("runs") / recipe
    if not RunDirectory(run).exists:
        config = recipes.load(recipe, overrides)
        default = Path("runs") / f"{config.name.replace('/', '-')}-seed{config.seed}"
        return config, run_dir or default
    if overrides or run_dir:
        settings = " ".join(overrides)
        raise ConfigError(
            f"{run} is a run, and a run keeps its configuration: leave out "
            f"{settings or '--run'} to go on with it, or begin another with "
            f"`reprise train {run}/config.yaml {settings} --run NEW`, which "
            f"init_from.path={run} lets start from its weights"
        )
    return RunDirectory(run).read_config(), run


def _has_finished(run: Path) -> bool:
    """Whether it came to its end before the step that it was to stop after."""
    from jobs import runs

    return runs.progress(run).status == "FINISHED"


def _numbers(_: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...]:
    """`4,2,3` as (2, 3, 4)."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")})) if text else ()
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers: give such as 2,3,4") from None


@cli.command("eval")
@click.argument("run_dir", metavar="RUN", type=RUN)
@click.option("--data", type=FOLDER, help="Another shard set of the same classes or task.")
@click.option("--split", help="Another split of the set than the one to evaluate on.")
@click.option("--best", is_flag=True, help="The best checkpoint instead of the newest.")
@click.option(
    "--steps",
    callback=_numbers,
    metavar="N[,N]...",
    help="Numbers of steps of a cost-adjustable network; default: the largest.",
)
@QUIET
def evaluate(
    run_dir: Path,
    data: Path | None,
    split: str | None,
    best: bool,
    steps: tuple[int, ...],
    quiet: bool,
) -> None:
    """Evaluate a run: accuracy or PSNR, executed steps, multiply-adds, images/s.

    A cost-adjustable network answers at each number of --steps that it was built for.
    """
    from jobs import console, describe, trained
    from pipeline.distributed import World

    world = World.detect()
    console.configure(quiet, rank=world.rank)
    results = trained.Evaluate(run_dir, data, split, best, quiet or not world.is_main, steps)()
    if not world.is_main:
        return
    summaries = [summary for summary, _ in results]
    click.echo(describe.by_steps(summaries) if steps else describe.summary(summaries[0]))
    for _, folder in results:
        click.echo(f"per-sample results: {folder}")


@cli.command()
@click.argument("run_dir", metavar="RUN", type=RUN)
@click.option("--data", type=FOLDER, help="Another shard set of the same classes.")
@click.option("--split", help="Another split of the set than the one to evaluate on.")
@click.option("--best", is_flag=True, help="The best checkpoint instead of the newest.")
@click.option("--out", type=ANY_PATH, help="File to write; default: in the run directory.")
@QUIET
def embed(
    run_dir: Path, data: Path | None, split: str | None, best: bool, out: Path | None, quiet: bool
) -> None:
    """Write the routes that a ReSet network chooses, one vector for each image.

    The file is a NumPy archive (npz) of the images' keys and labels, the route vectors and the
    names of their components: pool, iteration and unit.
    """
    from jobs import console, trained
    from pipeline.distributed import World

    world = World.detect()
    console.configure(quiet, rank=world.rank)
    evaluated = trained.Evaluate(run_dir, data, split, best, quiet or not world.is_main)
    written = trained.Embed(evaluated, out)()
    if world.is_main:
        click.echo(written)


@cli.command()
@click.argument("run_dir", metavar="RUN", type=RUN)
@QUIET
def consolidate(run_dir: Path, quiet: bool) -> None:
    """Replace the tied weights of relaxed sharing by their mean.

    Writes RUN/consolidated, a run directory of the network that shares its weights, and evaluates
    both. Training does the same when it ends.
    """
    from jobs import console, describe, trained

    console.configure(quiet)
    before, after, angle, made = trained.Consolidate(run_dir, quiet)()
    click.echo(describe.consolidation(before, after, angle))
    click.echo(f"consolidated: {made}")


@cli.command()
@click.argument("run_dir", metavar="RUN", type=RUN)
@click.option("--level", default=2, show_default=True, help="Counted from the input.")
@click.option("--images", type=click.IntRange(1), help="The first of the split; default: all.")
@click.option("--beside", type=RUN, multiple=True, help="Another run, ablated before.")
@QUIET
def ablate(
    run_dir: Path, level: int, images: int | None, beside: tuple[Path, ...], quiet: bool
) -> None:
    """Switch the residual blocks of a level off and draw what it costs.

    One after the other from the top and from the bottom, and one at a time: the figures and the
    picture are in RUN/ablation.
    """
    from jobs import console, trained

    console.configure(quiet)
    click.echo(trained.Ablate(run_dir, level, images, beside, quiet)())


@cli.command()
@click.argument("run_dir", metavar="RUN", type=RUN)
def trajectories(run_dir: Path) -> None:
    """Draw how 100 training images move through the levels of a residual network.

    Principal components of what goes into and comes out of each block, with the drift that all
    images share and without: the points and the picture are in RUN/trajectories.
    """
    from jobs import console, trained

    console.configure(quiet=False)
    click.echo(trained.Trajectories(run_dir)())


@cli.command()
@click.argument("run_dir", metavar="RUN", type=RUN)
@click.option(
    "--beside",
    type=RUN,
    multiple=True,
    help="Another run whose cost-accuracy curve is drawn beside this one's.",
)
def report(run_dir: Path, beside: tuple[Path, ...]) -> None:
    """Write a run's report: one HTML page that needs nothing else."""
    from pipeline.analysis import report as page
    from pipeline.run_directory import RunDirectory

    click.echo(page.write(RunDirectory(run_dir), [RunDirectory(other) for other in beside]))


@cli.command()
@click.argument("pattern", default="*")
def models(pattern: str) -> None:
    """List the networks with their parameters and multiply-adds.

    PATTERN is such as `dr_*`, or a part of the name such as `110`.
    """
    from jobs import describe

    click.echo(describe.models(pattern))


@cli.command()
@click.argument("pattern", default="*")
def recipes(pattern: str) -> None:
    """List the recipes, with the papers' own figures.

    PATTERN is such as `rc/*-short`, or a part of the name such as `cifar10`.
    """
    from jobs import describe

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    click.echo(describe.recipes(pattern, width))


@cli.command()
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--runs", type=FOLDER, default=Path("runs"), show_default=True)
def ui(port: int, runs: Path) -> None:
    """Open MLflow's page on the store in use, after sending what is still in the runs' journals."""
    from jobs import console, mlflow_page
    from pipeline import tracking

    console.configure(quiet=False)
    uri = tracking.store_uri()
    mlflow_page.send_journals(runs)
    command = tracking.ui_command(uri, port)
    if command is None:
        click.echo(f"the runs are tracked by a server: open {uri}")
        return
    click.echo("starting MLflow")

    def ready() -> None:
        click.echo(f"open {mlflow_page.address(port, runs)} (Ctrl-C ends it)")

    raise click.exceptions.Exit(mlflow_page.serve(command, port, ready))


@cli.command()
@click.option("--folder", type=FOLDER, default=Path("demo"), show_default=True)
@click.option("--seed", default=0, show_default=True)
@QUIET
def demo(folder: Path, seed: int, quiet: bool) -> None:
    """Prepare digits, train a dynamic recursive network, evaluate it and write its report."""
    from jobs import demo as steps

    raise click.exceptions.Exit(steps.run(folder, seed, quiet))


for command in (*data_cli.COMMANDS, *cluster_cli.COMMANDS):
    cli.add_command(command)


def main() -> None:
    """Entry point of `reprise`; exit status 2 and one line for what the user can mend."""
    end_quickly()
    # Read when torch is loaded. OpenMP's threads spin at barriers by default, so that any other
    # work on the machine slows training down many times over.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    status = guarded(_invoke)
    # A launcher ends the ranks that are still here once one has left with this status; a signal
    # while the interpreter winds up would replace it.
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)


def _invoke() -> int:
    try:
        return cli.main(prog_name="reprise", standalone_mode=False) or 0
    except click.exceptions.Abort:
        return Exit.INTERRUPTED
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "reprise"
        text = " ".join(error.format_message().split())
        click.echo(f"error: {text} (`{where} --help` shows the usage)", err=True)
        return Exit.USER_ERROR
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}", err=True)
        return 1


if __name__ == "__main__":
    main()
