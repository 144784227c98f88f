"""Who loads ImageNet's photographs for training: ours, what others write by hand, and no loader."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import streaming_peer
from data_prep.manifest import Manifest
from data_prep.parallel import run_parallel
from pipeline.config import Augmentation
from pipeline.data import train_loader
from pipeline.distributed import World

SIZE, BATCH = streaming_peer.SIZE, streaming_peer.BATCH
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def our_loader(root: Path, reader: str, cores: int) -> Iterator[Tensor]:
    loader = train_loader(
        Manifest.load(root),
        reader=reader,
        augment=Augmentation(crop="random_resized", size=SIZE, flip=True),
        global_batch=BATCH,
        accumulation=1,
        world=World(),
        seed=0,
        workers=cores,
    )
    while True:
        for batch in loader:
            yield batch.images


def pillow_transform() -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


class PillowImages(torch.utils.data.Dataset):
    """Encoded images in memory, decoded as torchvision's users do."""

    def __init__(self, images: Path) -> None:
        self.encoded = streaming_peer.encoded(str(images))
        self.transform = pillow_transform()

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, number: int) -> Tensor:
        from PIL import Image

        return self.transform(Image.open(io.BytesIO(self.encoded[number])).convert("RGB"))


def pillow_loader(images: Path, cores: int) -> Iterator[Tensor]:
    loader = torch.utils.data.DataLoader(
        PillowImages(images), BATCH, shuffle=True, num_workers=cores, drop_last=True
    )
    while True:
        yield from loader


def webdataset_loader(root: Path, cores: int) -> Iterator[Tensor]:
    import webdataset as wds

    shards = [str(root / shard.name) for shard in Manifest.load(root).train.shards]
    dataset = (
        wds.WebDataset(shards, shardshuffle=100, seed=0)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;png")
        .map_tuple(pillow_transform())
        .batched(BATCH, partial=False)
    )
    while True:
        for (images,) in wds.WebLoader(dataset, batch_size=None, num_workers=cores):
            yield images


def crop_share(task: tuple[str, int]) -> float:
    """CPU seconds in which one process decodes, crops and resizes so many images, and no more."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import v2

    images, count = task
    torch.set_num_threads(1)
    encoded = [
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for data in streaming_peer.encoded(images)
    ]
    crop = v2.RandomResizedCrop(SIZE, antialias=True)
    started = time.process_time()
    for data in itertools.islice(itertools.cycle(encoded), count):
        crop(decode_jpeg(data, mode=ImageReadMode.RGB))
    return time.process_time() - started


def bare_crop(images: Path, count: int, cores: int) -> float:
    tasks = [(str(images), count // cores)] * cores
    return cores * (count // cores) / max(s for _, s in run_parallel(crop_share, tasks, cores))


def loaded(source: Callable[[], Iterator[Tensor]], batches: int) -> float:
    running = source()
    for _ in itertools.islice(running, 3):
        pass
    started = time.perf_counter()
    images = sum(len(batch) for batch in itertools.islice(running, batches))
    seconds = time.perf_counter() - started
    running.close()
    return images / seconds


def loading_cost(source: Callable[[], Iterator[Tensor]], batches: int) -> float:
    """Images per CPU second of this process, its threads included."""
    running = source()
    next(running)
    started = time.process_time()
    images = sum(len(batch) for batch in itertools.islice(running, batches))
    seconds = time.process_time() - started
    running.close()
    return images / seconds
