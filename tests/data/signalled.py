"""A training pass of which all processes are signalled, as a terminal and a scheduler do."""

import os
import signal
from pathlib import Path

import torch

from data_prep.manifest import Manifest
from pipeline.config import Augmentation
from pipeline.data import Loader, train_loader
from pipeline.distributed import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def loader(root: Path, workers: int) -> Loader:
    return train_loader(
        Manifest.load(root),
        reader="torch",
        workers=workers,
        augment=Augmentation(flip=True),
        world=World(),
        global_batch=6,
        accumulation=1,
        seed=0,
    )


def main(root: Path) -> None:
    """Every batch comes, and nobody says anything."""
    os.setpgid(0, 0)
    for number in SIGNALS:  # as the trainer does, which then asks for one batch more
        signal.signal(number, lambda *_: None)
    signalled = loader(root, workers=2)
    batches = iter(signalled)
    found = [next(batches) for _ in range(2)]  # one of each worker
    for number in SIGNALS:
        os.killpg(0, number)
    found += batches
    signalled.close()
    for ours, theirs in zip(found, loader(root, workers=0), strict=True):
        assert ours.keys == theirs.keys
        assert torch.equal(ours.images, theirs.images)
