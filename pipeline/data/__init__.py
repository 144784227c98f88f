"""Batches of a prepared shard set: the same from either reader, for any number of ranks."""

from __future__ import annotations

from data_prep.manifest import Manifest
from pipeline.config import Augmentation
from pipeline.data.augment import Transform
from pipeline.data.dali import DaliReader
from pipeline.data.finish import Labelled, Noisy
from pipeline.data.loader import Batch, Finish, Loader, Reader
from pipeline.data.noise import Noise
from pipeline.data.order import BatchPlan, EvaluationPlan, Plan
from pipeline.data.shards import ShardSet
from pipeline.data.torch import TorchReader
from pipeline.distributed import World

__all__ = [
    "READERS",
    "Batch",
    "BatchPlan",
    "Loader",
    "Noise",
    "Reader",
    "eval_loader",
    "train_loader",
]

READERS: dict[str, type[DaliReader] | type[TorchReader]] = {
    "dali": DaliReader,
    "torch": TorchReader,
}


def train_loader(
    manifest: Manifest,
    *,
    reader: str,
    augment: Augmentation,
    global_batch: int,
    accumulation: int,
    world: World,
    seed: int,
    workers: int,
    repeats: int = 1,
    noise: Noise | None = None,
) -> Loader:
    """Augmented micro-batches of the train split, without end: one epoch per pass.

    `global_batch` is over all ranks and all accumulation steps; `workers` are decoding threads
    (dali) or processes (torch; 0: none); an epoch visits every sample `repeats` times. With
    `noise`, the batches are pairs of noisy and clean images. Raises ValueError for a batch that
    cannot be divided, a crop that does not fit, an unknown reader and a damaged shard set.
    """
    shards = ShardSet(manifest, manifest.train)
    plan = BatchPlan(
        samples=len(shards),
        global_batch=global_batch,
        accumulation=accumulation,
        rank=world.rank,
        world_size=world.world_size,
        seed=seed,
        shard_sizes=shards.sizes,
        repeats=repeats,
    )
    return _loader(manifest, shards, plan, reader, augment, world, workers, noise)


def eval_loader(
    manifest: Manifest,
    *,
    reader: str,
    augment: Augmentation,
    batch_size: int,
    world: World,
    workers: int,
    split: str | None = None,
    noise: Noise | None = None,
) -> Loader:
    """A split in order, this rank's contiguous part of it: over all ranks each sample once.

    `split=None` is the manifest's evaluation split. The last batch may be short, and a rank may
    have none. With `noise`, images are whole and may differ in size: each is a batch.
    Raises ValueError as `train_loader` does, and for an unknown split.
    """
    if split is not None and split not in manifest.splits:
        raise ValueError(f"no split {split!r} in {manifest.root}: use {sorted(manifest.splits)}")
    chosen = manifest.evaluation if split is None else manifest.splits[split]
    shards = ShardSet(manifest, chosen)
    plan = EvaluationPlan(
        len(shards), batch_size if noise is None else 1, world.rank, world.world_size
    )
    return _loader(manifest, shards, plan, reader, augment, world, workers, noise)


def _loader(
    manifest: Manifest,
    shards: ShardSet,
    plan: Plan,
    reader: str,
    augment: Augmentation,
    world: World,
    workers: int,
    noise: Noise | None,
) -> Loader:
    transform = Transform(augment, plan, manifest.image_size, denoising=noise is not None)
    finish: Finish
    if noise is None:
        finish = Labelled(transform, manifest, world.device)
    else:
        finish = Noisy(transform, noise, world.device)
    decode = _reader(reader)(shards, transform, workers, world.device)
    return Loader(plan, transform, decode, finish)


def _reader(name: str) -> type[DaliReader] | type[TorchReader]:
    if name not in READERS:
        raise ValueError(f"no reader {name!r}: use one of {sorted(READERS)}")
    return READERS[name]
