"""A reader's view of a pool: payloads, columns and batches of the samples that it held at one
moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dpfast.data.pictures import from_image_file
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
Boxes = Tensor | Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class PoolSnapshot:
    """The first ``size`` samples of a pool.

    It stays valid whatever the pool does next, and needs no lock.

    Attributes:
        codec: As in ``SamplePool``.
        decode: As in ``SamplePool``.
        chunks: Places of the payloads.
        origins: Places of the records.
        size: Number of samples.
        shape: As in ``SamplePool``.
        tiers: Tier of each chunk.
        ready: Last append on a device, which a reader's stream waits for.
        coloured: True if one of the pool's JPEG files has colours. Its images then have three
            channels, equal ones where a file is grey; one channel otherwise.
        alike: (height, width) of all of the pool's JPEG files, where every decoder shows them so;
            None: each has to be looked at.
    """

    codec: str
    decode: codecs.Decode | None
    chunks: ChunkTable
    origins: ChunkTable
    size: int = 0
    shape: tuple[int, ...] | None = None
    tiers: SharedList[str] = field(default_factory=SharedList)
    ready: torch.cuda.Event | None = None
    coloured: bool = False
    alike: tuple[int, int] | None = None

    def records(self, indices: Tensor, *, threads: int | None = None) -> np.ndarray:
        """Returns (B,) copies of the ``RECORD`` of the samples at ``indices``; ``threads`` as in
        ``payload``.
        """
        return (
            take_rows(self.origins, indices, self.size, threads=threads).numpy().view(RECORD)[:, 0]
        )

    def column(self, name: str, indices: Tensor) -> Tensor:
        """Returns (B,) int64 or float32 values of one column of ``dpfast.pool.record`` at
        ``indices`` (B,) int64.

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
        """Returns (size,) int64, the chunk of every sample."""
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
        """Returns copies of what is stored at some indices.

        Args:
            indices: (B,) int64.
            device: Device of the copies.
            out: (B, bytes of a sample) uint8 on ``device``, where the copies shall lie; not for
                JPEG.
            threads: Most threads of that copy on a CPU, all of torch's by default.

        Returns:
            (B, *shape) of the codec's dtype, or B JPEG files.

        Raises:
            IndexError: For an index outside the pool.
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
        """Returns copies of samples as images, decoded where the pool holds no pixels.

        Args:
            indices: (B,) int64.
            device: Device of the images.

        Returns:
            (B, C, H, W) uint8.

        Raises:
            InputError: For JPEG images of several sizes, a file that cannot be decoded, latents
                without a ``decode``, and those that it makes no finite image of.
        """
        payload = self.payload(indices, device=device)
        if self.codec == "latents":
            decoded = self._decoded(payload)
            # rounded they would be black; a batch of them shows in its loss, without a wait
            lost = indices[~decoded.isfinite().flatten(1).all(1).to(indices.device)]
            if len(lost):
                raise InputError(
                    f"{sample_name(int(lost[0]))}: its latents are decoded to an image that is not "
                    f"finite ({len(lost)} of {len(indices)}); expected a decoder in float32 or "
                    "bfloat16"
                )
            return decoded.clamp(0, 255).round().to(torch.uint8)
        if isinstance(payload, Tensor):
            return payload
        return _stacked(self._pictures(payload, indices)).to(device)

    def _pictures(self, files: Sequence[bytes], indices: Tensor) -> list[np.ndarray]:
        """Returns uint8 (C, H, W) of each of these JPEG files, the samples at ``indices``, in its
        own size.
        """
        named = zip(files, indices.tolist(), strict=True)
        pictures = [from_image_file(file, sample_name(index)) for file, index in named]
        if not self.coloured:
            return pictures
        return [np.repeat(p, 3, axis=0) if len(p) == 1 else p for p in pictures]

    def _decoded(self, latents: Payload) -> Tensor:
        """Returns (B, C, H, W) floats on the scale of bytes, where the latents are."""
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
        boxes: Boxes | None = None,
        size: tuple[int, int] | None = None,
        device: torch.device = CPU,
        out: Tensor | None = None,
        threads: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns normalised images (B, C, H, W) and int64 labels (B,) of the samples at
        ``indices`` (B,), on ``device``.

        Latents are decoded first, without rounding to uint8.

        Args:
            form: scale, dtype and memory layout of the batch.
            flip: (B,) bool, mirrors a sample left to right.
            boxes: (B, 4) float32 of (top, left, height, width) in pixels, what is shown of a
                sample; None: all of it. For JPEG files also what makes them, or None, of the
                (B, 2) int64 heights and widths of the pictures.
            size: (height, width) of the batch, that of the images by default; another one, and
                JPEG pictures of several sizes, need boxes.
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
        pictures: list[np.ndarray] = []
        if self.codec == "jpeg":
            pictures = self._pictures(self._files(indices), indices)
        if callable(boxes):
            boxes = boxes(torch.tensor([p.shape[1:] for p in pictures]).view(-1, 2))
        if boxes is not None and size is not None and len({p.shape for p in pictures}) > 1:
            batch = _cropped(pictures, form, flip=flip, boxes=boxes, size=size, threads=threads)
            return batch.to(device), labels
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
            images = _stacked(pictures).to(device)
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
        """Returns True if the native kernels read a batch of pixels for ``device`` in the pool's
        chunks, without a copy.
        """
        pixels = self.codec == "pixels" and self.shape is not None
        native = device.type == "cpu" and dispatch.backend_for(CPU) == "native"
        return pixels and native and self.chunks.on_host


def sample_name(index: int) -> str:
    """Returns the name of the sample at ``index`` for the message of an error."""
    return f"sample {index} of the pool"


def _stacked(pictures: list[np.ndarray]) -> Tensor:
    """Returns (B, C, H, W) of pictures (C, H, W). Raises ``InputError`` where they have several
    sizes.
    """
    if not pictures:
        return torch.empty(0, dtype=torch.uint8)
    if len({picture.shape for picture in pictures}) > 1:
        shapes = sorted({picture.shape for picture in pictures})
        raise InputError(f"the batch holds images of {shapes}, expected one shape")
    # NumPy's stack brings no threads, see ``memory_tiers.touched``.
    return torch.from_numpy(np.stack(pictures))


def _cropped(
    pictures: list[np.ndarray],
    form: BatchFormat,
    *,
    flip: Tensor | None,
    boxes: Tensor,
    size: tuple[int, int],
    threads: int | None,
) -> Tensor:
    """Returns ``PoolSnapshot.gather`` of pictures of several sizes, one by one on the CPU: (B, C,
    *size).

    A kernel of a GPU is compiled for each size, and what is shown of a photograph is less to move.
    """
    channels = len(pictures[0])
    mean, std = form.per_channel(channels)
    layout = torch.channels_last if form.channels_last else torch.contiguous_format
    out = torch.empty((len(pictures), channels, *size), dtype=form.dtype, memory_format=layout)
    for row, picture in enumerate(pictures):
        one = slice(row, row + 1)
        crop_batch(
            torch.from_numpy(picture)[None],
            boxes=boxes[one],
            flip=None if flip is None else flip[one],
            size=size,
            out=out[one],
            threads=threads,
            mean=mean,
            std=std,
            dtype=form.dtype,
            channels_last=form.channels_last,
        )
    return out
