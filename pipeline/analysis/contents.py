"""What a run directory has to show: read once, for all figures."""

from __future__ import annotations

from dataclasses import dataclass
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from data_prep.manifest import CLASSIFICATION, Manifest
from pipeline import evaluate, tracking
from pipeline.config import Config
from pipeline.evaluate import Samples, Summary
from pipeline.models.cost import Cost
from pipeline.run_directory import RunDirectory

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the run; `name` is `<shard set>-<split>`."""

    name: str
    summary: Summary
    samples: Samples


@dataclass(frozen=True)
class Run:
    """A run, finished or not.

    `evaluations` begins with the one on the run's own shard set where there is one. `manifest` is
    None where the shard set is gone; `parameters` is then None too, since nothing else knows the
    number of classes. `notes` say what could not be read.
    """

    name: str
    config: Config
    history: dict[str, list[tuple[int, float]]]
    evaluations: tuple[Evaluation, ...]
    manifest: Manifest | None
    cost: Cost
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int | None:
        return self.cost.parameters if self.manifest else None

    @property
    def main(self) -> Evaluation | None:
        """The evaluation that headlines and figures show."""
        return self.evaluations[0] if self.evaluations else None

    @property
    def gated(self) -> bool:
        """Whether the network decides for each image how many steps it takes."""
        return any(cell.target is not None for cell in self.cost.cells.values())

    @property
    def expected_steps(self) -> float:
        """Steps per image, all cells, with every gate at its target: the sum of t^i."""
        return sum(
            (1.0 if cell.target is None else cell.target) ** i
            for cell in self.cost.cells.values()
            for i in range(1, cell.steps + 1)
        )

    @property
    def unfinished(self) -> float | None:
        """The epoch that a run has reached that is not at its end, as far as epochs tell."""
        epochs, clock = self.config.train.epochs, self.history.get("epoch", [])
        reached = clock[-1][1] if clock else 0.0
        return reached if epochs is not None and reached < epochs else None

    def series(self, metric: str) -> tuple[Floats, Floats]:
        """Epochs and values of a tracked metric; both empty where there are no points."""
        points = self.history.get(metric, [])
        clock = np.array(self.history.get("epoch", []), dtype=np.float64).reshape(-1, 2)
        steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
        epochs = np.interp(steps, clock[:, 0], clock[:, 1]) if len(clock) else steps
        return epochs, values


def read(directory: RunDirectory) -> Run:
    """Everything the report shows.

    Raises:
        ConfigError: this is not a run directory.
        ValueError: the configuration names a model that does not exist here.
    """
    config = directory.read_config()
    notes: list[str] = []
    manifest, own = None, ""
    try:
        manifest = Manifest.load(config.data.path)
        own = directory.evaluation_of(manifest).name
    except (OSError, ValueError) as error:
        notes.append(str(error))
    evaluations = _evaluations(directory, notes)
    return Run(
        name=directory.path.resolve().name,
        config=config,
        history=tracking.history(directory.path),
        evaluations=tuple(sorted(evaluations, key=lambda found: (found.name != own, found.name))),
        manifest=manifest,
        cost=_cost(config, manifest),
        notes=tuple(notes),
    )


def _evaluations(directory: RunDirectory, notes: list[str]) -> list[Evaluation]:
    found = []
    for file in directory.evaluation.glob(f"[!.]*/{evaluate.SUMMARY}"):
        try:
            found.append(Evaluation(file.parent.name, *evaluate.load(file.parent)))
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            notes.append(
                f"The evaluation {file.parent.name} cannot be read ({error!r}): "
                "repeat it with `reprise eval RUN`"
            )
    return found


def _cost(config: Config, manifest: Manifest | None) -> Cost:
    """Costs of the network on shapes alone, so that no weights and no random numbers are drawn."""
    from pipeline.models import create_model
    from pipeline.models.cost import measure
    from pipeline.models.shapes import ShapesOnly

    labelled = manifest if config.task == CLASSIFICATION else None
    classes = {"num_classes": len(labelled.classes)} if labelled else {}
    with ShapesOnly():
        model = create_model(config.model, **config.model_options, **classes)
    return measure(model, config.data.augment.size)
