"""Images per second of both readers, beside bare decoders and webdataset's own pipeline.

    python -m benchmarks.readers --data data/cifar10 --cores 1
    python -m benchmarks.readers --data data/cifar10 --cores 2

All do the same to the train split of a shard set of 32x32 images: decode, pad and crop, flip,
normalise. Every contestant has the same cores, and as many decoding threads or processes as cores.
Where there is a CUDA device, DALI decodes on it and all batches end there.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks.measure import Spread, alternate, machine, now, ratio
from data_prep.manifest import Manifest
from pipeline.config import Augmentation
from pipeline.data import train_loader
from pipeline.distributed import World

PADDING = 4  # pixels
SIZE = 32  # pixels
WARM = 10  # batches of each round before its time begins: processes start, queues fill


@dataclass(frozen=True)
class Setting:
    """What all contestants have in common."""

    manifest: Manifest
    batch_size: int
    cores: int
    device: torch.device

    @property
    def shards(self) -> list[str]:
        return [str(self.manifest.root / shard.name) for shard in self.manifest.train.shards]

    @property
    def indices(self) -> list[str]:
        return [str(self.manifest.root / shard.index) for shard in self.manifest.train.shards]

    def reader(self, name: str) -> Iterator[Tensor]:
        """A reader of the project."""
        loader = train_loader(
            self.manifest,
            reader=name,
            augment=Augmentation(crop="pad", padding=PADDING, size=SIZE, flip=True),
            global_batch=self.batch_size,
            accumulation=1,
            world=World(device=self.device),
            seed=0,
            workers=self.cores,
        )
        while True:
            for batch in loader:
                yield batch.images

    def dali(self) -> Iterator[Tensor]:
        """DALI alone: its own webdataset reader, random numbers and normalisation."""
        from nvidia.dali import fn, pipeline_def, types
        from torch.utils.dlpack import from_dlpack

        mean = [255 * value for value in self.manifest.channel_mean]
        std = [255 * value for value in self.manifest.channel_std]

        cuda = self.device.type == "cuda"

        @pipeline_def(
            batch_size=self.batch_size,
            num_threads=self.cores,
            device_id=self.device.index if cuda else None,
            exec_dynamic=True,
        )
        def pipeline() -> object:
            encoded, label = fn.readers.webdataset(
                paths=self.shards,
                index_paths=self.indices,
                ext=["jpg;png", "cls"],
                random_shuffle=True,
                missing_component_behavior="error",
            )
            decoder = "mixed" if cuda else "cpu"
            images = fn.decoders.image(encoded, device=decoder, output_type=types.RGB)
            corner = fn.random.uniform(range=[0, 2 * PADDING], shape=2)
            images = fn.slice(
                images,
                start=fn.cast(corner, dtype=types.INT32) - PADDING,
                shape=[SIZE, SIZE],
                axes=[0, 1],
                out_of_bounds_policy="pad",
                fill_values=0,
            )
            flip = fn.random.coin_flip()
            images = fn.crop_mirror_normalize(
                images, mirror=flip, mean=mean, std=std, output_layout="HWC", dtype=types.FLOAT
            )
            return images, label

        running = pipeline()
        running.build()
        while True:
            images, _ = running.run()
            yield from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)

    def torchvision(self) -> Iterator[Tensor]:
        """torchvision on encoded images in memory: in this process, or in DataLoader workers."""
        from torch.utils.data import DataLoader

        images = EncodedImages.of(self)
        workers = self.cores if self.cores > 1 else 0
        while True:
            for batch in DataLoader(images, self.batch_size, shuffle=True, num_workers=workers):
                yield batch.to(self.device)

    def webdataset(self) -> Iterator[Tensor]:
        """webdataset's own pipeline, with Pillow as its decoder."""
        import webdataset as wds

        dataset = (
            wds.WebDataset(self.shards, shardshuffle=100, seed=0)
            .shuffle(1000)
            .decode("pil")
            .to_tuple("jpg;png", "cls")
            .map_tuple(Augment.of(self), int)
            .batched(self.batch_size, partial=False)
        )
        while True:
            for images, _ in wds.WebLoader(dataset, batch_size=None, num_workers=self.cores):
                yield images.to(self.device)


class Augment:
    """One image, PIL or uint8 tensor, to the network's input as torchvision's users write it."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        from torchvision.transforms import v2

        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.RandomCrop(SIZE, padding=PADDING),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
            ]
        )

    @classmethod
    def of(cls, setting: Setting) -> Augment:
        return cls(setting.manifest.channel_mean, setting.manifest.channel_std)

    def __call__(self, image: object) -> Tensor:
        return self.transform(image)


class EncodedImages(torch.utils.data.Dataset):
    """Encoded images in memory."""

    def __init__(self, encoded: list[Tensor], augment: Augment) -> None:
        self.encoded = encoded
        self.augment = augment

    @classmethod
    def of(cls, setting: Setting) -> EncodedImages:
        """Those of the first shard."""
        import webdataset as wds

        samples = wds.WebDataset(setting.shards[:1], shardshuffle=False).to_tuple("jpg;png")
        encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for (data,) in samples]
        return cls(encoded, Augment.of(setting))

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Tensor:
        from torchvision.io import ImageReadMode, decode_image

        return self.augment(decode_image(self.encoded[index], ImageReadMode.RGB))


def throughput(
    batches: Callable[[], Iterator[Tensor]], timed: int, device: torch.device
) -> Callable[[], float]:
    """One round: images/s of `timed` batches, from a fresh start."""

    def measure() -> float:
        running = batches()
        for _ in itertools.islice(running, WARM):
            pass
        started = now(device)
        images = sum(len(batch) for batch in itertools.islice(running, timed))
        seconds = now(device) - started
        running.close()
        return images / seconds

    return measure


@click.command(help=__doc__)
@click.option("--data", type=Path, required=True, help="A prepared shard set of 32x32 images.")
@click.option("--cores", default=1, show_default=True)
@click.option("--batch-size", default=256, show_default=True)
@click.option("--batches", default=60, show_default=True, help="Timed batches per round.")
@click.option("--rounds", default=7, show_default=True)
def main(data: Path, cores: int, batch_size: int, batches: int, rounds: int) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(cores)
    before = machine()
    device = World.detect().device
    setting = Setting(Manifest.load(data), batch_size, cores, device)
    contestants = {
        "dali reader": lambda: setting.reader("dali"),
        "DALI alone": setting.dali,
        "torch reader": lambda: setting.reader("torch"),
        "torchvision": setting.torchvision,
        "webdataset": setting.webdataset,
    }
    figures = alternate(
        {name: throughput(source, batches, device) for name, source in contestants.items()}, rounds
    )
    print(f"{data.name}, batch {batch_size}, {batches} batches per round\n{before}")
    for name, values in figures.items():
        compared = ratio(figures, name, "DALI alone").text(2)
        print(f"{name:13} {Spread.of(values).text(0):>36} images/s, to DALI alone {compared}")


if __name__ == "__main__":
    main()
