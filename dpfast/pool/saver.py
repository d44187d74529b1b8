"""Saving a pool in the background."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from dpfast.errors import InputError, SaveWarning
from dpfast.pool import codecs, shards
from dpfast.pool.memory_tiers import readable
from dpfast.pool.owner import Owner
from dpfast.pool.pool import SamplePool

IMAGES = {"npy": "npy", "png": "png", "jpeg": "jpg"}  # how pixels are kept, and the suffix
SHARD_SAMPLES = 10_000
SHARD_BYTES = 512 << 20
READ_BYTES = 64 << 20  # of payloads that are copied out of the pool at a time


class Saver:
    """Writes a pool's new samples into a folder of webdataset shards, in a thread of its own.

    Call ``save`` after an addition: it returns at once. ``wait`` returns when everything asked for
    is on the disk, or saving has stopped. A failure (a full disk) is a ``SaveWarning`` and in
    ``error``; what the manifest promises stays intact, and the next ``save`` tries again from
    there. Training reads the pool in memory and is never touched.

    Args:
        pool: Pool whose samples go into shards, except for those that the folder has already.
        folder: Folder of the shards.
        images: Of a pool of pixels "npy" (raw, opened fastest), "png", or "jpeg", whose files
            ``encoded`` makes; latents are .npy and JPEG .jpg.
        classes: Names of the labels, kept in the manifest.
        shard_samples: Most samples of a shard.
        truncate: True drops the shards that hold more than the pool does, where a run goes back to
            an earlier state.
        reserve: Bytes of the disk that are left to others: no shard is begun that would take from
            them.

    Raises:
        InputError: Where the folder holds another pool's samples.
        OSError: For what the file system refuses.
        OwnedError: Where another process saves into the folder.
    """

    def __init__(
        self,
        pool: SamplePool,
        folder: str | Path,
        *,
        images: str = "npy",
        classes: Sequence[str] | None = None,
        shard_samples: int = SHARD_SAMPLES,
        truncate: bool = False,
        reserve: int = 0,
    ) -> None:
        if images not in IMAGES:
            raise InputError(f"images = {images!r}, expected one of {', '.join(IMAGES)}")
        if shard_samples < 1:
            raise InputError(f"shard_samples = {shard_samples}, expected at least 1")
        self.pool = pool
        self.folder = Path(folder)
        self.shard_samples = shard_samples
        self.error: BaseException | None = None
        self.reserve = reserve
        self._suffix = {"pixels": IMAGES[images], "latents": "npy", "jpeg": "jpg"}[pool.codec]
        self._files: dict[
            int, bytes
        ] = {}  # JPEG files of a pool of pixels, by row, until they are on the disk
        self._classes = None if classes is None else list(classes)
        self._owner = Owner(self.folder)
        try:
            self._manifest = self._existing(truncate)
        except BaseException:
            self._owner.close()
            raise
        self._asked = self.saved
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="dpfast-pool-saver", daemon=True)
        self._thread.start()

    def _existing(self, truncate: bool) -> shards.Manifest:
        if not (self.folder / shards.MANIFEST).exists():
            return shards.Manifest(self.pool.codec, None, self._suffix, self._classes)
        manifest = shards.Manifest.read(self.folder)
        while truncate and manifest.samples > len(self.pool):
            manifest = dataclasses.replace(manifest, shards=manifest.shards[:-1])
        count = manifest.samples
        ids = [np.arange(a, b + 1) for shard in manifest.shards for a, b in shard.ids]
        same = manifest.codec == self.pool.codec and count <= len(self.pool)
        if not same or not np.array_equal(
            np.concatenate([*ids, []]), self.pool.records(0, count)["sample_id"]
        ):
            raise InputError(
                f"{str(self.folder)!r} holds {count} samples "
                "that are not the first ones of this pool"
            )
        if truncate:
            manifest.write(self.folder)
        self._suffix = manifest.suffix
        return manifest

    @property
    def saved(self) -> int:
        """The number of the pool's samples that are on the disk for good."""
        return self._manifest.samples

    @property
    def shards(self) -> list[shards.Shard]:
        """The manifest of what is on the disk."""
        return self._manifest.shards

    def encoded(self, images: torch.Tensor) -> torch.Tensor:
        """Returns uint8 images (B, C, H, W) as they come back from JPEG files, which are kept for
        the pool's next B samples.

        So a pool of pixels holds from the first moment what a resumed run will read: to encode
        again is not exact.
        """
        first = len(self.pool)
        decoded, files = through_jpeg(images)
        self._files |= dict(enumerate(files, first))
        return decoded

    def save(self) -> None:
        """Asks for everything that the pool holds now."""
        with self._changed:
            self._asked = len(self.pool)
            self.error = None
            self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the last ``save``, ``timeout`` seconds at most, and returns ``saved``.

        It is less than was asked for where saving has stopped, or goes on.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self.saved >= self._asked
                    or self.error is not None
                    or not self._thread.is_alive()
                ),
                timeout,
            )
            if self.saved < self._asked and self.error is None and not self._thread.is_alive():
                self.error = RuntimeError("the thread that saves the pool has died")
            return self.saved

    def close(self) -> int:
        """Finishes what was asked for, ends the thread and returns ``saved``."""
        self.wait()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._owner.close()
        return self.saved

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or (self.error is None and self.saved < self._asked)
                )
                if self._closed:
                    return
                asked = self._asked
            try:
                self._write(asked)
            except (
                BaseException
            ) as error:  # whatever ends a save is reported where it is waited for
                try:
                    warnings.warn(
                        f"saving the pool to {str(self.folder)!r} has stopped: {error!r}. "
                        f"{self.saved} of "
                        f"{len(self.pool)} samples are on the disk, all are in memory and training "
                        "goes on; the next "
                        "save tries again",
                        SaveWarning,
                        stacklevel=1,
                    )
                finally:
                    with self._changed:
                        self.error = error
                        self._changed.notify_all()

    def _write(self, stop: int) -> None:
        """Writes the samples up to ``stop``, shard by shard, on this thread alone (see
        ``memory_tiers.touched``).
        """
        while self.saved < stop:
            start = self.saved
            records = self.pool.records(start, min(stop, start + self.shard_samples), threads=1)
            fitting = int(
                np.searchsorted(np.cumsum(records["length"], dtype=np.int64), SHARD_BYTES, "right")
            )
            records = records[: max(fitting, 1)]
            self._check_disk(records)
            header = b""
            if self._suffix == "npy":
                assert self.pool.shape is not None
                header = codecs.npy_header(self.pool.codec, self.pool.shape)
            shard = shards.write_shard(
                self.folder,
                self._manifest.next_name(),
                records,
                self._payloads(start, records["length"]),
                self._suffix,
                header,
            )
            manifest = dataclasses.replace(
                self._manifest,
                shape=None if self.pool.shape is None else list(self.pool.shape),
                classes=self._classes or self._manifest.classes,
                shards=[*self._manifest.shards, shard],
            )
            self._owner.check()
            manifest.write(self.folder)
            for row in range(start, start + len(records)):
                self._files.pop(row, None)
            with self._changed:
                self._manifest = manifest
                self._changed.notify_all()

    def _check_disk(self, records: np.ndarray) -> None:
        """Raises ``OSError`` where a shard of ``records`` would leave less of the disk than
        ``reserve``.
        """
        needed = int(records["length"].sum(dtype=np.int64)) + len(records) * codecs.TAR_BYTES
        free = shutil.disk_usage(self.folder).free
        if self.reserve and free - needed < self.reserve:
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}: {readable(free)} are free, the next {len(records)} "
                "samples need up to "
                f"{readable(needed)}, and {readable(self.reserve)} are left for checkpoints",
            )

    def _payloads(self, start: int, lengths: np.ndarray) -> Iterator[bytes | memoryview]:
        step = max(1, READ_BYTES // max(int(lengths.max()), 1))
        for first in range(0, len(lengths), step):
            rows = torch.arange(start + first, start + min(first + step, len(lengths)))
            if self._suffix == "jpg" and self.pool.codec == "pixels":
                yield from (self._files[row] for row in rows.tolist())
                continue
            payload = self.pool.payload(rows, threads=1)
            if not isinstance(payload, torch.Tensor):
                yield from payload
            elif self._suffix == "png":
                yield from (codecs.to_png(pixels) for pixels in payload.numpy())
            else:
                yield from (
                    memoryview(row).cast("B") for row in payload.flatten(1).numpy().view(np.uint8)
                )


def through_jpeg(images: torch.Tensor) -> tuple[torch.Tensor, list[bytes]]:
    """Returns (B, C, H, W) uint8 as they come back from JPEG, on their device, and the files."""
    files = [codecs.to_jpeg(image) for image in images.cpu()]
    return torch.from_numpy(codecs.from_image_files(files)).to(images.device), files


def copy_saved(
    source: Path, target: Path, samples: int, *, beat: Callable[[], None] = lambda: None
) -> None:
    """Gives a new folder the shards that hold the first ``samples`` of a saved pool: linked, or
    copied elsewhere.

    A shard never changes once it has its name, so two folders can share it. Checksums go with them:
    what is damaged is found where the copy is opened. ``beat`` is called after each shard. Raises
    ``DamagedPoolError`` when fewer samples are saved, or a shard is missing.
    """
    manifest = shards.Manifest.read(source)
    held = 0
    target.mkdir(parents=True)
    for count, shard in enumerate(manifest.shards):
        if held >= samples:
            manifest = dataclasses.replace(manifest, shards=manifest.shards[:count])
            break
        held += shard.samples
        for name in (shard.name, shard.columns):
            try:
                _link(source / name, target)
            except FileNotFoundError:
                if name == shard.name:
                    raise shards.DamagedPoolError(f"{source / name} is missing") from None
        beat()
    if held < samples:
        raise shards.DamagedPoolError(f"{str(source)!r} holds {held} samples, {samples} are needed")
    dataclasses.replace(manifest, quarantined=[]).write(target)


def _link(path: Path, target: Path) -> None:
    """Puts ``path`` into the folder ``target`` as well: as another name of the file, or a copy
    where the disk refuses that.
    """
    try:
        (target / path.name).hardlink_to(path)
        shards.sync_folder(target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without hard links
        with path.open("rb") as data, shards.durable(target, path.name) as file:
            shutil.copyfileobj(data, file, READ_BYTES)
