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

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpfast.data.jpeg import for_decoder
from dpfast.data.pictures import from_image_file
from dpfast.feed.augment import AugmentationDraw
from dpfast.feed.buffers import BufferPool
from dpfast.feed.loader import Batch, PendingBatch, PoolLoader
from dpfast.pool.batch import BatchFormat
from dpfast.pool.protocol import Pool
from dpfast.pool.snapshot import PoolSnapshot, sample_name

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
            snapshot, indices = self.pool.fetch(pending.indices, device=self.device)
            images, boxes, labels = self._gather(snapshot, indices, pending.draw)
            queue.feed(images, boxes, pending.draw.flips)
            last = self.form.channels_last
            pending.work = _InQueue(queue, images, labels, indices, channels_last=last)

    def _gather(
        self, snapshot: PoolSnapshot, indices: Tensor, draw: AugmentationDraw
    ) -> tuple[Any, Tensor | None, Tensor]:
        """Returns what DALI is fed, the boxes in it, and the labels."""
        device = self.device
        boxes = draw.boxes
        if snapshot.codec == "latents":  # decoded to floats on the scale of bytes
            images, labels = snapshot.gather(indices, _BYTES, device=device)
            return images if device.type == "cuda" else images.numpy(), boxes, labels
        labels = snapshot.column("label", indices).to(device, non_blocking=True)
        if snapshot.codec == "jpeg":
            return *self._files(snapshot, indices, draw), labels
        if device.type == "cuda":
            return snapshot.payload(indices, device=device), boxes, labels
        size = len(indices) * snapshot.chunks.stride
        buffer = self._buffers.take(size)[:size]
        snapshot.payload(indices, out=torch.from_numpy(buffer).view(len(indices), -1))
        return buffer.reshape(len(indices), *self.image_shape()), boxes, labels

    def _files(
        self, snapshot: PoolSnapshot, indices: Tensor, draw: AugmentationDraw
    ) -> tuple[list[np.ndarray], Tensor | None]:
        """Returns JPEG files as DALI shows them like Pillow, and the boxes, each in its own
        picture.
        """
        files, sizes = snapshot.payload(indices), [snapshot.alike] * len(indices)
        if snapshot.alike is None:
            named = zip(files, indices.tolist(), strict=True)
            read = [for_decoder(file, sample_name(index)) for file, index in named]
            files, sizes = [file for file, _ in read], [size for _, size in read]
        boxes = self.boxes_in(torch.tensor(sizes), snapshot, draw)
        return [np.frombuffer(file, np.uint8) for file in files], boxes

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
                    images,
                    device="mixed" if cuda else "cpu",
                    output_type=colours,
                    jpeg_fancy_upsampling=True,  # of 4:2:0 as libjpeg does it, on a GPU too
                )
            if self.resamples():
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

    def feed(self, images: Any, boxes: Tensor | None, flips: Tensor | None) -> None:
        """Gives DALI one more batch."""
        with self._in_use():
            self.pipeline.feed_input("images", images, cuda_stream=self._stream())
            if boxes is not None:
                starts, lengths = boxes[:, :2].numpy(), boxes[:, 2:].numpy()
                self.pipeline.feed_input("start", np.ascontiguousarray(starts))
                self.pipeline.feed_input("end", starts + lengths)
            if flips is not None:
                self.pipeline.feed_input("flip", flips.numpy().astype(np.int32))
            self.fed += 1
            if self.fed >= self.depth:
                self.pipeline.schedule_run()

    def deliver(self) -> Tensor:
        """Returns the images of the oldest batch, in DALI's layout."""
        with self._in_use():
            (output,) = self.pipeline.share_outputs(cuda_stream=self._stream())
            images = torch.from_dlpack(output.as_tensor())  # the memory is now the tensor's
            self.pipeline.release_outputs()
        return images

    def discard(self) -> None:
        """Forgets the oldest batch. Raises nothing: the next batch is another pipeline's where
        this one fails.
        """
        if self.fed < self.depth:
            self.broken = True  # it has inputs and has not run
        if not self.broken:
            with contextlib.suppress(Exception), self._in_use():
                self.pipeline.share_outputs()
                self.pipeline.release_outputs()

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        """Notes that the pipeline is broken, whatever fails: what it holds is then not known, and
        DALI raises ``StopIteration`` where it has nothing to give any more, which would end a loop.
        """
        try:
            yield
        except BaseException:
            self.broken = True
            raise

    def _stream(self) -> Any:
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None


@dataclass(frozen=True)
class _InQueue:
    """``Work`` of DALI. images: what DALI was fed, which it reads in place; indices: of them."""

    queue: _DaliQueue
    images: Any
    labels: Tensor
    indices: Tensor
    channels_last: bool

    def result(self) -> Batch:
        try:
            images = self.queue.deliver()
        except Exception:
            if isinstance(self.images, list):  # DALI does not say which of the files
                for file, index in zip(self.images, self.indices.tolist(), strict=True):
                    from_image_file(file.tobytes(), sample_name(index))
            raise
        return images.permute(0, 3, 1, 2) if self.channels_last else images, self.labels

    def drop(self) -> None:
        self.queue.discard()


def _index_of(device: torch.device) -> int | None:
    """Returns DALI's device id: None for a CPU, the current GPU where the device names none."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index
