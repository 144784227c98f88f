"""What is done with a trained network: evaluated, embedded, consolidated, ablated, projected."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import console

if TYPE_CHECKING:
    from data_prep.manifest import Manifest
    from pipeline.config import Config
    from pipeline.distributed import World
    from pipeline.models import Network
    from pipeline.run_directory import RunDirectory
    from pipeline.tasks import Summary
    from pipeline.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class _Trained:
    """The network of a run's newest or best checkpoint, on this rank's device."""

    directory: RunDirectory
    config: Config
    manifest: Manifest
    world: World
    model: Network
    checkpoint: Checkpoint

    @classmethod
    def open(cls, run: Path, data: Path | None = None, best: bool = False) -> _Trained:
        """`data` is another shard set than the run's own; joins the process group."""
        from pipeline.distributed import World
        from pipeline.run_directory import RunDirectory
        from pipeline.training import checkpoint, restore
        from pipeline.training.plan import check_task, open_set

        directory = RunDirectory(run)
        config = directory.read_config()
        found = checkpoint.find(directory.checkpoints, best=best)
        # Other images are normalised as those that the network was trained on.
        trained_on = found.load("identity")
        manifest = replace(
            open_set(data or config.data.path),
            channel_mean=tuple(trained_on["channel_mean"]),
            channel_std=tuple(trained_on["channel_std"]),
        )
        check_task(config, manifest)
        world = World.detect()
        world.start()
        model = restore.trained_network(config, manifest, found, world.device)
        return cls(directory, config, manifest, world, model, found)

    def alone(self) -> World:
        """What is only done by one rank sees the whole of the data.

        Raises:
            ValueError: there are several ranks.
        """
        if self.world.world_size > 1:
            raise ValueError("this is done by one process: leave the launcher away")
        return self.world


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run's checkpoint on its own or another shard set.

    `steps` are asked of a cost-adjustable network one after the other; without, the largest number.
    """

    run: Path
    data: Path | None = None
    split: str | None = None
    best: bool = False
    quiet: bool = False
    steps: tuple[int, ...] = ()

    def __call__(self) -> list[tuple[Summary, Path]]:
        """Each summary, and the folder that holds it and the per-sample results."""
        from pipeline import evaluate as evaluation
        from pipeline import tasks
        from pipeline.models.cost import measure
        from pipeline.training.engine import DTYPES
        from pipeline.training.run import open_evaluation

        opened = _Trained.open(self.run, self.data, self.best)
        directory, config, world = opened.directory, opened.config, opened.world
        manifest, model = opened.manifest, opened.model
        for number in self.steps:
            model.steps_taken(number)  # refuse a wrong number before the work on the right ones
        loader = open_evaluation(config, manifest, world, self.split)
        results = []
        for steps in self.steps or (None,):
            at = "" if steps is None else f" at {steps} steps"
            with console.progress(f"evaluating{at}", self.quiet) as report:
                summary, samples = evaluation.evaluate(
                    model,
                    loader,
                    world,
                    measure(model, config.data.augment.size, steps),
                    self.split or manifest.evaluation.name,
                    opened.checkpoint.step,
                    DTYPES[config.train.precision],
                    _running_total(report, loader.samples),
                    task=tasks.of(config),
                    steps=steps,
                )
            fewer = None if steps == model.steps_taken(None) else steps
            folder = directory.evaluation_of(
                manifest, self.data, split=self.split, fewer_steps=fewer, best=self.best
            )
            if world.is_main:
                evaluation.save(folder, summary, samples)
            results.append((summary, folder))
        loader.close()
        world.stop()
        return results


@dataclass(frozen=True)
class Embed:
    """Write the route vectors of a shard set's images, as a ReSet network chooses them."""

    evaluate: Evaluate
    out: Path | None = None

    def __call__(self) -> Path:
        """The file, a NumPy archive: `keys`, `labels`, `routes` (images, components) float32, and
        `components`, their names. Rank 0 writes it.

        Raises:
            ValueError: the network has no controllers.
        """
        import numpy as np

        from data_prep.files import write_atomically
        from pipeline.distributed import World
        from pipeline.models import create_model
        from pipeline.models.shapes import ShapesOnly
        from pipeline.run_directory import RunDirectory
        from pipeline.tasks.classification import Samples

        directory = RunDirectory(self.evaluate.run)
        config = directory.read_config()
        with ShapesOnly():
            pools = create_model(config.model, **config.model_options).pools
        if not pools:
            raise ValueError(
                f"{self.evaluate.run} is a run of model={config.model}, which has no controllers "
                "and so no routes to embed: give a run of a network with pools (reset*)"
            )
        ((_, folder),) = self.evaluate()
        out = self.out or directory.path / f"routes-{folder.name}.npz"
        if not World.detect().is_main:
            return out
        samples = Samples.load(folder / "samples.npz")
        content = io.BytesIO()
        np.savez_compressed(
            content,
            keys=samples.keys,
            labels=samples.labels,
            routes=samples.routes,
            components=samples.components,
        )
        write_atomically(out, content.getvalue())
        return out


@dataclass(frozen=True)
class Consolidate:
    """Consolidate the newest weights of a run with relaxed sharing, as the end of training does."""

    run: Path
    quiet: bool = False

    def __call__(self) -> tuple[Summary, Summary, float, Path]:
        """Before and after, the largest angle between tied weights, and the directory made."""
        from pipeline.run_directory import RunDirectory
        from pipeline.training import consolidation

        shared = consolidation.shared(RunDirectory(self.run).read_config())
        opened = _Trained.open(self.run)
        opened.alone()
        angle = consolidation.angle_of(opened.model)
        made = consolidation.network(shared, len(opened.manifest.classes), opened.model)
        written = consolidation.write(
            opened.directory,
            shared,
            made,
            opened.manifest,
            progress=opened.checkpoint.load("rank-00000")["progress"],
            angle=angle,
        )
        (before, _), *_ = Evaluate(self.run, quiet=self.quiet)()
        (after, _), *_ = Evaluate(written.path, quiet=self.quiet)()
        return before, after, angle, written.path


@dataclass(frozen=True)
class Ablate:
    """Switch the blocks of a level off in every order, and draw the errors."""

    run: Path
    level: int
    images: int | None = None
    beside: tuple[Path, ...] = ()
    quiet: bool = False

    def __call__(self) -> Path:
        """The picture, beside which are its figures."""
        from pipeline.analysis import ablation
        from pipeline.run_directory import RunDirectory
        from pipeline.training.run import open_evaluation

        others = [ablation.Ablation.load(self._folder(RunDirectory(run))) for run in self.beside]
        opened = _Trained.open(self.run)
        check_classifies(opened.config)
        loader = open_evaluation(opened.config, opened.manifest, opened.alone())
        total = loader.samples if self.images is None else min(self.images, loader.samples)
        with console.progress("ablating", self.quiet) as report:
            found = ablation.ablate(
                opened.model,
                loader,
                run=self.run.resolve().name,
                level=self.level,
                size=opened.config.data.augment.size,
                images=total,
                on_batch=_running_total(report, total),
            )
        loader.close()
        folder = self._folder(opened.directory)
        found.save(folder)
        ablation.draw(folder / "ablation.png", [found, *others])
        return folder / "ablation.png"

    def _folder(self, directory: RunDirectory) -> Path:
        return directory.path / "ablation" / f"level-{self.level}"


@dataclass(frozen=True)
class Trajectories:
    """Draw where the representations of images go, level by level."""

    run: Path

    def __call__(self) -> Path:
        """The picture, beside which are its points."""
        from pipeline.analysis import trajectories
        from pipeline.training.run import open_evaluation

        opened = _Trained.open(self.run)
        check_classifies(opened.config)
        split = opened.manifest.train.name
        loader = open_evaluation(opened.config, opened.manifest, opened.alone(), split)
        size = opened.config.data.augment.size
        points, labels = trajectories.collect(opened.model, loader, size)
        loader.close()
        projected = {
            (level, drift): trajectories.project(found, drift=drift)
            for level, found in points.items()
            for drift in (True, False)
        }
        folder = opened.directory.path / "trajectories"
        folder.mkdir(exist_ok=True)
        named = {
            f"level-{level}{'' if drift else '-without-drift'}": plane
            for (level, drift), plane in projected.items()
        }
        trajectories.save(folder / "trajectories.npz", named | {"labels": labels})
        classes = opened.manifest.classes
        trajectories.draw(folder / "trajectories.png", projected, labels, classes)
        return folder / "trajectories.png"


def check_classifies(config: Config) -> None:
    """Raises ValueError for a run of another task."""
    from data_prep.manifest import CLASSIFICATION

    if config.task != CLASSIFICATION:
        raise ValueError(
            f"model={config.model} is for {config.task}: give a run of a network that classifies"
        )


def _running_total(report: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """A callback for the samples of one batch, from one for all that are done."""
    done = 0

    def count(samples: int) -> None:
        nonlocal done
        done += samples
        report(done, total)

    return count
