"""The webdataset and torchvision reader."""

from __future__ import annotations

import itertools
import multiprocessing.context
import signal
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from pipeline.data.augment import Transform, resize, upload
from pipeline.data.loader import Decoded
from pipeline.data.order import BatchPlan
from pipeline.data.shards import ShardError, ShardSet
from pipeline.signals import withheld

AHEAD = 2  # batches per worker process
PATIENCE = 5  # seconds until the status of a worker that has ended is known
WANT = "give fewer (data.workers), or smaller batches"
CAUSES = {
    signal.SIGKILL: f"most likely for want of memory: {WANT}",
    signal.SIGBUS: f"most likely for want of shared memory (/dev/shm): {WANT}",
}
TRY_DALI = "try data.reader=dali"
OTHER_CAUSE = f"not by a damaged image, which its checksum would have told of: {TRY_DALI}"


class TorchReader:
    """Samples in planned order through a webdataset pipeline, decoded and cut by torchvision.

    `workers` processes take whole batches in turn; 0: all in the calling process. In training they
    go on from epoch to epoch: to start them takes longer than a small set's epoch.
    """

    def __init__(
        self, shards: ShardSet, transform: Transform, workers: int, device: torch.device
    ) -> None:
        self._shards = shards
        self._transform = transform
        self._workers = workers
        self._device = device
        # The epoch that comes next, and its batches.
        self._ahead: tuple[int, Generator[Decoded | ShardError, None, None]] | None = None

    def batches(self, epoch: int, first_step: int) -> Generator[Decoded, None, None]:
        plan = self._transform.plan
        steps = plan.steps_per_epoch - first_step
        if steps <= 0:
            return
        items = self._from(epoch, first_step)
        try:
            for item in itertools.islice(items, steps):
                if isinstance(item, ShardError):
                    raise item
                yield replace(item, images=upload(item.images, self._device))
            if isinstance(plan, BatchPlan):
                self._ahead = epoch + 1, items
        finally:
            if self._ahead is None:
                items.close()
            self._shards.close()

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead[1].close()
            self._ahead = None

    def _from(self, epoch: int, first_step: int) -> Generator[Decoded | ShardError, None, None]:
        """The items of an epoch from a step on, in training those of the epochs after it too."""
        if self._ahead is not None and (self._ahead[0], 0) == (epoch, first_step):
            items = self._ahead[1]
            self._ahead = None
            return items
        self.close()
        return self._start(epoch, first_step)

    def _start(self, epoch: int, first_step: int) -> Generator[Decoded | ShardError, None, None]:
        import webdataset as wds

        plan, workers = self._transform.plan, self._workers
        if not isinstance(plan, BatchPlan):
            workers = min(workers, plan.steps_per_epoch - first_step)
        pipeline = wds.DataPipeline(
            _PlannedSamples(self._shards, self._transform, epoch, first_step),
            wds.map(_Decode(self._transform)),
            wds.batched(plan.batch_size, collation_fn=_collate, partial=True),
            _errors_as_items,
        )
        processes = _clean_processes() if workers else None
        loader = wds.WebLoader(
            pipeline,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=AHEAD if workers else None,
            multiprocessing_context=processes,
            # Without one of its own it draws from the default generator at every start, which
            # would shift the gates' noise in a resumed run.
            generator=torch.Generator(),
        )
        return _naming_the_killed(iter(loader), processes)


@dataclass(frozen=True)
class _PlannedSamples:
    """Source of a webdataset pipeline: this worker's batches, sample by sample.

    From a step of an epoch to the end of evaluation's only one, in training without end.
    """

    shards: ShardSet
    transform: Transform
    epoch: int
    first_step: int

    def __call__(self) -> Iterator[dict[str, Any]]:
        plan = self.transform.plan
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in itertools.count(self.first_step + number, count):
            later, step = divmod(batch, plan.steps_per_epoch)
            if later and not isinstance(plan, BatchPlan):
                return
            epoch = self.epoch + later
            rows = plan.rows(epoch, step)
            samples = self.shards.read(rows.samples)
            sizes = self.shards.image_sizes(samples)
            if self.transform.flip or self.transform.crop != "none":
                geometry = self.transform.geometry(epoch, rows, sizes)
                boxes, flips = geometry.boxes.tolist(), geometry.flips.tolist()
            else:
                boxes, flips = [None] * len(samples), [False] * len(samples)
            for sample, box, flip in zip(samples, boxes, flips, strict=True):
                yield {
                    "__key__": sample.key,
                    "__url__": str(sample.shard),
                    sample.extension: sample.data,
                    "cls": sample.label,
                    "box": box,
                    "flip": flip,
                    "sample": sample,
                }


@dataclass(frozen=True)
class _Decode:
    """One encoded sample to its (size, size, channels) uint8 image, label and key."""

    transform: Transform

    def __call__(self, item: dict[str, Any]) -> tuple[torch.Tensor, int, str]:
        from torchvision.io import ImageReadMode, decode_image

        try:
            mode = ImageReadMode.GRAY if self.transform.denoising else ImageReadMode.RGB
            image = decode_image(torch.from_numpy(item["sample"].data), mode)
        except RuntimeError as error:
            raise item["sample"].undecodable() from error
        # So it lies in memory already: nothing is rearranged on the way to the batch.
        image = image.permute(1, 2, 0)
        return self._cut(image, item["box"], item["flip"]), item["cls"], item["__key__"]

    def _cut(self, image: torch.Tensor, box: list[int] | None, flip: bool) -> torch.Tensor:
        transform = self.transform
        if transform.crop != "none":
            assert box is not None
            image = _crop(image, *box)
        if transform.resize is not None:
            image = resize(image, transform.resize)
        if transform.margin:
            margin, size = transform.margin, transform.size
            image = _crop(image, margin, margin, size, size)
        return image.flip(1) if flip else image


def _crop(image: torch.Tensor, top: int, left: int, height: int, width: int) -> torch.Tensor:
    """The box, zero where it reaches outside the image (height, width, channels).

    torchvision's own takes longer than to decode an image of CIFAR's size.
    """
    inside = image[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    if inside.shape[:2] == (height, width):
        return inside
    box = image.new_zeros(height, width, image.shape[2])
    y, x = max(-top, 0), max(-left, 0)
    box[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return box


class _Workers(multiprocessing.context.ForkServerContext):
    """A context that knows the processes that the loader started with it."""

    def __init__(self) -> None:
        super().__init__()
        self._started: list[ForkServerProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> ForkServerProcess:  # type: ignore[override]
        worker = ForkServerProcess(*args, **kwargs)
        self._started.append(worker)
        return worker

    def ending(self) -> str:
        """How those that have ended did, and what to do about it."""
        connection.wait([worker.sentinel for worker in self._started], PATIENCE)
        codes = [worker.exitcode for worker in self._started if worker.exitcode is not None]
        signals = [signal.Signals(-code) for code in codes if code < 0]
        if not signals:
            return f"ended with status {max(codes, default=0)}: {TRY_DALI}"
        first = min(signals, key=lambda number: number not in CAUSES)
        return f"was ended by {first.name}, {CAUSES.get(first, OTHER_CAUSE)}"


def _clean_processes() -> _Workers:
    """Workers from a server without threads.

    A fork of the training process can hang on a lock or a library's thread that it did not get.
    The server imports once what the workers need; it ends with this process.
    """
    context = _Workers()
    context.set_forkserver_preload([__name__, "webdataset", "torchvision.transforms.v2"])
    # The trainer may want one more batch of them. To start the tracker takes two of the signals off
    # the mask that the workers inherit from the server.
    for start in (resource_tracker.ensure_running, forkserver.ensure_running):
        with withheld():
            start()
    return context


def _naming_the_killed(
    batches: Generator[Decoded | ShardError, None, None], processes: _Workers | None
) -> Generator[Decoded | ShardError, None, None]:
    """The same batches; raises ValueError where a worker process has ended."""
    try:
        yield from batches
    except (RuntimeError, ConnectionError, EOFError) as error:
        # The last two come where it had said that a batch is ready, and cannot hand it over.
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker (pid"):
            raise
        assert processes is not None, "there are workers where one can end"
        raise ValueError(f"a worker process of the reader {processes.ending()}") from error


def _collate(items: Iterable[tuple[torch.Tensor, int, str]]) -> Decoded:
    images, labels, keys = zip(*items, strict=True)
    return Decoded(
        torch.stack(images),
        np.array(labels, dtype=np.int64),
        tuple(keys),
    )


def _errors_as_items(items: Iterable[Decoded]) -> Iterator[Decoded | ShardError]:
    """A worker's error as it is: raised there, it would come back wrapped in a traceback."""
    try:
        yield from items
    except ShardError as error:
        yield error
