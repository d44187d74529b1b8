"""``SamplePool``: append-only storage of samples in chunks, each with its label and its origin."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpfast import config
from dpfast.data.jpeg import read_header
from dpfast.errors import InputError
from dpfast.hardware.device import is_gpu
from dpfast.labels import class_ids
from dpfast.ops import dispatch
from dpfast.ops.chunk_rows import ChunkTable, take_rows
from dpfast.ops.dispatch import CPU
from dpfast.parallel import ALONE
from dpfast.pool import codecs
from dpfast.pool.memory_tiers import NAMES, MemoryTiers, PoolFullError, host_memory, touched
from dpfast.pool.placement import CHUNK_BYTES, Placement
from dpfast.pool.record import RECORD
from dpfast.pool.shared_list import SharedList, with_chunk
from dpfast.pool.snapshot import Payload, PoolSnapshot
from dpfast.samples import SampleBatch

RECORD_CHUNK = 2 << 20  # bytes, one large page
RECORD_ROWS = RECORD_CHUNK // RECORD.itemsize
KEPT = ("seed", "learner_step", "steps", "omega", "cfg_scale")  # of a sample's own origin


class SamplePool:
    """Samples with labels and provenance, in device memory, host memory and files.

    Growing copies nothing that is already in the pool: a new sample is written once, into its
    chunk. One thread at a time appends; any number of threads read meanwhile, without locks: they
    see the samples of finished appends.

    Args:
        codec: "pixels", uint8 (C, H, W); "latents", fp16 (c, h, w); or "jpeg", bytes.
        tiers: Budgets of memory; None: a share of the free host memory.
        chunk_bytes: Bytes of every chunk.
        decode: Function from latents (B, c, h, w) to images (B, C, H, W) in [-1, 1], for a pool of
            latents that serves images.
        shape: (C, H, W) of a payload; None: that of the first one. JPEG images may differ from it:
            there it is the guess of ``reserve`` for the first of them.

    Raises:
        InputError: For an unknown codec and for chunks that do not hold a sample.

    Examples:
        >>> import torch
        >>> from dpfast import SamplePool
        >>> pool = SamplePool()
        >>> pool.append_images(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), [0, 1, 2, 3])
        >>> len(pool), pool.column("label")
        (4, tensor([0, 1, 2, 3]))
    """

    ranks = ALONE
    turn = 0  # one process makes all batches of every round

    def __init__(
        self,
        codec: str = "pixels",
        *,
        tiers: MemoryTiers | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        decode: codecs.Decode | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        if chunk_bytes < 1:
            raise InputError(f"chunk_bytes = {chunk_bytes}, expected at least 1")
        self.codec = codecs.check_codec(codec)
        self.chunk_bytes = chunk_bytes
        self.decode = decode
        self.tiers = tiers or MemoryTiers.detect()
        self.fresh = 0  # samples of the newest round
        self._round: int | None = None
        self._filled = 0  # bytes of JPEG payloads in the last chunk
        self._guess = 0 if shape is None else codecs.row_bytes(codec, shape)  # bytes of a payload
        self._counted: tuple[Sequence[str], Counter[str]] = ((), Counter())
        self._lock = threading.Lock()
        self._worker: ThreadPoolExecutor | None = None
        # chunks with their tiers, ready or being prepared
        self._spares: deque[tuple[str, Future[Tensor]]] = deque()
        bounded = None if decode is None else codecs.BoundedDecode(decode)
        self._snapshot = PoolSnapshot(
            codec, bounded, ChunkTable(chunk_bytes, 1), ChunkTable(RECORD_ROWS, RECORD.itemsize)
        )
        if shape is not None and codec != "jpeg":
            self._adopt(tuple(shape))

    @classmethod
    def from_recipe(
        cls,
        recipe: config.Pool,
        samples: int,
        shape: Sequence[int],
        *,
        device: torch.device = CPU,
        folder: Path | None = None,
        decode: codecs.Decode | None = None,
        processes: int = 1,
    ) -> SamplePool:
        """Returns an empty pool for at most ``samples`` samples, by a recipe's section ``[pool]``.

        Args:
            recipe: Section ``[pool]`` of a recipe.
            samples: Most samples that the pool will hold.
            shape: (C, H, W) of the pixels or latents that are stored.
            device: Device whose memory comes first.
            folder: Folder of the mapped files.
            decode: As in ``SamplePool``.
            processes: As in ``MemoryTiers.detect``.

        Raises:
            RecipeError: Where the samples do not fit; it has the numbers and three ways out.
        """
        placement = Placement.from_recipe(
            recipe, samples, shape, device=device, folder=folder, processes=processes
        )
        return cls(
            recipe.codec,
            tiers=placement.tiers,
            chunk_bytes=placement.chunk_bytes,
            decode=decode,
            shape=shape,
        )

    def __len__(self) -> int:
        return self._snapshot.size

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape (C, H, W) of a payload; None until it is known, and for JPEG."""
        return self._snapshot.shape

    @property
    def local(self) -> SamplePool:
        """The samples that this process holds: all of them."""
        return self

    @property
    def snapshot(self) -> PoolSnapshot:
        """The pool at this moment, for several questions about the same samples."""
        return self._snapshot

    def held(self, size: int) -> int:
        """Returns ``size``: one process holds all samples."""
        return size

    def complete(self, count: int) -> None:
        """Ends a round, which for one process is nothing to do."""

    def fetch(
        self,
        indices: Tensor,
        *,
        device: torch.device = CPU,
        parts: Sequence[Tensor] | None = None,
    ) -> tuple[PoolSnapshot, Tensor]:
        """Returns the pool at this moment and ``indices``, or the part of them.

        Nothing has to be sent. The arguments are those of ``Pool.fetch``.
        """
        return self._snapshot, indices if parts is None else indices[parts[0]]

    def append(
        self,
        batch: SampleBatch,
        *,
        round: int,
        omega: float | Tensor,
        cfg_scale: float = 1.0,
        steps: int = 0,
        seed: int = 0,
        payload: Payload | None = None,
    ) -> None:
        """Appends all samples of ``batch``, or none where it raises.

        The payload is copied once, from the device where it is into its chunk.

        Args:
            batch: Samples that a sampler has made.
            round: Number of the round; 0 for the initial samples.
            omega: Strength of guidance, a number or (B,), one a sample. Like the next three it is
                for the columns of samples that do not bring their own (``SampleBatch.origins``).
            cfg_scale: Scale of classifier-free guidance.
            steps: Solver steps of a sample.
            seed: Seed of the sampler.
            payload: What to store instead of the batch's images, or of its latents in a pool of
                latents: (B, *shape) of the codec's dtype, or B JPEG files. A JPEG pool encodes
                    uint8
                images that come without.

        Raises:
            InputError: For a payload that is not the pool's, and a file that is no JPEG file.
            TypeError: For a payload of another type.
            PoolFullError: Where it does not fit into the budgets.
            OSError: Where the disk of the file tier is full.
        """
        records = np.empty(len(batch), RECORD)
        for name, values in (
            ("label", batch.labels),
            ("sample_id", batch.sample_ids),
            ("entropy", batch.entropy),
        ):
            if len(values) != len(batch):
                raise InputError(
                    f"the batch has {len(batch)} labels and {len(values)} values of {name}"
                )
            records[name] = values.cpu().numpy()
        records["learner_step"] = batch.learner_step
        records["round"] = round
        records["omega"] = omega.cpu().numpy() if isinstance(omega, Tensor) else omega
        records["cfg_scale"] = cfg_scale
        records["steps"] = steps
        records["seed"] = seed
        if batch.origins is not None:
            for name in KEPT:
                records[name] = batch.origins[name]
        if payload is None:
            payload = batch.latents if self.codec == "latents" else batch.images
        if payload is None:
            raise InputError("the batch has no latents, and the pool stores nothing else")
        self.append_records(payload, records)

    def append_images(
        self,
        payload: Payload,
        labels: Tensor | np.ndarray | Sequence[int],
        *,
        round: int | None = None,
    ) -> None:
        """Appends samples of any other origin: their ids count on, and their entropy is NaN.

        Args:
            payload: uint8 images (B, C, H, W), or what else ``append`` takes.
            labels: (B,) integers from 0 on.
            round: Number of the round; None: one more than that of the newest sample.

        Raises:
            InputError: As ``append`` does, and for labels that are no class ids.
            TypeError: As ``append`` does.
            PoolFullError: As ``append`` does.
            OSError: As ``append`` does.
        """
        self._check_codec(payload)
        try:
            labels = torch.as_tensor(labels).cpu()
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"labels must be (B,) integers, got {labels!r}") from None
        labels = class_ids(labels, len(payload), "append_images")
        records = np.zeros(len(labels), RECORD)
        records["label"] = labels.numpy()
        records["sample_id"] = len(self) + np.arange(len(labels))
        records["entropy"] = np.nan
        records["cfg_scale"] = 1
        newest = -1 if self._round is None else self._round
        records["round"] = newest + 1 if round is None else round
        self.append_records(payload, records)

    def append_records(self, payload: Payload, records: np.ndarray) -> None:
        """Appends samples whose columns are there already.

        Args:
            payload: As in ``append``.
            records: (B,) ``dpfast.pool.record.RECORD``; offset and length are ignored.

        Raises:
            InputError: As ``append`` does.
            TypeError: As ``append`` does.
            PoolFullError: As ``append`` does.
            OSError: As ``append`` does.
        """
        with self._lock:
            payload = self._checked(payload, len(records))
            snapshot = self._snapshot
            size = snapshot.size
            if isinstance(payload, Tensor):
                stride = snapshot.chunks.stride
                records["length"] = stride
                records["offset"] = (size + np.arange(len(records))) * stride
                snapshot = self._write_rows(snapshot, payload)
            else:
                headers = [
                    read_header(file, f"payload {row} of {len(payload)}")
                    for row, file in enumerate(payload)
                ]
                coloured = snapshot.coloured or any(header.channels == 3 for header in headers)
                sizes = {header.shown for header in headers} | ({snapshot.alike} if size else set())
                alike = sizes.pop() if len(sizes) == 1 else None
                snapshot = self._write_files(snapshot, payload, records)
                snapshot = replace(snapshot, coloured=coloured, alike=alike)
            origins = _write_records(snapshot.origins, size, records)
            self._count_fresh(records["round"])
            ready = None
            if isinstance(payload, Tensor) and is_gpu(payload.device):
                ready = torch.cuda.Event()
                ready.record()
            size += len(records)
            self._snapshot = replace(snapshot, origins=origins, size=size, ready=ready)

    def _checked(self, payload: Payload, count: int) -> Payload:
        """Returns the payload that goes into the chunks: a tensor (B, *shape) or B files."""
        if len(payload) != count:
            raise InputError(f"{len(payload)} payloads for {count} samples")
        self._check_codec(payload)
        if self.codec == "jpeg":
            if isinstance(payload, Tensor):
                return [codecs.to_jpeg(image) for image in payload]
            largest = max(map(len, payload), default=0)
            if largest > self.chunk_bytes:
                raise InputError(
                    f"a JPEG file has {largest} bytes, a chunk only {self.chunk_bytes}"
                )
            return payload
        assert isinstance(payload, Tensor)
        if self.shape is None:
            self._adopt(tuple(payload.shape[1:]))
        elif tuple(payload.shape[1:]) != self.shape:
            raise InputError(f"images are {tuple(payload.shape[1:])}, the pool holds {self.shape}")
        return payload.detach()

    def _check_codec(self, payload: Payload) -> None:
        """Raises for a payload of another type, dtype or number of dimensions than the pool's."""
        if isinstance(payload, Tensor):
            dtype = codecs.DTYPES.get(self.codec, torch.uint8)
            _check_payload(payload, dtype, "latents" if self.codec == "latents" else "images")
        elif self.codec != "jpeg":
            raise TypeError(f"a pool of {self.codec} takes a tensor, got {type(payload).__name__}")

    def _adopt(self, shape: tuple[int, ...]) -> None:
        """Makes ``shape`` that of all payloads."""
        stride = codecs.row_bytes(self.codec, shape)
        if not 0 < stride <= self.chunk_bytes:
            raise InputError(
                f"a sample of shape {shape} has {stride} bytes, a chunk {self.chunk_bytes}"
            )
        self._snapshot = replace(
            self._snapshot, shape=shape, chunks=ChunkTable(self.chunk_bytes // stride, stride)
        )

    def _write_rows(self, snapshot: PoolSnapshot, rows: Tensor) -> PoolSnapshot:
        """Copies (B, *shape) payloads behind those of ``snapshot``, into new chunks where it has no
        room; returns it with those chunks.
        """
        done = 0
        per_chunk = snapshot.chunks.chunk_rows
        while done < len(rows):
            number, start = divmod(snapshot.size + done, per_chunk)
            if number == len(snapshot.chunks.chunks):
                snapshot = self._grown(snapshot)
            count = min(per_chunk - start, len(rows) - done)
            _write(snapshot.chunks.block(number)[start : start + count], rows[done : done + count])
            done += count
            if start < per_chunk // 2 <= start + count and not self._spares:
                with contextlib.suppress(PoolFullError):  # there may be no need for another chunk
                    self._prepare(snapshot)
        return snapshot

    def _write_files(
        self, snapshot: PoolSnapshot, files: Sequence[bytes], records: np.ndarray
    ) -> PoolSnapshot:
        """Writes JPEG files as ``_write_rows`` writes rows; ``records`` get their offsets and
        lengths.
        """
        filled = self._filled
        for row, data in enumerate(files):
            if not snapshot.chunks.chunks or filled + len(data) > self.chunk_bytes:
                snapshot = self._grown(snapshot)
                filled = 0
            end = filled + len(data)
            snapshot.chunks.chunks[-1][filled:end].copy_(
                torch.frombuffer(bytearray(data), dtype=torch.uint8)
            )
            records["offset"][row] = (len(snapshot.chunks.chunks) - 1) * self.chunk_bytes + filled
            records["length"][row] = len(data)
            filled = end
        self._filled = filled
        return snapshot

    def _count_fresh(self, rounds: np.ndarray) -> None:
        """Counts the samples since the last change of the round."""
        if not len(rounds):
            return
        changes = np.flatnonzero(
            np.diff(rounds, prepend=rounds[0] if self._round is None else self._round)
        )
        self.fresh = len(rounds) - int(changes[-1]) if len(changes) else self.fresh + len(rounds)
        self._round = int(rounds[-1])

    def reserve(self, samples: int, *, wait: bool = False) -> None:
        """Prepares chunks for ``samples`` more in the background, so that an append is one copy.

        Their pages are touched as well. Without it the pool prepares one chunk ahead. JPEG files
        are taken to be as large as those before them, the first ones as half a byte a pixel.

        Args:
            samples: Samples to come.
            wait: True returns when the chunks are there.

        Raises:
            PoolFullError: Where the budgets have no room for them.
            InputError: While the pool does not know how large a sample is.
        """
        with self._lock:
            snapshot = self._snapshot
            chunks = -(-self._bytes_with(samples) // self.chunk_bytes)
            for _ in range(chunks - len(snapshot.chunks.chunks) - len(self._spares)):
                self._prepare(snapshot)
            spares = list(self._spares)
        for _, spare in spares if wait else ():
            spare.result()

    def _bytes_with(self, samples: int) -> int:
        """Returns bytes of the chunks that the pool and ``samples`` more fill, for JPEG an
        estimate.
        """
        snapshot = self._snapshot
        if self.codec == "jpeg" and (snapshot.size or self._guess):
            used = max(len(snapshot.chunks.chunks) - 1, 0) * self.chunk_bytes + self._filled
            each = -(-used // snapshot.size) if snapshot.size else self._guess
            return used + samples * each
        if self.shape is None:
            raise InputError(
                "reserve needs the size of a sample: give the pool a shape, or append first"
            )
        return -(-(snapshot.size + samples) // snapshot.chunks.chunk_rows) * self.chunk_bytes

    def _grown(self, snapshot: PoolSnapshot) -> PoolSnapshot:
        """Returns ``snapshot`` with one more chunk, the next of those that were prepared."""
        used = self._used(snapshot)
        if self._spares:
            tier, spare = self._spares.popleft()
            chunk = spare.result()
        else:
            tier = self.tiers.next_tier(used, self.chunk_bytes)
            chunk = self.tiers.allocate(tier, self.chunk_bytes)
        grown = snapshot.tiers.plus(tier)
        self._counted = grown, used + Counter([tier])
        return replace(snapshot, chunks=with_chunk(snapshot.chunks, chunk), tiers=grown)

    def _used(self, snapshot: PoolSnapshot) -> Counter[str]:
        """Counts the chunks of ``snapshot`` in each tier; counted anew only where a snapshot was
        dropped.
        """
        if self._counted[0] is not snapshot.tiers:
            self._counted = snapshot.tiers, Counter(snapshot.tiers)
        return self._counted[1]

    def _prepare(self, snapshot: PoolSnapshot) -> None:
        """Allocates the next chunk in the background and touches its pages, half of an append's
        time otherwise.
        """
        tiers = self.tiers
        used = self._used(snapshot) + Counter(name for name, _ in self._spares)
        tier = tiers.next_tier(used, self.chunk_bytes)
        self._worker = self._worker or ThreadPoolExecutor(1, "dpfast-pool-chunk")
        self._spares.append(
            (tier, self._worker.submit(lambda: touched(tiers.allocate(tier, self.chunk_bytes))))
        )

    def move(self, tiers: MemoryTiers) -> None:
        """Gives the pool other budgets and moves its chunks to where they put them.

        Chunks keep the order of appending. Readers go on with the old ones until they have
        finished; appends wait.

        Raises:
            PoolFullError: Where the budgets have no room for all chunks; nothing is moved.
        """
        with self._lock:
            snapshot = self._snapshot
            moved: list[str] = []
            used: Counter[str] = Counter()
            for _ in snapshot.chunks.chunks:
                moved.append(tiers.next_tier(used, self.chunk_bytes))
                used[moved[-1]] += 1
            self._spares.clear()
            chunks = list(snapshot.chunks.chunks)
            changed = [i for i, tier in enumerate(moved) if tier != snapshot.tiers[i]]
            # to slower tiers first: that frees budget
            for i in sorted(changed, key=lambda i: -NAMES.index(moved[i])):
                chunks[i] = tiers.allocate(moved[i], self.chunk_bytes).copy_(chunks[i])
                snapshot = replace(
                    snapshot,
                    chunks=snapshot.chunks.with_chunks(chunks),
                    tiers=SharedList([*snapshot.tiers[:i], moved[i], *snapshot.tiers[i + 1 :]]),
                )
                self._snapshot = snapshot
            self.tiers = tiers

    def in_tier(self) -> dict[str, int]:
        """Counts the samples in each tier."""
        snapshot = self._snapshot
        counts = Counter(snapshot.tiers[number] for number in snapshot.chunk_numbers().tolist())
        return {name: counts[name] for name in NAMES}

    @property
    def nbytes(self) -> int:
        """The bytes of all chunks and records that the pool has allocated."""
        snapshot = self._snapshot
        return sum(chunk.nbytes for chunk in (*snapshot.chunks.chunks, *snapshot.origins.chunks))

    def column(self, name: str, start: int = 0) -> Tensor:
        """Returns the values of a column in the order of appending.

        Args:
            name: Name of a column of ``dpfast.pool.record``.
            start: Index of the first value.

        Returns:
            (N - start,) int64 or float32.
        """
        snapshot = self._snapshot
        return snapshot.column(name, torch.arange(start, snapshot.size))

    def records(
        self, start: int = 0, stop: int | None = None, *, threads: int | None = None
    ) -> np.ndarray:
        """Returns copies of the ``RECORD`` of the samples ``start`` to ``stop``.

        Args:
            start: Index of the first sample.
            stop: Index behind the last sample; None: the end.
            threads: As in ``PoolSnapshot.payload``.
        """
        snapshot = self._snapshot
        return snapshot.records(
            torch.arange(start, snapshot.size if stop is None else stop), threads=threads
        )

    def payload(self, indices: Tensor, **options: Any) -> Payload:
        """Returns ``PoolSnapshot.payload`` of the pool at this moment."""
        return self._snapshot.payload(indices, **options)

    def images(self, indices: Tensor, **options: Any) -> Tensor:
        """Returns ``PoolSnapshot.images`` of the pool at this moment."""
        return self._snapshot.images(indices, **options)

    def gather(self, indices: Tensor, *form: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Returns ``PoolSnapshot.gather`` of the pool at this moment."""
        return self._snapshot.gather(indices, *form, **options)


def _write(room: Tensor, rows: Tensor) -> None:
    """Copies (B, *shape) payloads once, into (B, bytes of each) uint8 of a chunk."""
    if (
        rows.is_contiguous()
        and rows.device == room.device == CPU
        and dispatch.backend_for(CPU) == "native"
    ):
        table = ChunkTable(len(rows), room.shape[1]).with_chunks([rows.view(torch.uint8).view(-1)])
        # Its stores bypass the caches, those of copy_ do not.
        take_rows(table, torch.arange(len(rows)), len(rows), out=room)
    else:
        room.view(rows.dtype).view(rows.shape).copy_(rows)


def _write_records(table: ChunkTable, size: int, records: np.ndarray) -> ChunkTable:
    """Copies ``records`` behind the first ``size`` ones of ``table``; returns it with the chunks
    that this took.
    """
    done = 0
    while done < len(records):
        number, start = divmod(size + done, RECORD_ROWS)
        if number == len(table.chunks):
            table = with_chunk(table, host_memory(RECORD_CHUNK))
        count = min(RECORD_ROWS - start, len(records) - done)
        rows = table.block(number).numpy().view(RECORD)[:, 0]
        rows[start : start + count] = records[done : done + count]
        done += count
    return table


def _check_payload(payload: Tensor, dtype: torch.dtype, name: str) -> None:
    if payload.dtype != dtype or payload.ndim != 4:
        wanted = str(dtype).removeprefix("torch.")
        raise InputError(
            f"{name} are {payload.dtype} {tuple(payload.shape)}, expected {wanted} (B, C, H, W)"
        )
