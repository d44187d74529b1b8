"""The samples of another run, of an export or of another's dataset, to train on once more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dpfast import imagenet
from dpfast.data.class_folders import ClassNames
from dpfast.data.folders import fit_file, fit_pixels
from dpfast.data.jpeg import read_header
from dpfast.errors import InputError
from dpfast.labels import class_ids
from dpfast.parallel import ALONE, Ranks
from dpfast.pool.codecs import Decode, to_jpeg
from dpfast.pool.snapshot import Payload
from dpfast.pool.stored import Stored
from dpfast.samples import SampleBatch
from dpfast.sources.existing import chosen
from dpfast.sources.labels import LabelOrder


class OtherPool:
    """At most ``most`` samples of a pool: all in their order, or of fewer the classes in turn
    (``chosen``), so that of a balanced pool they are its first ones.

    A sample keeps its id and all that is known of its making; its image gets the run's shape, its
    label the id that its class has here.

    Args:
        stored: the samples; folder: what the recipe calls them.
        classes: the run's, by id; shape: (C, H, W).
        rounds: whose samples are taken; (): all.
        order: the run's labels, which with class counts say how many of each class.
        decode: latents (B, c, h, w) to images (B, C, H, W) in [-1, 1]; needed for those.
        files: whether the run's pool keeps JPEG files.
        device: where the images are handed over.

    Raises ``InputError`` for other classes, rounds that the pool has not, and latents that nothing
    decodes.
    """

    def __init__(
        self,
        stored: Stored,
        folder: str,
        classes: Sequence[str],
        shape: tuple[int, ...],
        *,
        rounds: Sequence[int] = (),
        order: LabelOrder,
        most: int,
        decode: Decode | None = None,
        files: bool = False,
        device: torch.device | str = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        what = f"pool_from = {folder!r}"
        if stored.codec == "latents" and decode is None:
            raise InputError(f"{what}: its latents are decoded by their run; expected its folder")
        self._stored, self._shape, self._decode, self._files = stored, shape, decode, files
        self._device, self._ranks = device, ranks
        rows = _of_rounds(stored.records["round"], rounds, what)
        labels = torch.from_numpy(stored.records["label"][rows].astype(np.int64))
        labels = _as_here(labels, stored.classes, classes, what)
        self.total = len(rows)
        if most < len(rows) or order.counts is not None:
            kept = chosen(labels, order, most, what)
            rows, labels = rows[kept.numpy()], labels[kept]
        self._rows, self._labels = rows, labels

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, places: range) -> SampleBatch:
        rows = self._rows[places.start : places.stop]
        images, files = self._fitted(self._stored.payload(rows))
        self._ranks.beat()
        records = self._stored.records[rows]
        return SampleBatch(
            images=images.to(self._device),
            labels=self._labels[places.start : places.stop].to(self._device),
            sample_ids=torch.from_numpy(records["sample_id"].copy()).to(self._device),
            entropy=torch.from_numpy(records["entropy"].copy()).to(self._device),
            files=files,
            origins=records,
        )

    def _fitted(self, payload: Payload) -> tuple[Tensor, list[bytes] | None]:
        """Returns images (B, C, H, W) uint8 of the run's shape, and the files that its pool
        keeps.
        """
        if isinstance(payload, Tensor):
            if self._stored.codec == "latents":
                payload = self._decoded(payload)
            images = torch.stack([fit_pixels(image, self._shape) for image in payload])
            return images, [to_jpeg(image) for image in images] if self._files else None
        found = [fit_file(file, "a JPEG file of pool_from", self._shape) for file in payload]
        images = torch.stack([image for image, _ in found])
        if not self._files:
            return images, None
        return images, [to_jpeg(image) if file is None else file for image, file in found]

    @torch.no_grad()
    def _decoded(self, latents: Tensor) -> Tensor:
        assert self._decode is not None
        images = self._decode(latents.float()).cpu().float()
        if not bool(images.isfinite().all()):
            raise InputError("pool_from: its latents are decoded to images that are not finite")
        return images.add(1).mul(127.5).clamp(0, 255).round().byte()


def shape_of(stored: Stored) -> tuple[int, ...] | None:
    """Returns (C, H, W) of a pool's images; None where only a decoder knows it, or the pool is
    empty.
    """
    if stored.codec == "pixels":
        return None if stored.shape is None else tuple(stored.shape)
    if stored.codec == "latents" or not len(stored.records):
        return None
    (file,) = stored.payload(np.zeros(1, np.int64))
    header = read_header(bytes(file), "the pool's first JPEG file")
    return (header.channels, *(header.shown or (header.height, header.width)))


def _of_rounds(found: np.ndarray, rounds: Sequence[int], what: str) -> np.ndarray:
    """Returns the rows of the samples of some rounds, (): of all."""
    there = np.unique(found).tolist()
    if not there:
        raise InputError(f"{what}: it is empty")
    for number in rounds:
        if number not in there:
            shown = ", ".join(map(str, there[:10])) + (", ..." if len(there) > 10 else "")
            raise InputError(f"pool_rounds = {number}: {what} has the rounds {shown}")
    return np.flatnonzero(np.isin(found, rounds)) if rounds else np.arange(len(found))


def _as_here(
    labels: Tensor, names: Sequence[str] | None, classes: Sequence[str], what: str
) -> Tensor:
    """Returns labels by the run's classes: where the pool names its own, those that are called
    so.
    """
    if names is None or list(names) == list(classes):
        return class_ids(labels, len(labels), what, len(classes))
    class_ids(labels, len(labels), what, len(names))
    try:
        ids = imagenet.load().ids_of(classes)
    except InputError:
        ids = None
    known = ClassNames(classes, ids)
    mapped = torch.full((len(names),), -1)
    for label in labels.unique().tolist():
        called = known.called(names[label])
        if len(called) != 1:
            raise InputError(
                f"{what}: its class {names[label]!r} is "
                f"{'one of several' if called else 'none'} of the run's; expected "
                f"{classes[0]!r}, {classes[-1]!r} or another of {len(classes)}"
            )
        mapped[label] = called[0]
    twice = mapped[mapped >= 0].bincount(minlength=len(classes)).gt(1).nonzero()
    if len(twice):
        raise InputError(f"{what}: two of its classes are {classes[int(twice[0])]!r}")
    return mapped[labels]
