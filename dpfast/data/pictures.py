"""The one place that reads image files and pictures, and decides which pixels they show.

formats        PNG, JPEG, WebP, BMP, GIF and TIFF, whichever of them the file's name says; files
               that are called as images of other formats are refused, not passed over
grey           one channel: grey with and without alpha, 1 bit (0 and 255), and 16 bits, of
               which the upper eight are taken
colour         three channels: all others, palettes and CMYK as Pillow converts them
alpha          left out, as torchvision's loader does: the colours below it are shown
orientation    the picture is turned as its EXIF or XMP says, as ``datasets`` does it
frames         of several the first one, as torchvision and ``datasets`` do
no range       32-bit integers and floats are refused: nothing says which value is white
"""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from dpfast.errors import InputError, first_line
from dpfast.files import below

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".apng", ".jpe", ".jfif", ".dib"),  # other names of PNG, JPEG and BMP
)
# what ``datasets`` or torchvision take for an image too, and what cameras and telephones write
UNREAD = (
    *(".pbm", ".pgm", ".ppm", ".pnm", ".pfm", ".tga", ".pcx", ".sgi", ".ras", ".xbm", ".xpm"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".jxl", ".avif", ".heic", ".heif"),
    *(".ico", ".icns", ".cur", ".dds", ".psd", ".eps", ".fits", ".dng", ".cr2", ".nef", ".arw"),
)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # no EPS: Pillow starts a program for it
GREY = ("1", "L", "LA")
GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
# Pillow's error at twice the size stays: this is its word to servers of other people's pictures.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
TURNS = {  # EXIF's orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def pictures_in(folder: Path) -> Iterator[Path]:
    """Yields the image files in a folder, at any depth: of those that ``dpfast.files.below`` gives.
    A Mac leaves a hidden "._0.png" beside "0.png". Raises ``InputError`` for one that is not read.
    """
    for file in below(folder):
        if file.suffix.lower() in SUFFIXES:
            yield file
        elif file.suffix.lower() in UNREAD:
            raise unread(file)


def unread(file: Path) -> InputError:
    """Returns the error for a file whose name is that of an image in a format that is not read."""
    return InputError(
        f"{file}: images of this kind are not read; expected {', '.join(FORMATS[:-1])} or "
        f"{FORMATS[-1]}"
    )


def from_image_file(data: bytes, name: str = "the file") -> np.ndarray:
    """Returns uint8 pixels (C, H, W) of an image file's bytes; grey ones have one channel, all
    others three.

    name: of the file or member, for the message. Raises ``InputError`` as ``read_picture`` does.
    """
    return pixels(read_picture(io.BytesIO(data), name))


def pixels(picture: Image.Image) -> np.ndarray:
    """Returns (C, H, W) uint8, contiguous and writable, of a picture of mode "L" or "RGB"."""
    if picture.mode == "L":
        return np.array(picture)[None]
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def read_picture(file: Path | io.BytesIO, name: str) -> Image.Image:
    """Returns the picture of an image file as ``upright`` makes it, in memory.

    Raises ``InputError`` as ``opened`` does, also for pixels that are cut off or have no range.
    """
    with opened(file, name) as picture:
        return upright(picture)


@contextlib.contextmanager
def opened(file: Path | io.BytesIO, name: str) -> Iterator[Image.Image]:
    """Opens an image file of ``FORMATS``, of which nothing but the header is read yet.

    Raises ``InputError`` that begins with ``name`` for what is missing, no such image, larger than
    Pillow decodes (a decompression bomb, also of text), and for all that goes wrong inside.
    """
    try:
        with Image.open(file, formats=FORMATS) as picture:
            yield picture
    except MemoryError:
        raise
    # Pillow raises what its parsers raise: OSError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        if isinstance(error, Image.UnidentifiedImageError):
            why = f"it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file, or a damaged one"
        elif isinstance(error, OSError) and error.strerror:
            why = error.strerror
        else:
            why = first_line(error)
        raise InputError(f"{name}: cannot be read as an image: {why}") from error


def upright(picture: Image.Image) -> Image.Image:
    """Returns the first frame of a picture, turned as its orientation says, in mode "L" (grey) or
    "RGB".

    Raises ``InputError`` for a mode that has no defined range, and what Pillow raises for a file
    that is damaged.
    """
    picture.load()
    turn = TURNS.get(orientation(picture))
    if turn is not None:
        picture = picture.transpose(turn)
    if picture.mode in GREY:
        return picture if picture.mode == "L" else picture.convert("L")
    if picture.mode in GREY_16:
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        kind = "floats" if picture.mode == "F" else "32-bit integers"
        raise InputError(f"it holds {kind}, of which nothing says which value is white")
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")  # Pillow warns of a palette with alpha on its way to RGB
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def orientation(picture: Image.Image) -> int:
    """Returns EXIF's orientation, 1 to 8, 1 being upright; an entry that is damaged or no such
    number counts as none.
    """
    try:
        found = picture.getexif().get(ExifTags.Base.Orientation, 1)
        return found if found in TURNS else 1
    except (SyntaxError, ValueError, struct.error, KeyError, TypeError, OSError):
        return 1
