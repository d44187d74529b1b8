"""Fashion-MNIST as the IDX files of its authors (Zalando SE, MIT licence), padded to 32x32."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpfast.errors import InputError

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_IDX_UINT8 = 0x08


def read_idx(path: Path) -> Tensor:
    """Reads one gzip-compressed IDX file of unsigned bytes.

    Returns a uint8 tensor with the shape that the file's header states. Raises
    ``FileNotFoundError`` when the file is missing and ``InputError`` when it is not an IDX file of
    bytes or is cut short.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a gzip-compressed IDX file")
    raw = gzip.decompress(path.read_bytes())
    if len(raw) < 4 or raw[0] or raw[1] or raw[2] != _IDX_UINT8:
        raise InputError(f"{path} is not an IDX file of unsigned bytes")
    rank = raw[3]
    shape = tuple(np.frombuffer(raw, dtype=">u4", count=rank, offset=4).tolist())
    data = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank)
    if data.size != int(np.prod(shape)):
        raise InputError(f"{path} holds {data.size} bytes, its header promises shape {shape}")
    return torch.from_numpy(data.reshape(shape).copy())


def holds_split(folder: Path, split: str) -> bool:
    """Returns True if a folder has both files of ``split``, as ``read_split`` reads them."""
    kinds = ("images-idx3", "labels-idx1")
    return all((folder / f"{split}-{kind}-ubyte.gz").is_file() for kind in kinds)


def read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Reads ``split`` ("train" or "t10k") from a folder with the four files of the data set.

    Returns images (N, 1, 32, 32) uint8, the 28x28 originals with a border of two zero pixels, and
    labels (N,) int64.
    """
    images = read_idx(Path(folder) / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(Path(folder) / f"{split}-labels-idx1-ubyte.gz")
    return F.pad(images, (2, 2, 2, 2)).unsqueeze(1), labels.long()
