"""The loader on NVIDIA DALI 2: decoding, crop, resize, flip, normalise, cast and layout in its
pipeline.

``external_source`` takes batches that are gathered from the pool; nothing is copied on the way in,
and DALI's outputs become tensors in place. What a batch was gathered into stays untouched until
DALI has delivered that batch: the request holds it, however deep the queue is. DALI draws nothing
by chance: boxes and flips come with the batch, so both loaders show the same crops. Batches are fed
one by one and never end, so there is no epoch to reset.

Without a GPU (``device_id=None``) DALI takes NumPy arrays; it fails on torch's CPU tensors beside a
torch without CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpfast.feed.buffers import BufferPool
from dpfast.feed.loader import PendingBatch, PoolLoader
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
        self._slots = BufferPool()
        self._pipeline: Any = None
        self._fed = 0  # batches that DALI was given before its first run

    def close(self) -> None:
        super().close()
        self._pipeline = None

    def _start(self, requests: Sequence[PendingBatch]) -> None:
        if self._pipeline is None:
            self._pipeline, self._fed = self._build(), 0
        for request in requests:
            self._feed(request)

    def _feed(self, request: PendingBatch) -> None:
        images, labels = self._gather(request)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        self._pipeline.feed_input("images", images, cuda_stream=stream)
        if request.draw.boxes is not None:
            boxes = request.draw.boxes.numpy()
            self._pipeline.feed_input("start", np.ascontiguousarray(boxes[:, :2]))
            self._pipeline.feed_input("end", boxes[:, :2] + boxes[:, 2:])
        if request.draw.flips is not None:
            self._pipeline.feed_input("flip", request.draw.flips.numpy().astype(np.int32))
        request.work = images, labels
        self._fed += 1
        if self._fed >= self.ahead:  # the first run starts as many batches as the queue is deep
            self._pipeline.schedule_run()

    def _finish(self, request: PendingBatch) -> tuple[Tensor, Tensor]:
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            (output,) = self._pipeline.share_outputs(cuda_stream=stream)
        except RuntimeError:
            self._pipeline = None  # DALI says that it cannot be used any more
            raise
        images = torch.from_dlpack(output.as_tensor())  # the memory is now the tensor's
        self._pipeline.release_outputs()
        return images.permute(0, 3, 1, 2) if self.form.channels_last else images, request.work[1]

    def _drop(self) -> None:
        if self._pipeline is None:
            return
        if self._fed < self.ahead:
            self._pipeline = None  # it has inputs and has not run
            return
        for request in self._queue:
            if request.work is not None:
                self._pipeline.share_outputs()
                self._pipeline.release_outputs()

    def _gather(self, request: PendingBatch) -> tuple[Any, Tensor]:
        """What DALI is fed, and the labels."""
        (view, indices), device = self._held(request), self.device
        if view.codec == "latents":  # decoded to floats on the scale of bytes
            images, labels = view.gather(indices, _BYTES, device=device)
            return images if device.type == "cuda" else images.numpy(), labels
        labels = view.column("label", indices).to(device, non_blocking=True)
        if view.codec == "jpeg":
            return [np.frombuffer(data, np.uint8) for data in view.payload(indices)], labels
        if device.type == "cuda":
            return view.payload(indices, device=device), labels
        size = len(indices) * view.chunks.stride
        slot = self._slots.take(size)[:size]
        view.payload(indices, out=torch.from_numpy(slot).view(len(indices), -1))
        return slot.reshape(len(indices), *self.image_shape()), labels

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


def _index_of(device: torch.device) -> int | None:
    """DALI's device id: None for a CPU, the current GPU where the device names none."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index
