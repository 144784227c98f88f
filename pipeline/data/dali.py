"""The DALI reader: one pipeline definition for the CPU and for CUDA."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.dlpack import from_dlpack

from pipeline.data.augment import Geometry, Transform, resize
from pipeline.data.loader import Decoded
from pipeline.data.order import BatchPlan
from pipeline.data.prefetch import prefetch
from pipeline.data.shards import Sample, ShardError, ShardSet

AHEAD = 2  # decoded batches waiting for the consumer


@dataclass(frozen=True)
class _Encoded:
    samples: list[Sample]
    geometry: Geometry | None


class DaliReader:
    """Encoded bytes and drawn boxes in, decoded batches out.

    `workers` threads decode; one more reads ahead. On CUDA, JPEGs are decoded and resized on the
    device. On CPUs, where DALI takes four times as long as torchvision to resize an image, DALI
    hands the crops over, and as many threads again resize them.
    """

    def __init__(
        self, shards: ShardSet, transform: Transform, workers: int, device: torch.device
    ) -> None:
        self._shards = shards
        self._transform = transform
        self._threads = max(workers, 1)
        self._device = device
        self._resizes = device.type == "cpu" and transform.resize is not None
        # Building takes seconds on CUDA, so a pipeline that was emptied serves the next pass.
        self._emptied: Any = None

    def batches(self, epoch: int, first_step: int) -> Generator[Decoded, None, None]:
        if first_step >= self._transform.plan.steps_per_epoch:
            return
        decoded = prefetch(self._decode(epoch, first_step), AHEAD)
        in_use: deque[tuple[torch.Tensor, Any]] = deque()
        try:
            for output, samples in decoded:
                images = from_dlpack(output)
                labels = np.array([sample.label for sample in samples])
                yield Decoded(images, labels, tuple(sample.key for sample in samples))
                if self._device.type == "cuda":
                    _keep_until_used(images, in_use)
        finally:
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            decoded.close()
            self._shards.close()

    def close(self) -> None:
        self._emptied = None

    def _decode(
        self, epoch: int, first_step: int
    ) -> Generator[tuple[Any, list[Sample]], None, None]:
        """Tensors of decoded images; while one batch is decoded the next is read."""
        pipeline, self._emptied = self._emptied or self._build(), None
        scheduled = _Encoded([], None)
        with ThreadPoolExecutor(self._threads) if self._resizes else nullcontext() as threads:
            for step in range(first_step, self._transform.plan.steps_per_epoch):
                encoded = self._read(epoch, step)
                # A batch that cannot be decoded may already be noticed when the next is scheduled.
                with _naming_the_culprit([*scheduled.samples, *encoded.samples]):
                    self._feed(pipeline, encoded)
                    pipeline.schedule_run()
                    images = self._output(pipeline) if scheduled.samples else None
                if images is not None:
                    yield self._resized(images, scheduled, threads), scheduled.samples
                scheduled = encoded
            with _naming_the_culprit(scheduled.samples):
                images = self._output(pipeline)
            self._emptied = pipeline
            yield self._resized(images, scheduled, threads), scheduled.samples

    def _output(self, pipeline: Any) -> Any:
        """The oldest scheduled batch in memory of its own: a tensor, or a list to be resized."""
        (images,) = pipeline.share_outputs()
        pipeline.release_outputs()
        return images if self._resizes else images.as_tensor()

    def _resized(self, images: Any, encoded: _Encoded, threads: ThreadPoolExecutor | None) -> Any:
        """A batch as (n, size, size, channels), by torchvision where DALI has not done it."""
        if threads is None:
            return images
        transform, geometry = self._transform, encoded.geometry
        side, centre = transform.resize, slice(transform.margin, transform.margin + transform.size)
        assert side is not None
        channels = 1 if transform.denoising else 3
        batch = np.empty((len(images), transform.size, transform.size, channels), np.uint8)

        def resize_every(first: int) -> None:
            for number in range(first, len(images), self._threads):
                image = torch.from_numpy(np.asarray(images[number]))
                # By numpy from here: torch would start threads of its own in each of these.
                resized = _whole_pixels(resize(image, side).numpy()[centre, centre])
                flip = geometry is not None and geometry.flips[number]
                _whole_pixels(batch[number])[:] = resized[:, ::-1] if flip else resized

        list(threads.map(resize_every, range(self._threads)))
        return torch.from_numpy(batch)

    def _read(self, epoch: int, step: int) -> _Encoded:
        transform = self._transform
        rows = transform.plan.rows(epoch, step)
        samples = self._shards.read(rows.samples)
        if not (transform.flip or transform.crop != "none"):
            return _Encoded(samples, None)
        sizes = self._shards.image_sizes(samples)
        return _Encoded(samples, transform.geometry(epoch, rows, sizes))

    def _feed(self, pipeline: Any, encoded: _Encoded) -> None:
        pipeline.feed_input("encoded", [sample.data for sample in encoded.samples])
        if encoded.geometry is None:
            return
        boxes = encoded.geometry.boxes.astype(np.int32)
        if self._transform.crop != "none":
            pipeline.feed_input("corner", np.ascontiguousarray(boxes[:, :2]))
        if self._transform.crop == "random_resized":
            pipeline.feed_input("shape", np.ascontiguousarray(boxes[:, 2:]))
        if self._transform.flip and not self._resizes:
            pipeline.feed_input("flip", encoded.geometry.flips.astype(np.int32))

    def _build(self) -> Any:
        from nvidia.dali import Pipeline

        cuda = self._device.type == "cuda"
        pipeline = Pipeline(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if cuda else None,
            # Outputs outlive the pipeline's next runs only under this executor.
            exec_dynamic=True,
            # One batch is scheduled explicitly before the one before it is taken.
            prefetch_queue_depth=1,
        )
        with pipeline:
            images = _crops(self._transform, "mixed" if cuda else "cpu")
            pipeline.set_outputs(images if self._resizes else _to_size(self._transform, images))
        pipeline.build()
        return pipeline

    @property
    def _batch_size(self) -> int:
        plan = self._transform.plan
        return (
            plan.batch_size if isinstance(plan, BatchPlan) else min(plan.batch_size, plan.samples)
        )


def _given(name: str, ndim: int) -> Any:
    """What is fed before each run."""
    from nvidia.dali import fn, types

    return fn.external_source(name=name, dtype=types.INT32, ndim=ndim)


def _crops(transform: Transform, decoder: str) -> Any:
    """Encoded bytes to (height, width, channels) uint8, cut where the transform cuts."""
    from nvidia.dali import fn, types

    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    # Orientation tags are left alone and chroma is interpolated, as Pillow and torchvision do.
    decoding = {
        "device": decoder,
        "output_type": types.GRAY if transform.denoising else types.RGB,
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,
    }
    if transform.crop == "random_resized":
        images = fn.decoders.image_slice(
            encoded, start=_given("corner", 1), shape=_given("shape", 1), axes=[0, 1], **decoding
        )
    else:
        images = fn.decoders.image(encoded, **decoding)
    if transform.crop == "pad":
        images = fn.slice(
            images,
            start=_given("corner", 1),
            shape=[transform.size, transform.size],
            axes=[0, 1],
            out_of_bounds_policy="pad",
            fill_values=0,
        )
    return images


def _to_size(transform: Transform, images: Any) -> Any:
    """The crops to (size, size, channels), one node per step of the transform."""
    from nvidia.dali import fn, types

    if transform.resize is not None:
        side = [transform.resize, transform.resize]
        images = fn.resize(images, size=side, interp_type=types.INTERP_LINEAR, antialias=True)
    if transform.margin:
        size, margin = [transform.size] * 2, [transform.margin] * 2
        images = fn.slice(images, start=margin, shape=size, axes=[0, 1])
    if transform.flip:
        images = fn.flip(images, horizontal=_given("flip", 0))
    return images


def _whole_pixels(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    """(height, width, channels) as (height, width), which numpy flips in half the time."""
    return image.view(f"V{image.shape[2]}")[..., 0]


def _keep_until_used(images: torch.Tensor, in_use: deque[tuple[torch.Tensor, Any]]) -> None:
    """Hold DALI's memory until the stream that reads it has done so: DALI does not wait for it."""
    event = torch.cuda.Event()
    event.record()
    in_use.append((images, event))
    if len(in_use) > AHEAD:
        in_use.popleft()[1].synchronize()


@contextmanager
def _naming_the_culprit(samples: list[Sample]) -> Iterator[None]:
    """DALI names no sample when it cannot decode one: find it by decoding again."""
    try:
        yield
    except RuntimeError as error:
        for sample in samples:
            try:
                Image.open(io.BytesIO(sample.data.tobytes())).convert("RGB")
            except (OSError, SyntaxError):
                raise sample.undecodable() from error
        first = samples[0]
        raise ShardError(
            f"{first.shard.name}, key {first.key}: DALI cannot decode this or one of the "
            f"{len(samples) - 1} samples after it, though Pillow can "
            f"({str(error).splitlines()[0]}): run `reprise verify {first.shard.parent}`; if it "
            "finds nothing, use data.reader=torch"
        ) from error
