"""Plans, results and lists as short tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate
from tqdm import tqdm

from data_prep.manifest import (
    CARD_NAME,
    CLASSIFICATION,
    DUPLICATES_NAME,
    REJECTED_NAME,
    TRAIN,
    Manifest,
)

if TYPE_CHECKING:
    from data_prep.estimate import Estimate
    from data_prep.inspection import Inspection
    from pipeline.config import Config, Schedule
    from pipeline.tasks import Summary
    from pipeline.training.plan import Plan, PlannedPhase

LEAST_TEXT = 40  # characters, for the texts beside the names of recipes


def table_of(rows: list[list[object]], headers: list[str]) -> str:
    """Aligned columns, the cells as they are."""
    return tabulate(rows, headers, tablefmt="simple", disable_numparse=True)


def counted(number: float, what: str) -> str:
    """`1 epoch`, `2 epochs`."""
    return f"{number:,g} {what}{'' if number == 1 else 's'}"


def speed(images_per_second: float) -> str:
    """Images per second, whole where that says enough."""
    return f"{images_per_second:,.0f}" if images_per_second >= 10 else f"{images_per_second:.2g}"


def mega(multiply_adds: float) -> str:
    """Multiply-adds in millions."""
    return f"{multiply_adds / 1e6:.2f} M"


def plan(planned: Plan) -> str:
    """What a run will do: data, network, parameter groups, steps."""
    config, manifest, cost = planned.config, planned.manifest, planned.cost
    sigma, classes = config.data.sigma, len(manifest.classes)
    what = f"{classes} classes" if sigma is None else f"noise of sigma {sigma:g} of 255"
    train = config.train
    trained = f", {cost.parameters + cost.surplus:,} in training" if cost.surplus else ""
    rows: list[list[object]] = [
        [
            *([each.phase.name] if config.phases else []),
            *(group.role, f"{group.parameters:,}", f"{group.lr:g}", f"{group.weight_decay:g}"),
        ]
        for each in planned.phases
        for group in each.groups
    ]
    heads = [*(["phase"] if config.phases else []), "group", "parameters", "lr", "weight decay"]
    return "\n".join(
        [
            f"{config.name}: {config.model} on {manifest.name} ({manifest.train.samples:,} "
            f"{manifest.train.name}, {manifest.evaluation.samples:,} {manifest.evaluation.name} "
            f"images, {what})",
            f"{_length(planned)}, batch {train.batch_size}, "
            f"{train.precision}, ZeRO {train.zero_stage}, {config.optimizer.name}, "
            f"{_schedule(config.schedule, train.epochs)}, seed {config.seed}",
            *(_phase(each, planned.steps_per_epoch) for each in planned.phases if config.phases),
            f"parameters: {cost.parameters:,}{trained}",
            f"multiply-adds per image: nominal {mega(cost.nominal)}, expected "
            f"{mega(cost.expected)}, maximal {mega(cost.maximal)}",
            *(
                f"at {steps} steps: {mega(one.nominal)}"
                for steps, one in planned.costs.items()
                if steps is not None
            ),
            table_of(rows, heads),
            *_cut_unscaled(config, manifest),
        ]
    )


def _cut_unscaled(config: Config, manifest: Manifest) -> list[str]:
    """A remark where crops for small images would see a corner of large ones."""
    augment, smallest = config.data.augment, min(manifest.image_size[0], manifest.image_size[2])
    if augment.crop != "pad" or smallest <= 2 * augment.size:
        return []
    return [
        f"note: crop=pad cuts {augment.size} pixels out of images of {smallest} pixels and more, "
        "unscaled: with data.augment.crop=random_resized the whole image counts"
    ]


def _schedule(schedule: Schedule, epochs: float | None) -> str:
    """A schedule, and what of it lies beyond so many epochs."""
    never = []
    late = [f"{epoch:g}" for epoch in schedule.milestones if epochs and epoch >= epochs]
    if late:
        never.append(f"milestones never reached: {', '.join(late)}")
    if epochs and schedule.warmup_epochs > epochs:
        never.append(f"warm-up of {counted(schedule.warmup_epochs, 'epoch')} never ends")
    return f"{schedule.name} schedule" + (f" ({'; '.join(never)})" if never else "")


def _length(planned: Plan) -> str:
    epochs, steps = planned.config.train.epochs, planned.steps_per_epoch
    if epochs is not None:
        return f"{counted(epochs, 'epoch')} of {counted(steps, 'step')}"
    return f"{counted(len(planned.phases), 'phase')}, epochs of {counted(steps, 'step')}"


def _phase(planned: PlannedPhase, steps_per_epoch: int) -> str:
    phase, own = planned.phase, planned.config
    most = "at most " if phase.until else ""
    return (
        f"phase {phase.name}: {', '.join(phase.trains)} for {most}{planned.steps:,} steps, "
        f"{own.optimizer.name}, {_schedule(own.schedule, planned.steps / steps_per_epoch)}, "
        f"scorer {own.scorer.name}"
    )


def prepared(manifest: Manifest, seconds: float) -> str:
    """A shard set in a few lines, and how long it took."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    size = sum(shard.bytes for shard in shards) / 1e6
    counts = ", ".join(f"{split.samples} {name}" for name, split in manifest.splits.items())
    classes = "1 class" if len(manifest.classes) == 1 else f"{len(manifest.classes)} classes"
    of = f" of {classes}" if manifest.task == CLASSIFICATION else ""
    lines = [
        f"{manifest.root}: {counts} images{of}",
        f"{size:,.1f} MB in {counted(len(shards), 'shard')} after {seconds:.1f} s; "
        f"{manifest.reencoded} re-encoded; see {manifest.root / CARD_NAME}",
    ]
    for count, what, name in (
        (manifest.rejected, f"of {manifest.found} rejected", REJECTED_NAME),
        (manifest.duplicates, "images outside of train are in train, too", DUPLICATES_NAME),
    ):
        if count:
            lines.append(f"{count} {what}: see {manifest.root / name}")
    return "\n".join([*lines, *_use(manifest)])


def _use(manifest: Manifest) -> Iterator[str]:
    """What is to be known of a set before it is trained on."""
    if manifest.task == CLASSIFICATION and len(manifest.classes) == 1:
        yield (
            f"there is one class alone, {manifest.classes[0]!r}, and nothing to tell apart: give "
            "each class a folder of its own"
        )
    if TRAIN not in manifest.splits:
        return
    try:
        chosen = manifest.evaluation.name
    except ValueError as error:
        yield f"cannot be trained on: {error}"
        return
    for name in sorted(manifest.splits.keys() - {TRAIN, chosen}):
        yield f"training evaluates on {chosen}; `reprise eval RUN --split {name}` measures {name}"


def estimated(found: Estimate, out: Path) -> str:
    """What a preparation will take."""
    return (
        f"{out} would take {found.bytes / 1e9:,.3f} GB and {tqdm.format_interval(found.seconds)} "
        f"for {found.images:,} images, within {2 * found.error:.0%} if the {found.sampled} images "
        f"measured are like the others ({found.rejected} of them rejected)"
    )


def inspected(found: Inspection) -> str:
    """The first samples and the counts per class."""
    rows: list[list[object]] = [
        [sample.key, sample.extension, f"{width}x{height}", f"{len(sample.image):,}", name]
        for sample, (width, height), name in found.samples
    ]
    lines = [table_of(rows, ["key", "kind", "pixels", "bytes", "class"])]
    for where, counts in found.counts.items():
        table: list[list[object]] = [[name, f"{count:,}"] for name, count in counts.items()]
        lines += ["", f"{where}: {sum(counts.values()):,} images", table_of(table, ["class", "n"])]
    return "\n".join(lines)


def summary(found: Summary) -> str:
    """The results of an evaluation."""
    share = found.multiply_adds / found.nominal_multiply_adds
    rows: list[list[object]] = [["images", f"{found.samples:,} ({found.split})"]]
    rows += [[what, figure] for what, figure in found.rows]
    if found.maximal_steps:
        histogram = ", ".join(f"{k}: {n}" for k, n in enumerate(found.steps_histogram) if n)
        rows += [
            ["recursive steps", f"{found.mean_steps:.2f} of {found.maximal_steps} on average"],
            ["images by steps", histogram],
        ]
    rows += [
        ["multiply-adds", f"{mega(found.multiply_adds)} ({100 * share:.1f} % of nominal)"],
        ["images/s", speed(found.images_per_second)],
    ]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def in_short(found: Summary) -> str:
    """The results of an evaluation on one line."""
    parts = [found.headline]
    if found.maximal_steps:
        parts.append(f"{found.mean_steps:.2f} of {found.maximal_steps} recursive steps")
    return ", ".join([*parts, f"{speed(found.images_per_second)} images/s"])


def consolidation(before: Summary, after: Summary, angle: float) -> str:
    """The results of a network with relaxed sharing before and after consolidation."""
    rows: list[list[object]] = [
        [what, first, second]
        for (what, first), (_, second) in zip(before.rows, after.rows, strict=True)
    ]
    table = table_of(rows, ["", "before", "after"])
    return f"{table}\ntied weights were at most {angle:.3f} degrees apart"


def by_steps(found: Sequence[Summary]) -> str:
    """The results of one network at several numbers of steps."""
    rows: list[list[object]] = [
        [
            summary.step_choice,
            *(figure for _, figure in summary.rows),
            mega(summary.multiply_adds),
            speed(summary.images_per_second),
        ]
        for summary in found
    ]
    results = [name for name, _ in found[0].rows]
    table = table_of(rows, ["steps", *results, "multiply-adds", "images/s"])
    return f"{table}\n{found[0].samples:,} {found[0].split} images"


def models(pattern: str) -> str:
    """Every network with its cost at its own number of classes and image size."""
    from pipeline.models import create_model, list_models
    from pipeline.models.cost import measure
    from pipeline.models.shapes import ShapesOnly

    names = list_models(pattern)
    if not names:
        raise ValueError(f"no network matches {pattern!r}: `reprise models` lists them all")
    rows: list[list[object]] = []
    for name in names:
        with ShapesOnly():
            model = create_model(name)
        cost = measure(model)
        rows.append(
            [
                name,
                f"{cost.parameters:,}",
                mega(cost.nominal),
                mega(cost.expected),
                mega(cost.maximal),
            ]
        )
    headers = ["network", "parameters", "nominal", "expected", "maximal"]
    note = (
        "Multiply-adds of convolutions and linear layers, one image (CIFAR: 32 pixels, 10 "
        "classes;\nImageNet: 224 pixels, 1,000 classes; denoising: 40 pixels). nominal: every step "
        "executed;\nexpected: gates at their target rate; maximal: every step and every gate."
    )
    return f"{table_of(rows, headers)}\n\n{note}"


def recipes(pattern: str, width: int | None = None) -> str:
    """The recipes that match, with what they train and the paper's figure.

    `width` is that of a terminal, in characters, which long texts are broken to fit; None leaves
    each recipe on one line, for `grep`.
    """
    from pipeline.recipes import RECIPES, list_recipes

    names = list_recipes(pattern)
    if not names:
        raise ValueError(f"no recipe matches {pattern!r}: `reprise recipes` lists them all")
    rows: list[list[object]] = [
        [name, RECIPES[name].about, RECIPES[name].reported] for name in names
    ]
    headers = ["recipe", "what", "the paper's figure"]
    if width is None:
        return table_of(rows, headers)
    left = max(LEAST_TEXT, width - max(map(len, names)) - 4)  # two gaps of two characters
    what = max(LEAST_TEXT // 2, round(0.55 * left))
    return tabulate(
        rows,
        headers,
        tablefmt="simple",
        disable_numparse=True,
        maxcolwidths=[None, what, left - what],
    )


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest} s"
    )


def next_steps(run: Path) -> str:
    """What to look at, and the commands that come next."""
    return "\n".join(
        [
            f"report:      {run / 'report.html'}",
            f"weights:     {run / 'weights.safetensors'} (of the best evaluation)",
            f"evaluate:    reprise eval {run}",
            f"compare:     reprise ui --runs {run.parent}",
        ]
    )
