"""Batches of a prepared shard set: the same from either reader, for any number of ranks."""

from __future__ import annotations

from data_prep.manifest import Manifest
from pipeline.config import Augmentation
from pipeline.data.augment import Transform
from pipeline.data.dali import DaliReader
from pipeline.data.loader import Batch, Loader, Reader
from pipeline.data.order import BatchPlan, EvaluationPlan
from pipeline.data.shards import ShardSet
from pipeline.data.torch import TorchReader
from pipeline.distributed import World

__all__ = ["READERS", "Batch", "BatchPlan", "Loader", "Reader", "eval_loader", "train_loader"]

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
) -> Loader:
    """Augmented micro-batches of the train split, without end: one epoch per pass.

    `global_batch` is over all ranks and all accumulation steps; `workers` are decoding threads
    (dali) or processes (torch; 0: none). Raises ValueError for a batch that cannot be divided, a
    crop that does not fit, an unknown reader and a damaged shard set.
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
    )
    transform = Transform(augment, plan, manifest.image_size)
    return Loader(
        plan,
        transform,
        _reader(reader)(shards, transform, workers, world.device),
        manifest,
        world.device,
    )


def eval_loader(
    manifest: Manifest,
    *,
    reader: str,
    augment: Augmentation,
    batch_size: int,
    world: World,
    workers: int,
    split: str | None = None,
) -> Loader:
    """A split in order, this rank's contiguous part of it: over all ranks each sample once.

    `split=None` is the manifest's evaluation split. The last batch may be short, and a rank may
    have none. Raises ValueError as `train_loader` does, and for an unknown split.
    """
    if split is not None and split not in manifest.splits:
        raise ValueError(f"no split {split!r} in {manifest.root}: use {sorted(manifest.splits)}")
    chosen = manifest.evaluation if split is None else manifest.splits[split]
    shards = ShardSet(manifest, chosen)
    plan = EvaluationPlan(len(shards), batch_size, world.rank, world.world_size)
    transform = Transform(augment, plan, manifest.image_size)
    return Loader(
        plan,
        transform,
        _reader(reader)(shards, transform, workers, world.device),
        manifest,
        world.device,
    )


def _reader(name: str) -> type[DaliReader] | type[TorchReader]:
    if name not in READERS:
        raise ValueError(f"no reader {name!r}: use one of {sorted(READERS)}")
    return READERS[name]
