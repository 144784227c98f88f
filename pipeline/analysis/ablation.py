"""Which blocks of a level matter: switched off one after the other, and singly.

*Towards Efficient Recurrent Visual Models*, Sec. 4.3, Fig. 3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from data_prep.files import write_atomically
from pipeline.analysis.figure import SERIES, saving
from pipeline.analysis.levels import Block, blocks
from pipeline.data import Batch
from pipeline.models import Network
from pipeline.models.routers import FixedRouter, RandomDrop
from pipeline.models.stage import RecursiveCell

RESULTS = "ablation.json"


@dataclass(frozen=True)
class Ablation:
    """Errors, fractions 0..1, of a network with blocks of one level switched off.

    The first two lists begin with none switched off and end with all; `single[i]` is without block
    i, from the one closest to the input.
    """

    run: str
    level: int
    images: int
    top_to_bottom: list[float]
    bottom_to_top: list[float]
    single: list[float]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / RESULTS, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> Ablation:
        """Raises ValueError where there is none."""
        try:
            return cls(**json.loads((folder / RESULTS).read_text()))
        except (OSError, ValueError, TypeError):
            raise ValueError(
                f"no ablation in {folder}: call `reprise ablate` on that run first, with the same "
                "--level"
            ) from None


def ablate(
    model: Network,
    batches: Iterable[Batch],
    *,
    run: str,
    level: int,
    size: int,
    images: int | None,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Ablation:
    """Evaluate the network with every choice of blocks switched off; its routers are replaced.

    Args:
        images: so many, the first, are enough; None takes all.

    Raises:
        ValueError: see `blocks`.
    """
    found = blocks(model, level, size)
    n = len(found)
    choices = [
        *(found[n - k :] for k in range(n + 1)),
        *(found[:k] for k in range(n + 1)),
        *([block] for block in found),
    ]
    _make_switchable(model, found)
    wrong, seen = torch.zeros(len(choices), dtype=torch.long), 0
    with torch.inference_mode():
        for batch in batches:
            take = len(batch.keys) if images is None else min(len(batch.keys), images - seen)
            for number, off in enumerate(choices):
                _switch_off(model, found, off)
                predicted = model.eval()(batch.images[:take]).logits.argmax(1)
                wrong[number] += (predicted != batch.labels[:take]).sum().cpu()
            seen += take
            on_batch(take)
            if seen == images:
                break
    errors = [count / seen for count in wrong.tolist()]
    return Ablation(run, level, seen, errors[: n + 1], errors[n + 1 : 2 * n + 2], errors[-n:])


def _make_switchable(model: Network, found: Sequence[Block]) -> None:
    for name in {block.cell for block in found}:
        cell = model.get_submodule(name)
        assert isinstance(cell, RecursiveCell)
        if isinstance(cell.router, FixedRouter):
            cell.router, cell.weighs = RandomDrop((1.0,) * cell.steps), "branch"


def _switch_off(model: Network, found: Sequence[Block], off: Sequence[Block]) -> None:
    for name in {block.cell for block in found}:
        router = model.get_submodule(name).router
        assert isinstance(router, RandomDrop)
        router.ablated = frozenset(block.step for block in off if block.cell == name)


def draw(path: Path, ablations: Sequence[Ablation]) -> None:
    """Fig. 3: a panel for each order, a curve for each network."""
    titles = {
        "top_to_bottom": ("top to bottom", "blocks switched off"),
        "bottom_to_top": ("bottom to top", "blocks switched off"),
        "single": ("one at a time", "block, from the input"),
    }
    with saving(path, columns=3, width=11, height=3.4) as (figure, panels):
        for axes, (name, (title, label)) in zip(panels[0], titles.items(), strict=True):
            for number, found in enumerate(ablations):
                errors = [100 * error for error in getattr(found, name)]
                first = 1 if name == "single" else 0
                axes.plot(
                    range(first, first + len(errors)),
                    errors,
                    color=SERIES[number % len(SERIES)],
                    marker="o",
                    markersize=3.5,
                    label=found.run,
                )
            axes.set(title=title, xlabel=label, ylim=(0, None))
            axes.locator_params(axis="x", integer=True)
        panels[0][0].set_ylabel(f"error, %, level {ablations[0].level}")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=3)
