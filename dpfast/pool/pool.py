"""``SamplePool``: append-only storage of samples in fixed-size chunks, with every sample's origin beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dpfast.ops import _check, _dispatch, gather_batch
from dpfast.ops.gather import constants
from dpfast.pool import codecs
from dpfast.pool.columns import COLUMNS, RECORD
from dpfast.pool.plan import plan
from dpfast.pool.rows import CPU, ChunkTable, check_indices
from dpfast.pool.tiers import NAMES, PoolFullError, Tiers, host_memory

if TYPE_CHECKING:
    from dpfast.generate.sampler import SampleBatch

CHUNK_BYTES = 64 << 20
RECORD_CHUNK = 2 << 20  # bytes, one large page
RECORD_ROWS = RECORD_CHUNK // RECORD.itemsize

Payload = Tensor | Sequence[bytes]


@dataclass(frozen=True)
class View:
    """The pool as one reader sees it: the first ``size`` samples. It stays valid whatever the pool does next."""

    size: int
    payload: ChunkTable
    records: ChunkTable
    tiers: tuple[str, ...] = ()  # of the payload's chunks
    ready: torch.cuda.Event | None = None  # the last append on a device

    def take_records(self, indices: Tensor) -> np.ndarray:
        """(B,) ``RECORD`` of the samples at ``indices``."""
        return self.records.take(indices, self.size).numpy().view(RECORD)[:, 0]

    def take_column(self, name: str, indices: Tensor) -> Tensor:
        """(B,) int64 or float32 values of one column at ``indices``."""
        dtype, offset = dict(RECORD.fields or {})[name][:2]
        values = self.records.take(indices, self.size, offset=offset, width=dtype.itemsize).numpy().view(dtype)[:, 0]
        return torch.from_numpy(values if dtype.kind == "f" else values.astype(np.int64))


class SamplePool:
    """Samples with labels and provenance, in device memory, host memory and files.

    Growing copies nothing that is already in the pool: a new sample is written once, into its chunk. One thread at a
    time appends; any number of threads read meanwhile, without locks: they see the samples of finished appends.

    Args:
        codec: "uint8" pixels (C, H, W), "fp16" latents (c, h, w) or "jpeg" bytes.
        tiers: budgets; by default a share of the free host memory.
        chunk_bytes: size of every chunk.
        decode: latents (B, c, h, w) to images (B, C, H, W) in [-1, 1], for a pool of latents that serves images.
    """

    plan = staticmethod(plan)

    def __init__(
        self,
        codec: str = "uint8",
        *,
        tiers: Tiers | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        decode: codecs.Decode | None = None,
    ) -> None:
        if chunk_bytes < 1:
            raise ValueError(f"chunk_bytes = {chunk_bytes}, expected at least 1")
        self.codec, self.chunk_bytes, self.decode = codecs.check_codec(codec), chunk_bytes, decode
        self.tiers = tiers or Tiers.detect()
        self.shape: tuple[int, ...] | None = None  # of a payload; None until the first append, and for JPEG
        self.fresh = 0  # samples of the newest round
        self._round: int | None = None
        self._filled = 0  # bytes of JPEG payloads in the last chunk
        self._lock = threading.Lock()
        self._worker: ThreadPoolExecutor | None = None
        self._spares: deque[tuple[str, Future[Tensor]]] = deque()  # chunks with their tiers, ready or being prepared
        self._view = View(0, ChunkTable(chunk_bytes, 1), ChunkTable(RECORD_ROWS, RECORD.itemsize))

    def __len__(self) -> int:
        return self._view.size

    @property
    def view(self) -> View:
        """The pool at this moment, for a reader that needs several answers about the same samples."""
        return self._view

    def append(
        self,
        batch: SampleBatch,
        *,
        round: int,
        omega: float,
        cfg_scale: float = 1.0,
        steps: int = 0,
        seed: int = 0,
        payload: Payload | None = None,
    ) -> None:
        """Appends all samples of ``batch``, or none where it raises.

        The payload is copied once, from the device where it is into its chunk. ``round`` counts the additions (0: the
        initial samples).

        payload: what to store instead of ``batch.images``: (B, c, h, w) fp16 latents, or B JPEG files. A JPEG pool
        encodes uint8 images that come without.

        Raises ``TypeError`` and ``ValueError`` for a payload that is not the pool's, ``PoolFullError`` when it does not
        fit into the budgets, ``OSError`` when the disk of the file tier is full.
        """
        records = np.empty(len(batch), RECORD)
        for name, values in (("label", batch.labels), ("sample_id", batch.sample_ids), ("entropy", batch.entropy)):
            if len(values) != len(batch):
                raise ValueError(f"the batch has {len(batch)} labels and {len(values)} values of {name}")
            records[name] = values.cpu().numpy()
        records["learner_step"] = batch.learner_step
        records["round"], records["steps"], records["seed"] = round, steps, seed
        records["omega"], records["cfg_scale"] = omega, cfg_scale
        self.append_records(batch.images if payload is None else payload, records)

    def append_records(self, payload: Payload, records: np.ndarray) -> None:
        """``append`` for samples whose columns are there already: (B,) ``RECORD``, offset and length ignored."""
        payload = self._checked(payload, len(records))
        with self._lock:
            view = self._view
            if isinstance(payload, Tensor):
                records["length"] = self._view.payload.stride
                records["offset"] = (view.size + np.arange(len(records))) * view.payload.stride
                view = self._write_rows(view, payload.view(len(payload), -1).view(torch.uint8))
            else:
                view = self._write_files(view, payload, records)
            table = self._write_records(view.records, view.size, records)
            self._count_fresh(records["round"])
            ready = None
            if isinstance(payload, Tensor) and payload.is_cuda:
                ready = torch.cuda.Event()
                ready.record()
            self._view = dataclasses.replace(view, records=table, size=view.size + len(records), ready=ready)

    def _checked(self, payload: Payload, count: int) -> Payload:
        if len(payload) != count:
            raise ValueError(f"{len(payload)} payloads for {count} samples")
        if self.codec == "jpeg":
            if isinstance(payload, Tensor):
                return [codecs.to_jpeg(image) for image in self._images(payload)]
            largest = max(map(len, payload), default=0)
            if largest > self.chunk_bytes:
                raise ValueError(f"a JPEG file has {largest} bytes, a chunk only {self.chunk_bytes}")
            return payload
        if not isinstance(payload, Tensor):
            raise TypeError(f"a pool of {self.codec} takes a tensor, got {type(payload).__name__}")
        payload = self._images(payload) if self.codec == "uint8" else payload
        if payload.dtype != codecs.DTYPES[self.codec] or payload.ndim != 4:
            raise ValueError(f"latents are {payload.dtype} {tuple(payload.shape)}, expected float16 (B, c, h, w)")
        if self.shape is None:
            self._adopt(tuple(payload.shape[1:]))
        elif tuple(payload.shape[1:]) != self.shape:
            raise ValueError(f"images are {tuple(payload.shape[1:])}, the pool holds {self.shape}")
        return payload.detach()

    def _images(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, expected uint8 (B, C, H, W)")
        return images

    def _adopt(self, shape: tuple[int, ...]) -> None:
        stride = codecs.row_bytes(self.codec, shape)
        if not 0 < stride <= self.chunk_bytes:
            raise ValueError(f"a sample of shape {shape} has {stride} bytes, a chunk {self.chunk_bytes}")
        self.shape = shape
        self._view = dataclasses.replace(self._view, payload=ChunkTable(self.chunk_bytes // stride, stride))

    def _write_rows(self, view: View, rows: Tensor) -> View:
        done, per_chunk = 0, view.payload.chunk_rows
        while done < len(rows):
            number, start = divmod(view.size + done, per_chunk)
            if number == len(view.payload.chunks):
                view = self._grown(view)
            count = min(per_chunk - start, len(rows) - done)
            view.payload.block(number)[start : start + count].copy_(rows[done : done + count])
            done += count
            if start < per_chunk // 2 <= start + count and not self._spares:
                with contextlib.suppress(PoolFullError):  # there may be no need for another chunk
                    self._prepare(view)
        return view

    def _write_files(self, view: View, files: Sequence[bytes], records: np.ndarray) -> View:
        filled = self._filled
        for row, data in enumerate(files):
            if not view.payload.chunks or filled + len(data) > self.chunk_bytes:
                view, filled = self._grown(view), 0
            end = filled + len(data)
            view.payload.chunks[-1][filled:end].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            records["offset"][row] = (len(view.payload.chunks) - 1) * self.chunk_bytes + filled
            records["length"][row] = len(data)
            filled = end
        self._filled = filled
        return view

    def _write_records(self, table: ChunkTable, size: int, records: np.ndarray) -> ChunkTable:
        done = 0
        while done < len(records):
            number, start = divmod(size + done, RECORD_ROWS)
            if number == len(table.chunks):
                table = table.with_chunk(host_memory(RECORD_CHUNK))
            count = min(RECORD_ROWS - start, len(records) - done)
            rows = table.block(number).numpy().view(RECORD)[:, 0]
            rows[start : start + count] = records[done : done + count]
            done += count
        return table

    def _count_fresh(self, rounds: np.ndarray) -> None:
        for number in rounds[np.r_[True, rounds[1:] != rounds[:-1]]] if len(rounds) else ():
            if number != self._round:
                self._round, self.fresh = int(number), 0
        if len(rounds):
            self.fresh += int((rounds == rounds[-1])[::-1].cumprod().sum())

    def reserve(self, samples: int, *, wait: bool = False) -> None:
        """Prepares chunks for ``samples`` more in the background, and touches their pages: an append is then one copy.

        Without it the pool prepares one chunk ahead. Raises ``PoolFullError`` when the budgets have no room for them.
        """
        with self._lock:
            view, rows = self._view, self._view.payload.chunk_rows
            if self.shape is None:
                raise ValueError("reserve needs the shape of a sample: call it after the first append")
            missing = samples - (len(view.payload.chunks) + len(self._spares)) * rows + view.size
            for _ in range(-(-missing // rows)):
                self._prepare(view)
            spares = list(self._spares)
        for _, spare in spares if wait else ():
            spare.result()

    def _grown(self, view: View) -> View:
        if self._spares:
            tier, spare = self._spares.popleft()
            chunk = spare.result()
        else:
            tier = self.tiers.place(view.tiers, self.chunk_bytes)
            chunk = self.tiers.allocate(tier, self.chunk_bytes)
        return dataclasses.replace(view, payload=view.payload.with_chunk(chunk), tiers=(*view.tiers, tier))

    def _prepare(self, view: View) -> None:
        """Allocates the next chunk in the background and touches its pages, half of an append's time otherwise."""
        tiers = self.tiers
        tier = tiers.place((*view.tiers, *(name for name, _ in self._spares)), self.chunk_bytes)
        self._worker = self._worker or ThreadPoolExecutor(1, "dpfast-pool-chunk")
        self._spares.append((tier, self._worker.submit(lambda: tiers.allocate(tier, self.chunk_bytes).zero_())))

    def move(self, tiers: Tiers) -> None:
        """Gives the pool other budgets and moves its chunks to where they put them, in the order of appending.

        Readers go on with the old chunks until they have finished; appends wait. Raises ``PoolFullError``, and moves
        nothing, when the budgets have no room for all chunks.
        """
        with self._lock:
            self._spares.clear()
            view = self._view
            places: list[str] = []
            for _ in view.payload.chunks:
                places.append(tiers.place(places, self.chunk_bytes))
            chunks = list(view.payload.chunks)
            moves = [i for i, tier in enumerate(places) if tier != view.tiers[i]]
            for i in sorted(moves, key=lambda i: -NAMES.index(places[i])):  # to slower tiers first: that frees budget
                chunks[i] = tiers.allocate(places[i], self.chunk_bytes).copy_(chunks[i])
                view = dataclasses.replace(
                    view,
                    payload=view.payload.with_chunks(tuple(chunks)),
                    tiers=(*view.tiers[:i], places[i], *view.tiers[i + 1 :]),
                )
                self._view = view
            self.tiers = tiers

    def where(self) -> dict[str, int]:
        """How many samples lie in each tier."""
        view = self._view
        if self.codec == "jpeg":
            offsets = view.take_column("offset", torch.arange(view.size))
            numbers = Counter((offsets // self.chunk_bytes).tolist())
        else:
            rows = view.payload.chunk_rows
            numbers = Counter({i: min(rows, view.size - i * rows) for i in range(len(view.tiers))})
        return {name: sum(numbers[i] for i, tier in enumerate(view.tiers) if tier == name) for name in NAMES}

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks and records that the pool has allocated."""
        view = self._view
        return sum(chunk.nbytes for chunk in (*view.payload.chunks, *view.records.chunks))

    def column(self, name: str) -> Tensor:
        """(N,) values of a column of ``dpfast.pool.columns``, in the order of appending, int64 or float32."""
        if name not in COLUMNS:
            raise KeyError(f"column {name!r}: expected one of {', '.join(COLUMNS)}")
        return self._view.take_column(name, torch.arange(self._view.size))

    def records(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Copies of the ``RECORD`` of the samples ``start`` to ``stop``, which is the end by default."""
        view = self._view
        return view.take_records(torch.arange(start, view.size if stop is None else stop))

    def payload(self, indices: Tensor, *, device: torch.device = CPU) -> Payload:
        """Copies of what is stored at ``indices`` (B,): (B, *shape) of the codec's dtype, or B JPEG files."""
        view = self._view
        indices = indices.to(CPU, torch.int64)
        if view.ready is not None and device.type == "cuda":
            torch.cuda.current_stream(device).wait_event(view.ready)
        if self.codec == "jpeg":
            return self._files(view, indices)
        if self.shape is None:
            check_indices(indices, 0)
            return torch.empty(0, dtype=torch.uint8)
        rows = view.payload.take(indices, view.size, device=device)
        return rows.view(codecs.DTYPES[self.codec]).view(-1, *self.shape)

    def _files(self, view: View, indices: Tensor) -> list[bytes]:
        files = []
        for record in view.take_records(indices):
            number, start = divmod(int(record["offset"]), self.chunk_bytes)
            files.append(view.payload.chunks[number][start : start + int(record["length"])].cpu().numpy().tobytes())
        return files

    def images(self, indices: Tensor, *, device: torch.device = CPU) -> Tensor:
        """uint8 (B, C, H, W) copies of the samples at ``indices`` (B,), decoded where the pool holds no pixels."""
        payload = self.payload(indices, device=device)
        if self.codec == "fp16":
            return self._decoded(payload).add(1).mul(127.5).clamp(0, 255).round().to(torch.uint8)
        if isinstance(payload, Tensor):
            return payload
        images = [torch.from_numpy(codecs.from_image_file(data).copy()) for data in payload]
        if len({image.shape for image in images}) > 1:
            raise ValueError(
                f"the batch holds images of {sorted({tuple(i.shape) for i in images})}, expected one shape"
            )
        return torch.stack(images).to(device) if images else torch.empty(0, dtype=torch.uint8, device=device)

    def gather(
        self,
        indices: Tensor,
        *,
        flip: Tensor | None = None,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        device: torch.device = CPU,
        out: Tensor | None = None,
        threads: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Normalised images (B, C, H, W) and int64 labels (B,) of the samples at ``indices`` (B,), on ``device``.

        flip: (B,) bool, mirrors a sample left to right. A pixel v in [0, 255] becomes (v / 255 - mean) / std, one
        number or one for each channel. Latents are decoded first, without rounding to uint8.
        Where ``gathers_in_place``, out: where to write the images, in their shape, dtype and layout; threads: of the
        kernel, torch's by default.
        """
        view = self._view
        indices = indices.to(CPU, torch.int64).contiguous()
        labels = view.take_column("label", indices).to(device, non_blocking=True)
        if self.gathers_in_place(device):
            return self._gather_chunks(view, indices, flip, mean, std, dtype, channels_last, out, threads), labels
        if out is not None:
            raise ValueError("out is for pools of pixels on the host and the native kernels")
        if self.codec == "fp16":
            images = self._decoded(self.payload(indices, device=device))
            if flip is not None:
                images = torch.where(flip.to(device)[:, None, None, None], images.flip(3), images)
            scale, bias = constants(*_channels(mean, std, images.shape[1]), images.shape[1], images.device)
            images = images.add(1).mul(127.5) * scale[:, None, None] + bias[:, None, None]
            return images.to(dtype, memory_format=_layout(channels_last)), labels
        images = self.images(indices, device=device)
        mean, std = _channels(mean, std, images.shape[1])
        return gather_batch(
            images,
            torch.arange(len(images), device=device),
            flip=None if flip is None else flip.to(device),
            mean=mean,
            std=std,
            dtype=dtype,
            channels_last=channels_last,
        ), labels

    def _decoded(self, latents: Payload) -> Tensor:
        if self.decode is None:
            raise ValueError("the pool holds latents and has no decode function: SamplePool('fp16', decode=...)")
        assert isinstance(latents, Tensor)
        with torch.no_grad():
            return self.decode(latents.float())

    def gathers_in_place(self, device: torch.device) -> bool:
        """Whether the native kernels read a batch of pixels for ``device`` in the pool's chunks, without a copy."""
        native = _dispatch.backend_for(CPU) == "native" and device.type == "cpu" and self.shape is not None
        return native and self.codec == "uint8" and self._view.payload.on_host

    def _gather_chunks(
        self,
        view: View,
        indices: Tensor,
        flip: Tensor | None,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        dtype: torch.dtype,
        channels_last: bool,
        out: Tensor | None,
        threads: int | None,
    ) -> Tensor:
        """``gather_batch`` over the table of chunks: the native kernel finds a row through its chunk's address."""
        assert self.shape is not None
        target = (len(indices), *self.shape)
        if out is None:
            out = torch.empty(target, dtype=dtype, memory_format=_layout(channels_last))
        _check.target("out", out, dtype, target, CPU, channels_last)
        scale, bias = constants(*_channels(mean, std, self.shape[0]), self.shape[0], CPU)
        flip = None if flip is None else flip.to(torch.bool).contiguous()
        if flip is not None and flip.shape != indices.shape:
            raise ValueError(f"flip has shape {tuple(flip.shape)}, expected {tuple(indices.shape)}")
        inside = _dispatch.native_module().gather_chunks(
            view.payload.addresses.data_ptr(),
            view.payload.chunk_rows,
            view.size,
            view.payload.stride,
            *self.shape,
            indices.data_ptr(),
            len(indices),
            _dispatch.address(flip),
            scale.data_ptr(),
            bias.data_ptr(),
            _dispatch.DTYPE_CODES[dtype],
            channels_last,
            out.data_ptr(),
            threads or torch.get_num_threads(),
        )
        if not inside:
            check_indices(indices, view.size)
        return out

    @classmethod
    def open(cls, folder: str | Path, **options: object) -> SamplePool:
        """Restores what ``dpfast.pool.saver.Saver`` has saved; see ``dpfast.pool.saver.open_pool``."""
        from dpfast.pool.saver import open_pool

        return open_pool(folder, **options)  # type: ignore[arg-type]


def _channels(
    mean: float | Sequence[float], std: float | Sequence[float], channels: int
) -> tuple[Sequence[float], Sequence[float]]:
    return (
        (mean,) * channels if isinstance(mean, (int, float)) else mean,
        (std,) * channels if isinstance(std, (int, float)) else std,
    )


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format
