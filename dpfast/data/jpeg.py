"""The header of a JPEG file, read without decoding: size, colours and orientation.

A pool reads it of every file that it takes, a loader where boxes are drawn or DALI decodes.
"""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

from PIL import ExifTags, Image

from dpfast.data.pictures import opened, orientation, read_picture
from dpfast.errors import InputError

START = b"\xff\xd8"
# markers of a header's segments, each with the two bytes of its length
SEGMENT = struct.Struct(">HH")
NOTES = 0xFFE1  # EXIF and XMP
FIRST = 0xFFC0
FRAMES = frozenset(range(0xFFC0, 0xFFD0)) - {0xFFC4, 0xFFC8, 0xFFCC}  # size and components
SCAN = 0xFFDA  # what follows are the pixels
FILL = 0xFFFF
BARE = frozenset(range(0xFFD0, 0xFFDA))  # no segments of a header
FRAME = struct.Struct(">BHHB")


class JpegHeader(NamedTuple):
    """The header of a JPEG file. components: 1 (grey), 3, or 4 (CMYK); height, width: as the file
    stores it, before any turn;
    notes: where EXIF and XMP lie in the file, from byte to byte.
    """

    components: int
    height: int
    width: int
    notes: tuple[tuple[int, int], ...]

    @property
    def shown(self) -> tuple[int, int] | None:
        """The (height, width) as every decoder shows it; None where ``for_decoder`` has to look."""
        return None if self.notes or self.components == 4 else (self.height, self.width)

    @property
    def channels(self) -> int:
        """The channels of the picture: 1 (grey) or 3."""
        return 1 if self.components == 1 else 3


def read_header(data: bytes, name: str) -> JpegHeader:
    """Returns the header of a JPEG file's bytes; a few microseconds.

    Raises ``InputError`` that begins with ``name`` for what is no JPEG file, or one that Pillow
    does not decode: of other than 8 bits, of 2 components, larger than its limit.
    """
    if not data.startswith(START):
        raise InputError(f"{name} is no JPEG file: it begins with {bytes(data[:2])!r}")
    frames = []
    notes = []
    at = len(START)
    try:
        while True:
            marker, length = SEGMENT.unpack_from(data, at)
            if marker == SCAN:
                break
            if marker == FILL:
                at += 1
                continue
            if marker < FIRST or marker in BARE:
                raise InputError(f"{name} is no JPEG file: its header is damaged at byte {at}")
            if marker == NOTES:
                notes.append((at, at + 2 + length))
            elif marker in FRAMES:
                frames.append(FRAME.unpack_from(data, at + 4))
            at += 2 + length
    except struct.error:
        raise InputError(f"{name} is no JPEG file: its header is cut off") from None
    if len(frames) != 1:
        raise InputError(f"{name} is no JPEG file: its header has {len(frames)} frames")
    bits, height, width, components = frames[0]
    if bits != 8 or components not in (1, 3, 4) or not height * width:
        raise InputError(
            f"{name}: a JPEG file of {bits} bits, {components} components and {width} x {height} "
            "pixels, expected 8 bits and 1, 3 or 4 components"
        )
    if Image.MAX_IMAGE_PIXELS is not None and height * width > 2 * Image.MAX_IMAGE_PIXELS:
        raise InputError(
            f"{name}: a JPEG file of {width} x {height} pixels, expected at most "
            f"{2 * Image.MAX_IMAGE_PIXELS} (PIL.Image.MAX_IMAGE_PIXELS)"
        )
    return JpegHeader(components, height, width, tuple(notes))


def for_decoder(data: bytes, name: str) -> tuple[bytes, tuple[int, int]]:
    """Returns a file that every decoder which knows EXIF's orientation shows as Pillow does, and
    the upright (height, width).

    Of EXIF and XMP it keeps the orientation alone, in Pillow's writing: DALI 2.4 does not read
    XMP, takes an EXIF entry of four bytes in the other byte order for none, and dies of a second
    EXIF segment. CMYK becomes a BMP file, because decoders round it to colours in other ways.
    Raises ``InputError`` as ``read_header`` does.
    """
    header = read_header(data, name)
    size = header.height, header.width
    if header.components == 4:
        picture = read_picture(io.BytesIO(data), name)
        buffer = io.BytesIO()
        picture.save(buffer, "BMP")
        return buffer.getvalue(), picture.size[::-1]
    if not header.notes:
        return data, size
    with opened(io.BytesIO(data), name) as picture:
        turn = orientation(picture)
    parts = [START]
    if turn != 1:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = turn
        note = exif.tobytes()
        parts += [SEGMENT.pack(NOTES, len(note) + 2), note]
    at = len(START)
    for begin, end in header.notes:
        parts.append(data[at:begin])
        at = end
    parts.append(data[at:])
    return b"".join(parts), size if turn < 5 else size[::-1]
