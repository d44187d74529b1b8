"""What a reader sees of a pool: payloads, columns and batches of the samples that it held at one
moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.hardware.device import is_gpu
from dpfast.ops import dispatch
from dpfast.ops.chunk_rows import ChunkTable, check_indices, take_rows
from dpfast.ops.crop import StoredImages, crop_batch
from dpfast.ops.dispatch import CPU
from dpfast.pool import codecs
from dpfast.pool.batch import BatchFormat
from dpfast.pool.record import COLUMNS, RECORD
from dpfast.pool.shared_list import SharedList

Payload = Tensor | Sequence[bytes]


@dataclass(frozen=True)
class PoolSnapshot:
    """The first ``size`` samples of a pool. It stays valid whatever the pool does next, and needs
    no lock.

    Attributes:
        codec, shape, decode: as of ``SamplePool``.
        chunks, origins: where payloads and records lie.
        tiers: of the chunks.
        ready: the last append on a device, which a reader's stream waits for.
    """

    codec: str
    decode: codecs.Decode | None
    chunks: ChunkTable
    origins: ChunkTable
    size: int = 0
    shape: tuple[int, ...] | None = None
    tiers: SharedList[str] = field(default_factory=SharedList)
    ready: torch.cuda.Event | None = None

    def records(self, indices: Tensor, *, threads: int | None = None) -> np.ndarray:
        """(B,) copies of the ``RECORD`` of the samples at ``indices``; ``threads`` as in
        ``payload``.
        """
        return (
            take_rows(self.origins, indices, self.size, threads=threads).numpy().view(RECORD)[:, 0]
        )

    def column(self, name: str, indices: Tensor) -> Tensor:
        """(B,) int64 or float32 values of one column of ``dpfast.pool.record`` at ``indices`` (B,)
        int64.

        Raises ``KeyError`` for an unknown column, ``IndexError`` for an index outside the pool.
        """
        if name not in COLUMNS:
            raise KeyError(f"column {name!r}: expected one of {', '.join(COLUMNS)}")
        return self._field(name, indices)

    def _field(self, name: str, indices: Tensor) -> Tensor:
        assert RECORD.fields is not None
        dtype, offset = RECORD.fields[name][:2]
        values = (
            take_rows(self.origins, indices, self.size, offset=offset, width=dtype.itemsize)
            .numpy()
            .view(dtype)[:, 0]
        )
        return torch.from_numpy(values if dtype.kind == "f" else values.astype(np.int64))

    def chunk_numbers(self) -> Tensor:
        """(size,) int64, the chunk of every sample."""
        indices = torch.arange(self.size)
        if self.codec == "jpeg":
            return self._field("offset", indices) // self.chunks.chunk_rows
        return indices // self.chunks.chunk_rows

    def payload(
        self,
        indices: Tensor,
        *,
        device: torch.device = CPU,
        out: Tensor | None = None,
        threads: int | None = None,
    ) -> Payload:
        """Copies of what is stored at ``indices`` (B,): (B, *shape) of the codec's dtype, or B JPEG
        files.

        out: (B, bytes of a sample) uint8 on ``device``, where the copies shall lie; not for JPEG.
        threads: that copy on a CPU at most, all of torch's by default. Raises ``IndexError`` for an
        index outside the pool.
        """
        indices = indices.to(CPU, torch.int64)
        self._wait(device)
        if self.codec == "jpeg":
            return self._files(indices)
        if self.shape is None:
            check_indices(indices, 0)
            return torch.empty(0, dtype=torch.uint8)
        rows = take_rows(self.chunks, indices, self.size, device=device, out=out, threads=threads)
        return rows.view(codecs.DTYPES[self.codec]).view(-1, *self.shape)

    def _wait(self, device: torch.device) -> None:
        """Lets a reader's stream wait for the last append on a device."""
        if self.ready is not None and is_gpu(device):
            torch.cuda.current_stream(device).wait_event(self.ready)

    def _files(self, indices: Tensor) -> list[bytes]:
        files = []
        for record in self.records(indices):
            number, start = divmod(int(record["offset"]), self.chunks.chunk_rows)
            file = self.chunks.chunks[number][start : start + int(record["length"])]
            files.append(file.cpu().numpy().tobytes())
        return files

    def images(self, indices: Tensor, *, device: torch.device = CPU) -> Tensor:
        """uint8 (B, C, H, W) copies of the samples at ``indices`` (B,), decoded where the pool
        holds no pixels.

        Raises ``InputError`` for JPEG images of several shapes and for latents without a
        ``decode``.
        """
        payload = self.payload(indices, device=device)
        if self.codec == "latents":
            return self._decoded(payload).clamp(0, 255).round().to(torch.uint8)
        if isinstance(payload, Tensor):
            return payload
        images = [codecs.from_image_file(data) for data in payload]
        if len({image.shape for image in images}) > 1:
            shapes = sorted({image.shape for image in images})
            raise InputError(f"the batch holds images of {shapes}, expected one shape")
        if not images:
            return torch.empty(0, dtype=torch.uint8, device=device)
        # NumPy's stack brings no threads, see ``memory_tiers.touched``.
        return torch.from_numpy(np.stack(images)).to(device)

    def _decoded(self, latents: Payload) -> Tensor:
        """(B, C, H, W) floats on the scale of bytes, where the latents are."""
        if self.decode is None:
            raise InputError(
                "the pool holds latents and has no decode function: "
                "SamplePool('latents', decode=...)"
            )
        assert isinstance(latents, Tensor)
        with torch.no_grad():
            images = self.decode(latents.float())
            return images.to(latents.device, torch.float32).add_(1).mul_(127.5)

    def gather(
        self,
        indices: Tensor,
        form: BatchFormat | None = None,
        *,
        flip: Tensor | None = None,
        boxes: Tensor | None = None,
        size: tuple[int, int] | None = None,
        device: torch.device = CPU,
        out: Tensor | None = None,
        threads: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Normalised images (B, C, H, W) and int64 labels (B,) of the samples at ``indices`` (B,),
        on ``device``.

        Latents are decoded first, without rounding to uint8.

        Args:
            form: scale, dtype and memory layout of the batch.
            flip: (B,) bool, mirrors a sample left to right.
            boxes: (B, 4) float32 of (top, left, height, width) in pixels, what is shown of a
                sample; None: all of it.
            size: (height, width) of the batch, that of the images by default; another one needs
                boxes.
            device: where the batch shall be.
            out: where to write the images, in their shape, dtype and layout, where ``in_place``.
            threads: of the native kernels on a CPU, torch's by default.

        Raises ``TypeError`` or ``InputError`` for a wrong dtype or shape, ``IndexError`` for an
        index outside the pool.
        """
        form = form or BatchFormat()
        indices = indices.to(CPU, torch.int64).contiguous()
        labels = self.column("label", indices).to(device, non_blocking=True)
        if out is not None and not self.in_place(device):
            raise InputError("out is for pools of pixels on the host and the native kernels")
        flip = None if flip is None else flip.to(device, non_blocking=True)
        images: Tensor | StoredImages
        chosen = None
        if self.codec == "pixels" and self.shape is not None:
            self._wait(device)
            images = StoredImages(self.chunks, self.size, self.shape)
            chosen = indices
        elif self.codec == "latents":
            images = self._decoded(self.payload(indices, device=device))
        else:
            images = self.images(indices, device=device)
        mean, std = form.per_channel(images.shape[-3])
        batch = crop_batch(
            images,
            chosen,
            boxes=boxes,
            flip=flip,
            size=size,
            device=device,
            out=out,
            threads=threads,
            mean=mean,
            std=std,
            dtype=form.dtype,
            channels_last=form.channels_last,
        )
        return batch, labels

    def in_place(self, device: torch.device) -> bool:
        """Whether the native kernels read a batch of pixels for ``device`` in the pool's chunks,
        without a copy.
        """
        pixels = self.codec == "pixels" and self.shape is not None
        native = device.type == "cpu" and dispatch.backend_for(CPU) == "native"
        return pixels and native and self.chunks.on_host
