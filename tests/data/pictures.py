"""Image files that the tests of several rooms show."""

import io
import struct

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def photo(height, width, seed=0):
    """(H, W, 3) uint8: colours that change slowly, and other ones in each corner."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(a * x + b * y + seed) for a, b in ((3, 1), (1, 4), (5, 2))]
    return (127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)


def encoded(picture, format, **options):
    """The bytes of an image file of pixels or of a picture."""
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def jpeg(picture, **options):
    return encoded(picture, "JPEG", **{"quality": 95, "subsampling": 0} | options)


def exif(turn, *, order="<", size=3):
    """An EXIF block that holds the orientation alone, of two (size 3) or four bytes (size 4)."""
    value = struct.pack(f"{order}HH", turn, 0) if size == 3 else struct.pack(f"{order}I", turn)
    entry = struct.pack(f"{order}HHHI", 1, ORIENTATION, size, 1) + value
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return b"Exif\0\0" + head + entry + b"\0" * 4


def with_note(data, note):
    """A JPEG file with another EXIF or XMP segment in front."""
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(note) + 2) + note + data[2:]


TURN = {turn: exif(turn) for turn in range(10)}
XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="6"/>'
BASE = photo(13, 22)
FRAMES = [Image.fromarray(BASE), Image.fromarray(photo(13, 22, seed=5))]
INKS = Image.merge("CMYK", [*Image.fromarray(BASE).split(), Image.fromarray(BASE[..., 0] // 2)])
# JPEG files of other programs and of cameras
KINDS = {
    "plain": jpeg(BASE),
    "4:2:0": jpeg(BASE, subsampling=2, quality=70),
    "4:2:2": jpeg(BASE, subsampling=1),
    "progressive": jpeg(BASE, progressive=True, subsampling=2),
    "grey": jpeg(BASE[..., 0]),
    "CMYK": jpeg(Image.fromarray(BASE).convert("CMYK")),
    "CMYK with black": jpeg(INKS),
    "CMYK and turned": jpeg(INKS, exif=TURN[6]),
    "RGB inside": jpeg(BASE, keep_rgb=True),
    "restart markers": jpeg(BASE, restart_marker_blocks=1),
    "comment": jpeg(BASE, comment=b"\xff\xe1 a comment \xff\xda"),
    "two frames": encoded(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:], quality=95),
    "fill bytes": b"\xff\xd8\xff\xff" + jpeg(BASE)[2:],
    "junk behind": jpeg(BASE) + b"junk",
    "XMP alone": with_note(jpeg(BASE), XMP),
    "XMP and EXIF": with_note(with_note(jpeg(BASE), TURN[3]), XMP),
    "two EXIF": with_note(with_note(jpeg(BASE), TURN[3]), TURN[6]),
    "EXIF cut off": jpeg(BASE, exif=TURN[6][:20]),
    "EXIF of four bytes": jpeg(BASE, exif=exif(6, order=">", size=4)),
    "EXIF in the other order": jpeg(BASE, exif=exif(6, order=">")),
    "EXIF that is none": jpeg(BASE, exif=b"Exif\0\0 no EXIF"),
    "grey and turned": jpeg(BASE[..., 0], exif=TURN[8]),
    **{f"EXIF {turn}": jpeg(BASE, exif=TURN[turn]) for turn in TURN},
}
