"""mosaicml-streaming's side of benchmarks.imagenet; runs in an environment of its own.

python streaming_peer.py write IMAGES.tar COPIES WORKERS OUT   prints images/s of writing
python streaming_peer.py read OUT WORKERS BATCHES              prints images/s of loading
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import sys
import tarfile
import time
from pathlib import Path

from PIL import Image

SHORT, QUALITY, SIZE, BATCH = 256, 90, 224, 64


def encoded(archive: str) -> list[bytes]:
    with tarfile.open(archive) as tar:
        return [tar.extractfile(member).read() for member in tar if member.isfile()]


def resized(data: bytes) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = SHORT / min(image.size)
    if scale < 1:
        size = [max(SHORT, round(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def write_share(arguments: tuple[str, int, int, int, str]) -> None:
    from streaming import MDSWriter

    archive, copies, worker, workers, out = arguments
    images = encoded(archive)
    with MDSWriter(
        out=f"{out}/{worker}", columns={"image": "bytes", "label": "int"}, hashes=["sha1"]
    ) as writer:
        for number in range(worker, copies * len(images), workers):
            data = resized(images[number % len(images)])
            writer.write({"image": data, "label": number % 1000})


def write(archive: str, copies: str, workers: str, out: str) -> float:
    from streaming.base.util import merge_index

    count = int(workers)
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        pool.map(time.sleep, [0.1] * count)  # the processes are there
        started = time.perf_counter()
        shares = [(archive, int(copies), worker, count, out) for worker in range(count)]
        pool.map(write_share, shares, chunksize=1)
        merge_index(out, keep_local=True)
        seconds = time.perf_counter() - started
    return int(copies) * len(encoded(archive)) / seconds


def read(out: str, workers: str, batches: str) -> float:
    import torch
    from streaming import StreamingDataset
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    class Images(StreamingDataset):
        def __getitem__(self, number: int) -> torch.Tensor:
            return transform(Image.open(io.BytesIO(super().__getitem__(number)["image"])))

    dataset = Images(local=out, shuffle=True, batch_size=BATCH)
    loader = torch.utils.data.DataLoader(dataset, BATCH, num_workers=int(workers), drop_last=True)
    running = itertools.chain.from_iterable(loader for _ in itertools.count())
    next(running)
    started = time.perf_counter()
    images = sum(len(batch) for batch in itertools.islice(running, int(batches)))
    return images / (time.perf_counter() - started)


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "write":
        Path(rest[-1]).mkdir(parents=True, exist_ok=True)
    print({"write": write, "read": read}[command](*rest))
