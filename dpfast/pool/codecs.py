"""The payloads of samples: uint8 pixels, fp16 latents or JPEG bytes; and the file formats that hold
them exactly.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpfast.data.pictures import from_image_file
from dpfast.errors import InputError
from dpfast.hardware.out_of_memory import HalvingBatches

# of payloads of one shape, a row of bytes a sample
DTYPES = {"pixels": torch.uint8, "latents": torch.float16}
CODECS = (*DTYPES, "jpeg")
JPEG_QUALITY = 95
JPEG_BYTES_PER_PIXEL = 0.5  # an estimate: photographs at quality 95 take 0.3 to 0.6
# of the pixels' own bytes, an estimate: a photograph of 224 px takes 0.65 (docs/records/scaling.md)
PNG_SHARE = 0.75
# of a saved sample beside its payload: headers and files of label and columns, padding, a record
TAR_BYTES = 6 * 512

Decode = Callable[[Tensor], Tensor]  # latents (B, c, h, w) to images (B, C, H, W) in [-1, 1]
DECODED = 1 << 18  # values of latents that are decoded at a time: 16 samples of 4 x 64 x 64


class BoundedDecode:
    """A ``Decode`` that takes a batch of any size in parts of ``DECODED`` values, which halve where
    memory runs out.

    The decoder of Stable Diffusion 1.5 at 512 px holds 384 MiB a sample (counted), a training batch
    has hundreds.
    """

    def __init__(self, decode: Decode) -> None:
        self.decode = decode
        self._batches: HalvingBatches | None = None

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        if not len(latents):
            return self.decode(latents)
        if self._batches is None:
            self._batches = HalvingBatches(max(1, DECODED // latents[0].numel()), latents.device)
        parts = self._batches.over(len(latents), lambda rows: self.decode(latents[rows]))
        return torch.cat(list(parts))


def check_codec(codec: str) -> str:
    """Returns ``codec``, which is one of ``CODECS``; raises ``InputError`` for another."""
    if codec not in CODECS:
        raise InputError(f"codec = {codec!r}, expected one of {', '.join(CODECS)}")
    return codec


def row_bytes(codec: str, shape: Sequence[int]) -> int:
    """Returns bytes of one payload of ``shape`` (C, H, W); for JPEG an estimate."""
    elements = int(np.prod(shape))
    if codec == "jpeg":
        return int(elements * JPEG_BYTES_PER_PIXEL)
    return elements * DTYPES[codec].itemsize


def saved_bytes(codec: str, shape: Sequence[int], images: str = "png") -> int:
    """Returns bytes on a disk of one sample whose payload is of ``shape`` (C, H, W): an estimate
    for PNG and JPEG.

    images: a recipe's ``save_samples``; "none" takes nothing.
    """
    if images == "none":
        return 0
    payload = row_bytes("jpeg" if images == "jpeg" else codec, shape)
    if codec == "pixels" and images == "png":
        payload = int(payload * PNG_SHARE)
    return TAR_BYTES + payload


def to_jpeg(image: Tensor, quality: int = JPEG_QUALITY) -> bytes:
    """Returns JPEG bytes of a uint8 image (C, H, W), without loss of colour resolution.

    Raises ``InputError`` unless it has one or three channels.
    """
    return _encoded(image.cpu().numpy(), format="JPEG", quality=quality, subsampling=0)


def to_png(pixels: np.ndarray) -> bytes:
    """Returns PNG bytes of uint8 pixels (C, H, W). Raises ``InputError`` unless they have one or
    three channels.
    """
    return _encoded(pixels, format="PNG", compress_level=1)


def _encoded(pixels: np.ndarray, **options: object) -> bytes:
    if pixels.shape[0] not in (1, 3):
        raise InputError(
            f"an image file holds one or three channels, the sample has {pixels.shape[0]}"
        )
    buffer = io.BytesIO()
    rows = pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(rows)).save(buffer, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def from_image_files(files: Sequence[bytes], threads: int = 1) -> np.ndarray:
    """Returns (B, C, H, W) uint8 pixels of images of one shape, decoded by so many threads; Pillow
    holds no lock meanwhile.
    """
    if threads == 1:
        return np.stack([from_image_file(file) for file in files])
    with ThreadPoolExecutor(threads, "dpfast-decode") as executor:
        return np.stack(list(executor.map(from_image_file, files, chunksize=16)))


def npy_header(codec: str, shape: Sequence[int]) -> bytes:
    """Returns the bytes of an .npy file before its data."""
    buffer = io.BytesIO()
    descr = "|u1" if codec == "pixels" else "<f2"
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": descr, "fortran_order": False, "shape": tuple(int(s) for s in shape)}
    )
    return buffer.getvalue()
