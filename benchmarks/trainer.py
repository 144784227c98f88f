"""The trainer's throughput over that of a bare PyTorch loop: same network, same batches.

    python -m benchmarks.trainer --data data/cifar10 [train.compile=true ...]

Three contestants alternate in one process: the bare loop and the trainer on batches held in memory,
and the trainer on a shard set through its reader. Checkpoints and evaluations are not in the time,
all that the trainer does in a step is; metrics are computed and given to nobody.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import click
import torch
from torch.nn import functional as F

from benchmarks.measure import Spread, alternate, machine, now, ratio
from data_prep.manifest import Manifest
from pipeline import recipes
from pipeline.config import Config, Train
from pipeline.data import Batch, train_loader
from pipeline.distributed import World
from pipeline.models import Network, create_model
from pipeline.training import compiling, optim
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.engine import DTYPES, Engine
from pipeline.training.trainer import MetricSink, Trainer

IN_MEMORY = 4  # different batches, so that no cache holds a step's input
WARM = 3  # steps of each round before its time begins; readers fill their queues in them


class InMemory:
    """The same few batches again and again, as the trainer's loader."""

    def __init__(self, batches: list[Batch], steps_per_epoch: int) -> None:
        self.batches = batches
        self.steps_per_epoch = steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(itertools.cycle(self.batches), self.steps_per_epoch)

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


class NoSink:
    """Takes the metrics and keeps none."""

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...


@dataclass
class Watch:
    """Seconds that `steps` steps take after `warm` of them."""

    warm: int
    steps: int
    device: torch.device
    seen: int = 0
    started: float = 0.0
    seconds: float = 0.0

    def start(self) -> None:
        self.seen = 0

    def step(self, *_: object) -> None:
        self.seen += 1
        if self.seen == self.warm:
            self.started = now(self.device)
        elif self.seen == self.warm + self.steps:
            self.seconds = now(self.device) - self.started


def bare_loop(
    model: Network,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    config: Config,
    stepped: Callable[[], None],
) -> None:
    """What one would write by hand: cross entropy plus DRNN Eq. 12, backward, update."""
    dtype = DTYPES[config.train.precision]
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        with torch.autocast(batch.images.device.type, dtype, enabled=dtype != torch.float32):
            logits, routes = model(batch.images)
        loss = F.cross_entropy(logits.float(), batch.labels)
        gated = [route for route in routes if route.target is not None]
        if gated:
            rates = torch.stack([route.weights.mean(0).sum() for route in gated])
            aims = [sum(r.target**i for i in range(1, r.weights.shape[1] + 1)) for r in gated]
            loss = loss + (rates - rates.new_tensor(aims)).square().mean()
        loss.backward()
        optimizer.step()
        stepped()


@dataclass
class Bench:
    """The contestants, each with its own network of the same initial weights."""

    config: Config
    world: World
    manifest: Manifest
    folder: Path
    watch: Watch

    def contestants(self) -> dict[str, Callable[[], float]]:
        """Name -> one round, in images/s."""
        memory = self.in_memory()
        return {
            "bare loop": self.bare(memory.batches),
            "trainer": self.trained("memory", memory),
            f"trainer with {self.config.data.reader}": self.trained("reader", self._reader()),
        }

    def in_memory(self) -> InMemory:
        real = self._reader()
        batches = [
            Batch(batch.images.clone(memory_format=torch.preserve_format), batch.labels, batch.keys)
            for batch in itertools.islice(real, IN_MEMORY)
        ]
        real.close()
        return InMemory(batches, steps_per_epoch=2**31)

    def bare(self, batches: list[Batch]) -> Callable[[], float]:
        model = self._model()
        if self.config.train.compile:
            compiling.begin(model, self.config, self.world.device)
        optimizer = optim.build(model, self.config.optimizer)
        steps = self.watch.warm + self.watch.steps

        def measure() -> float:
            self.watch.start()
            some = itertools.islice(itertools.cycle(batches), steps)
            bare_loop(model, optimizer, some, self.config, self.watch.step)
            return self._rate()

        return measure

    def trained(
        self, name: str, loader: object, sink: MetricSink | None = None
    ) -> Callable[[], float]:
        trainer = self._trainer(name, loader, sink or NoSink())

        def measure() -> float:
            self.watch.start()
            trainer.train(trainer.progress.step + self.watch.warm + self.watch.steps)
            return self._rate()

        return measure

    def _rate(self) -> float:
        return self.watch.steps * self.config.train.batch_size / self.watch.seconds

    def _model(self) -> Network:
        return network(self.config, len(self.manifest.classes)).to(self.world.device)

    def _reader(self) -> object:
        data, train = self.config.data, self.config.train
        return train_loader(
            self.manifest,
            reader=data.reader,
            augment=data.augment,
            global_batch=train.batch_size,
            accumulation=train.accumulation,
            world=self.world,
            seed=self.config.seed,
            workers=data.workers,
        )

    def _trainer(self, name: str, loader: object, sink: MetricSink) -> Trainer:
        model = self._model()
        return Trainer(
            config=self.config,
            world=self.world,
            model=model,
            build_engine=lambda own, _: Engine(model, own, self.world, lambda step: 1.0),
            loader=loader,
            store=CheckpointStore(self.folder / name, self.world, keep_last=1),
            evaluate=lambda step: {"eval/top1": 0.0},
            sink=sink,
            shared={},
            identity={},
            run_dir=self.folder,
            stop_requested=lambda: False,
            on_step=self.watch.step,
        )


def configuration(
    data: Path, recipe: str, batch_size: int, precision: str, others: Sequence[str] = ()
) -> Config:
    """The recipe, in which no epoch ends with an evaluation."""
    return recipes.load(
        recipe,
        [
            f"data.path={data}",
            f"train.batch_size={batch_size}",
            f"train.precision={precision}",
            "train.epochs=1000000",
            "train.evaluate_every=1000000",
            "checkpoints.every_minutes=null",
            *others,
        ],
    )


def refuse_unequal(config: Config) -> None:
    """The bare loop would do less than the trainer.

    Raises:
        click.UsageError: it has no such thing.
    """
    train = config.train
    lacking = {
        "train.accumulation": train.accumulation > 1,
        "train.ema_decay": train.ema_decay is not None,
        "optimizer.clip_norm": config.optimizer.clip_norm is not None,
        "steps": bool(config.steps.probabilities),
        "data.sigma": config.data.sigma is not None,
        "phases": bool(config.phases),
        "pull": config.pull is not None,
    }
    if odd := [name for name, has in lacking.items() if has]:
        raise click.UsageError(f"the bare loop has no {', '.join(odd)}: give another recipe")


def network(config: Config, classes: int) -> Network:
    """The same initial weights for every contestant."""
    torch.manual_seed(config.seed)
    return create_model(config.model, num_classes=classes, **config.model_options)


@click.command(help=__doc__)
@click.option("--data", type=Path, required=True, help="A prepared shard set.")
@click.option("--recipe", default="drnn/cifar10/dr_resnet16", show_default=True)
@click.option("--batch-size", default=256, show_default=True)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    type=click.Choice(get_args(Train.model_fields["precision"].annotation)),
)
@click.option("--steps", default=12, show_default=True, help="Timed steps per round.")
@click.option("--rounds", default=9, show_default=True)
@click.argument("overrides", nargs=-1)
def main(
    data: Path,
    recipe: str,
    batch_size: int,
    precision: str,
    steps: int,
    rounds: int,
    overrides: tuple[str, ...],
) -> None:
    before = machine()
    world = World.detect()
    world.start()
    config = configuration(data, recipe, batch_size, precision, overrides)
    refuse_unequal(config)
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(WARM, steps, world.device)
        bench = Bench(config, world, Manifest.load(data), Path(folder), watch)
        figures = alternate(bench.contestants(), rounds)
    world.stop()
    print(f"{recipe}, batch {batch_size}, {precision}, {steps} steps per round\n{before}")
    for name, values in figures.items():
        compared = ratio(figures, name, "bare loop").text(3)
        print(f"{name:20} {Spread.of(values).text(0):>32} images/s, ratio {compared}")


if __name__ == "__main__":
    main()
