"""``SamplePool``: append-only storage of samples in fixed-size chunks, with every sample's origin beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpfast.generate.sampler import SampleBatch
from dpfast.ops import gather_batch

CHUNK = 8192  # samples; a growing pool allocates chunks and never moves a sample


@dataclass(frozen=True)
class _Chunk:
    images: Tensor  # (CHUNK, C, H, W) uint8
    columns: dict[str, Tensor] = field(default_factory=dict)


def _columns(size: int) -> dict[str, Tensor]:
    return {
        "label": torch.zeros(size, dtype=torch.int64),
        "sample_id": torch.zeros(size, dtype=torch.int64),
        "entropy": torch.zeros(size),  # nats, under the learner at birth
        "learner_step": torch.zeros(size, dtype=torch.int64),
        "round": torch.zeros(size, dtype=torch.int64),
        "omega": torch.zeros(size),
    }


class SamplePool:
    """uint8 images with labels and provenance, in host memory.

    Growing copies nothing that is already in the pool: a new sample is written once, into its chunk.
    """

    def __init__(self) -> None:
        self._chunks: list[_Chunk] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, batch: SampleBatch, *, round: int, omega: float) -> None:
        """Appends all samples of ``batch``. ``round`` counts the additions (0: the initial samples).

        Raises ``ValueError`` when the images are not uint8 (B, C, H, W) or differ in shape from the pool's.
        """
        images = batch.images
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, expected uint8 (B, C, H, W)")
        if self._chunks and images.shape[1:] != self._chunks[0].images.shape[1:]:
            raise ValueError(
                f"images are {tuple(images.shape[1:])}, the pool holds {tuple(self._chunks[0].images.shape[1:])}"
            )
        self._extend(
            images,
            {
                "label": batch.labels,
                "sample_id": batch.sample_ids,
                "entropy": batch.entropy,
                "learner_step": batch.learner_step,
                "round": round,
                "omega": omega,
            },
        )

    def _extend(self, images: Tensor, rows: Mapping[str, Tensor | float]) -> None:
        done = 0
        while done < len(images):
            if self._size == len(self._chunks) * CHUNK:
                self._chunks.append(_Chunk(torch.empty(CHUNK, *images.shape[1:], dtype=torch.uint8), _columns(CHUNK)))
            chunk, start = self._chunks[-1], self._size % CHUNK
            count = min(CHUNK - start, len(images) - done)
            chunk.images[start : start + count] = images[done : done + count]
            for name, value in rows.items():
                values = value[done : done + count] if isinstance(value, Tensor) else value
                chunk.columns[name][start : start + count] = values
            self._size += count
            done += count

    def state(self) -> dict[str, Tensor]:
        """All images and columns; ``restore`` takes it into an empty pool."""
        return {"images": self.images(torch.arange(self._size)), **{name: self.column(name) for name in _columns(0)}}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._extend(state["images"], {name: state[name] for name in _columns(0)})

    def column(self, name: str) -> Tensor:
        """(N,) values of a column of ``_columns``, in the order of appending: label, sample_id, entropy, ..."""
        if not self._chunks:
            return _columns(0)[name]
        return torch.cat([chunk.columns[name] for chunk in self._chunks])[: self._size]

    def images(self, indices: Tensor) -> Tensor:
        """uint8 (B, C, H, W) copies of the samples at ``indices`` (B,)."""
        out = torch.empty(len(indices), *self._chunks[0].images.shape[1:], dtype=torch.uint8)
        for number, rows in self._by_chunk(indices):
            out[rows] = self._chunks[number].images[indices[rows] - number * CHUNK]
        return out

    def gather(
        self, indices: Tensor, *, flip: Tensor | None = None, mean: float = 0.5, std: float = 0.5
    ) -> tuple[Tensor, Tensor]:
        """Normalised float32 images (B, C, H, W) in channels-last memory, and labels (B,), at ``indices`` (B,).

        flip: (B,) bool, mirrors a sample left to right. The value of a pixel is (v / 255 - mean) / std.
        """
        shape = self._chunks[0].images.shape[1:]
        images = torch.empty(len(indices), *shape, memory_format=torch.channels_last)
        labels = torch.empty(len(indices), dtype=torch.int64)
        for number, rows in self._by_chunk(indices):
            chunk, local = self._chunks[number], indices[rows] - number * CHUNK
            images[rows] = gather_batch(
                chunk.images,
                local,
                flip=None if flip is None else flip[rows],
                mean=(mean,) * shape[0],
                std=(std,) * shape[0],
                dtype=torch.float32,
                channels_last=True,
            )
            labels[rows] = chunk.columns["label"][local]
        return images, labels

    def _by_chunk(self, indices: Tensor) -> list[tuple[int, Tensor]]:
        """(chunk number, rows of ``indices`` that lie in it)."""
        if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= self._size):
            raise IndexError(
                f"indices reach {int(indices.min())}..{int(indices.max())}, the pool holds {self._size} samples"
            )
        numbers = indices // CHUNK
        return [
            (n, torch.nonzero(numbers == n).flatten()) for n in range(len(self._chunks)) if bool((numbers == n).any())
        ]
