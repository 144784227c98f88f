"""The DALI reader: one pipeline definition for the CPU and for CUDA."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.dlpack import from_dlpack

from pipeline.data.augment import Geometry, Transform
from pipeline.data.loader import Decoded
from pipeline.data.prefetch import prefetch
from pipeline.data.shards import Sample, ShardSet

AHEAD = 2  # decoded batches waiting for the consumer


@dataclass(frozen=True)
class _Encoded:
    samples: list[Sample]
    geometry: Geometry | None


class DaliReader:
    """Encoded bytes and drawn boxes in, decoded batches out.

    `workers` threads decode; one more reads ahead. On CUDA, JPEGs are decoded on the device.
    """

    def __init__(
        self, shards: ShardSet, transform: Transform, workers: int, device: torch.device
    ) -> None:
        self._shards = shards
        self._transform = transform
        self._threads = max(workers, 1)
        self._device = device
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
        """DALI's output tensors; while one batch is decoded the next is read."""
        pipeline, self._emptied = self._emptied or self._build(), None
        scheduled: list[Sample] = []
        for step in range(first_step, self._transform.plan.steps_per_epoch):
            encoded = self._read(epoch, step)
            # A batch that cannot be decoded may already be noticed when the next is scheduled.
            with _naming_the_culprit([*scheduled, *encoded.samples]):
                self._feed(pipeline, encoded)
                pipeline.schedule_run()
                images = _output(pipeline) if scheduled else None
            if images is not None:
                yield images, scheduled
            scheduled = encoded.samples
        with _naming_the_culprit(scheduled):
            images = _output(pipeline)
        self._emptied = pipeline
        yield images, scheduled

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
        if self._transform.flip:
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
            pipeline.set_outputs(_graph(self._transform, "mixed" if cuda else "cpu"))
        pipeline.build()
        return pipeline

    @property
    def _batch_size(self) -> int:
        plan = self._transform.plan
        return min(plan.batch_size, plan.samples)


def _graph(transform: Transform, decoder: str) -> Any:
    """Encoded bytes to (size, size, channels) uint8, one node per step of the transform."""
    from nvidia.dali import fn, types

    def given(name: str, ndim: int) -> Any:
        return fn.external_source(name=name, dtype=types.INT32, ndim=ndim)

    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    # Orientation tags are left alone and chroma is interpolated, as Pillow and torchvision do.
    decoding = {
        "device": decoder,
        "output_type": types.GRAY if transform.denoising else types.RGB,
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,
    }
    size = [transform.size, transform.size]
    if transform.crop == "random_resized":
        images = fn.decoders.image_slice(
            encoded, start=given("corner", 1), shape=given("shape", 1), axes=[0, 1], **decoding
        )
    else:
        images = fn.decoders.image(encoded, **decoding)
    if transform.crop == "pad":
        images = fn.slice(
            images,
            start=given("corner", 1),
            shape=size,
            axes=[0, 1],
            out_of_bounds_policy="pad",
            fill_values=0,
        )
    if transform.resize is not None:
        resize = [transform.resize, transform.resize]
        images = fn.resize(images, size=resize, interp_type=types.INTERP_LINEAR, antialias=True)
    if transform.margin:
        margin = [transform.margin, transform.margin]
        images = fn.slice(images, start=margin, shape=size, axes=[0, 1])
    if transform.flip:
        images = fn.flip(images, horizontal=given("flip", 0))
    return images


def _keep_until_used(images: torch.Tensor, in_use: deque[tuple[torch.Tensor, Any]]) -> None:
    """Hold DALI's memory until the stream that reads it has done so: DALI does not wait for it."""
    event = torch.cuda.Event()
    event.record()
    in_use.append((images, event))
    if len(in_use) > AHEAD:
        in_use.popleft()[1].synchronize()


def _output(pipeline: Any) -> Any:
    """The oldest scheduled batch, (n, height, width, channels) uint8, in memory of its own."""
    (images,) = pipeline.share_outputs()
    pipeline.release_outputs()
    return images.as_tensor()


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
        raise samples[0].error(
            f"DALI cannot decode this or one of the {len(samples) - 1} samples after it, though "
            f"Pillow can ({str(error).splitlines()[0]}); use reader=torch"
        ) from error
