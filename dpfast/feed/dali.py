"""The loader on NVIDIA DALI 2: decoding, crop, resize, flip, normalise, cast and layout in its
pipeline.

``external_source`` takes batches that are gathered from the pool; nothing is copied on the way in,
and DALI's outputs become tensors in place. What a batch was gathered into stays untouched until
DALI has delivered that batch: its work holds it, however deep the queue is. DALI draws nothing by
chance: boxes and flips come with the batch, so both loaders show the same crops. Batches are fed
one by one and never end, so there is no epoch to reset.

Without a GPU (``device_id=None``) DALI takes NumPy arrays; it fails on torch's CPU tensors beside a
torch without CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpfast.feed.augment import AugmentationDraw
from dpfast.feed.buffers import BufferPool
from dpfast.feed.loader import Batch, PendingBatch, PoolLoader
from dpfast.pool.batch import BatchFormat
from dpfast.pool.protocol import Pool

_BYTES = BatchFormat(mean=0.0, std=1 / 255, channels_last=False)


class DaliLoader(PoolLoader):
    """``PoolLoader`` on a DALI pipeline, whose queue is ``ahead`` deep. fp32 and fp16.

    Raises ``ImportError`` where DALI is not installed, ``TypeError`` for batches in bf16.
    """

    def __init__(self, pool: Pool, **options: Any) -> None:
        import nvidia.dali  # noqa: F401 - an early error, while the caller looks

        super().__init__(pool, **options)
        if self.form.dtype not in (torch.float32, torch.float16):
            raise TypeError(f"dtype = {self.form.dtype}: DALI normalises to float32 or float16")
        self._buffers = BufferPool()
        self._dali: _DaliQueue | None = None

    def close(self) -> None:
        super().close()
        self._dali = None

    def start(self, drawn: Sequence[PendingBatch]) -> None:
        queue = self._dali
        if queue is None or queue.broken:
            queue = self._dali = _DaliQueue(self._build(), self.ahead, self.device)
        for pending in drawn:
            images, labels = self._gather(pending)
            queue.feed(images, pending.draw)
            pending.work = _InQueue(queue, images, labels, self.form.channels_last)

    def _gather(self, pending: PendingBatch) -> tuple[Any, Tensor]:
        """What DALI is fed, and the labels."""
        device = self.device
        snapshot, indices = self.pool.fetch(pending.indices, device=device)
        if snapshot.codec == "latents":  # decoded to floats on the scale of bytes
            images, labels = snapshot.gather(indices, _BYTES, device=device)
            return images if device.type == "cuda" else images.numpy(), labels
        labels = snapshot.column("label", indices).to(device, non_blocking=True)
        if snapshot.codec == "jpeg":
            return [np.frombuffer(data, np.uint8) for data in snapshot.payload(indices)], labels
        if device.type == "cuda":
            return snapshot.payload(indices, device=device), labels
        size = len(indices) * snapshot.chunks.stride
        buffer = self._buffers.take(size)[:size]
        snapshot.payload(indices, out=torch.from_numpy(buffer).view(len(indices), -1))
        return buffer.reshape(len(indices), *self.image_shape()), labels

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        batch, channels, height, width = self.batch_shape()
        cuda = self.device.type == "cuda"
        jpeg = self.pool.codec == "jpeg"
        mean, std = self.form.per_channel(channels)
        dtype = types.FLOAT if self.form.dtype == torch.float32 else types.FLOAT16
        pipeline = Pipeline(
            batch_size=batch,
            num_threads=torch.get_num_threads(),
            device_id=_index_of(self.device),
            prefetch_queue_depth=self.ahead,
        )
        with pipeline:
            images = fn.external_source(
                name="images",
                device="gpu" if cuda and not jpeg else "cpu",
                no_copy=True,
                dtype=types.FLOAT if self.pool.codec == "latents" else types.UINT8,
                ndim=1 if jpeg else 3,
                layout=None if jpeg else "CHW",
            )
            if jpeg:
                colours = types.GRAY if channels == 1 else types.RGB
                images = fn.decoders.image(
                    images, device="mixed" if cuda else "cpu", output_type=colours
                )
            if self.augment.resamples(self.image_shape()[1:]):
                images = fn.resize(
                    images,
                    size=[height, width],
                    roi_start=fn.external_source(name="start", dtype=types.FLOAT, ndim=1),
                    roi_end=fn.external_source(name="end", dtype=types.FLOAT, ndim=1),
                    interp_type=types.INTERP_TRIANGULAR,
                    antialias=True,
                    dtype=types.FLOAT,
                )
            images = fn.crop_mirror_normalize(
                images,
                mirror=fn.external_source(name="flip", dtype=types.INT32, ndim=0)
                if self.augment.flip
                else 0,
                mean=[255.0 * value for value in mean],
                std=[255.0 * value for value in std],
                dtype=dtype,
                output_layout="HWC" if self.form.channels_last else "CHW",
            )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline


class _DaliQueue:
    """A DALI pipeline, and how many batches it was given before its first run.

    The first run starts as many batches as the queue is deep. broken: it cannot be used any more.
    """

    def __init__(self, pipeline: Any, depth: int, device: torch.device) -> None:
        self.pipeline = pipeline
        self.depth = depth
        self.device = device
        self.fed = 0
        self.broken = False

    def feed(self, images: Any, draw: AugmentationDraw) -> None:
        """Gives DALI one more batch."""
        self.pipeline.feed_input("images", images, cuda_stream=self._stream())
        if draw.boxes is not None:
            boxes = draw.boxes.numpy()
            self.pipeline.feed_input("start", np.ascontiguousarray(boxes[:, :2]))
            self.pipeline.feed_input("end", boxes[:, :2] + boxes[:, 2:])
        if draw.flips is not None:
            self.pipeline.feed_input("flip", draw.flips.numpy().astype(np.int32))
        self.fed += 1
        if self.fed >= self.depth:
            self.pipeline.schedule_run()

    def deliver(self) -> Tensor:
        """The images of the oldest batch, in DALI's layout."""
        try:
            (output,) = self.pipeline.share_outputs(cuda_stream=self._stream())
        except RuntimeError:
            self.broken = True  # DALI says so
            raise
        images = torch.from_dlpack(output.as_tensor())  # the memory is now the tensor's
        self.pipeline.release_outputs()
        return images

    def discard(self) -> None:
        """Forgets the oldest batch."""
        if self.fed < self.depth:
            self.broken = True  # it has inputs and has not run
        if not self.broken:
            self.pipeline.share_outputs()
            self.pipeline.release_outputs()

    def _stream(self) -> Any:
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None


@dataclass(frozen=True)
class _InQueue:
    """``Work`` of DALI. images: what DALI was fed, which it reads in place."""

    queue: _DaliQueue
    images: Any
    labels: Tensor
    channels_last: bool

    def result(self) -> Batch:
        images = self.queue.deliver()
        return images.permute(0, 3, 1, 2) if self.channels_last else images, self.labels

    def drop(self) -> None:
        self.queue.discard()


def _index_of(device: torch.device) -> int | None:
    """DALI's device id: None for a CPU, the current GPU where the device names none."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index
