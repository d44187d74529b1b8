"""Image files: odd, damaged and of other kinds than their name says."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dpfast.data.folders import open_folder
from dpfast.feed import make_loader
from dpfast.pool.importing import import_pool
from tests.bad_inputs.case import NEVER, Case, listed
from tests.bad_inputs.files import parquet, tar

PNG = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows: list[bytes], width: int, depth: int, colour: int, *before: bytes) -> bytes:
    """A PNG file by hand. rows: their packed bytes; colour: 0 grey, 2 RGB, 3 palette, 4 grey and
    alpha, 6 RGB and alpha; before: chunks before the data.
    """
    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return PNG + b"".join(
        [chunk(b"IHDR", head), *before, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    )


def file_of(picture: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def noise(random: random.Random, height: int, width: int, *channels: int) -> np.ndarray:
    return np.random.default_rng(random.getrandbits(32)).integers(
        0, 256, (height, width, *channels), np.uint8
    )


def smooth(random: random.Random, height: int, width: int) -> np.ndarray:
    """(height, width, 3) that JPEG keeps within a few levels."""
    corners = noise(random, 2, 2, 3) // 2 + 60
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    top, bottom = (corners[i, 0] * (1 - x) + corners[i, 1] * x for i in (0, 1))
    return (top * (1 - y) + bottom * y).round().astype(np.uint8)


class Made:
    """A picture's file and what is in it. pixels: (H, W) or (H, W, 3) uint8, None where nothing is;
    several where a documented rule may choose. size: (height, width) that it is read in.
    """

    def __init__(
        self,
        data: bytes,
        pixels: np.ndarray | None,
        *,
        name: str = "a.png",
        near: float = 0,
        valid: bool = False,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.data, self.pixels, self.name, self.near = data, pixels, name, near
        self.valid = valid
        self.size = size or (pixels.shape[:2] if pixels is not None else (8, 8))


Picture = Callable[[random.Random], Made]


def plain(r: random.Random) -> Made:
    p = noise(r, 6, 9, 3)
    return Made(file_of(Image.fromarray(p), "PNG"), p, valid=True)


def grey(r: random.Random) -> Made:
    p = noise(r, 7, 5)
    return Made(file_of(Image.fromarray(p), "PNG"), p, valid=True)


def grey16(r: random.Random) -> Made:
    p = noise(r, 6, 6, 2)
    return Made(png([row.tobytes() for row in p], 6, 16, 0), p[..., 0])


def rgb16(r: random.Random) -> Made:
    p = noise(r, 6, 6, 3, 2)
    return Made(png([row.tobytes() for row in p], 6, 16, 2), p[..., 0])


def grey_alpha16(r: random.Random) -> Made:
    p = noise(r, 6, 6, 2, 2)
    p[:, :, 1] = 255
    return Made(png([row.tobytes() for row in p], 6, 16, 4), p[:, :, 0, 0])


def big_endian_tiff16(r: random.Random) -> Made:
    p = noise(r, 6, 6, 2)
    values = p[..., 0].astype(np.uint16) << 8 | p[..., 1]
    picture = Image.frombytes("I;16B", (6, 6), values.astype(">u2").tobytes())
    return Made(file_of(picture, "TIFF"), p[..., 0])


def pgm16(r: random.Random) -> Made:
    p = noise(r, 6, 6, 2)
    return Made(b"P5 6 6 65535\n" + p.tobytes(), p[..., 0])


def whole_numbers32(r: random.Random) -> Made:
    p = noise(r, 6, 6, 2)
    values = p[..., 0].astype(np.int32) << 8 | p[..., 1]
    return Made(file_of(Image.fromarray(values), "TIFF"), p[..., 0])


def floats(r: random.Random) -> Made:
    return Made(file_of(Image.fromarray(noise(r, 6, 6).astype(np.float32) / 255), "TIFF"), None)


def lab(r: random.Random) -> Made:
    """Of greys alone, whose L* is told in percent of 255: CIE 15, IEC 61966-2-1."""
    lightness = noise(r, 6, 6) // 2 + 64
    none = Image.new("L", (6, 6), 128)
    picture = Image.merge("LAB", [Image.fromarray(lightness), none, none])
    linear = ((lightness / 2.55 + 16) / 116) ** 3
    grey = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    pixels = (grey * 255).round().astype(np.uint8)[..., None].repeat(3, -1)
    return Made(file_of(picture, "TIFF"), pixels, near=3)


def one_bit(r: random.Random) -> Made:
    p = noise(r, 5, 11) > 127
    return Made(file_of(Image.fromarray(p), "PNG"), p.astype(np.uint8) * 255)


def two_bits(r: random.Random) -> Made:
    p = noise(r, 5, 8) >> 6
    rows = [bytes(int("".join(f"{v:02b}" for v in row[i : i + 4]), 2) for i in (0, 4)) for row in p]
    return Made(png(rows, 8, 2, 0), p * 85)


def four_bits(r: random.Random) -> Made:
    p = noise(r, 5, 8) >> 4
    rows = [bytes(int(row[i]) << 4 | int(row[i + 1]) for i in range(0, 8, 2)) for row in p]
    return Made(png(rows, 8, 4, 0), p * 17)


def _palette(r: random.Random, *extra: bytes) -> tuple[bytes, np.ndarray]:
    colours, indices = noise(r, 16, 3), noise(r, 6, 6) >> 4
    head = chunk(b"PLTE", colours.tobytes())
    return png([row.tobytes() for row in indices], 6, 8, 3, head, *extra), colours[indices]


def palette(r: random.Random) -> Made:
    return Made(*_palette(r))


def palette_with_opaque_transparency(r: random.Random) -> Made:
    return Made(*_palette(r, chunk(b"tRNS", b"\xff" * 16)))


def palette_index_outside(r: random.Random) -> Made:
    """The PNG specification takes such a pixel for black."""
    colours = noise(r, 2, 3)
    data = png([bytes([0, 1, 9, 250])] * 4, 4, 8, 3, chunk(b"PLTE", colours.tobytes()))
    row = np.concatenate([colours, np.zeros((2, 3), np.uint8)])
    return Made(data, np.broadcast_to(row, (4, 4, 3)).copy())


def opaque_alpha(r: random.Random) -> Made:
    p = noise(r, 6, 6, 4)
    p[..., 3] = 255
    return Made(file_of(Image.fromarray(p), "PNG"), p[..., :3])


def grey_and_opaque_alpha(r: random.Random) -> Made:
    p = noise(r, 6, 6, 2)
    p[..., 1] = 255
    return Made(file_of(Image.fromarray(p, "LA"), "PNG"), p[..., 0])


def alpha(r: random.Random) -> Made:
    """Colours are those of the file, as torchvision reads it."""
    p = noise(r, 6, 6, 4)
    return Made(file_of(Image.fromarray(p), "PNG"), p[..., :3])


def grey_transparent_level(r: random.Random) -> Made:
    p = noise(r, 6, 6)
    rows = [row.tobytes() for row in p]
    return Made(png(rows, 6, 8, 0, chunk(b"tRNS", b"\0" + p[0, :1].tobytes())), p)


def interlaced_like_photoshop(r: random.Random) -> Made:
    p = noise(r, 6, 6, 3)
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(b"no profile"))
    gamma = chunk(b"gAMA", struct.pack(">I", 100000))
    return Made(png([row.tobytes() for row in p], 6, 8, 2, profile, gamma), p)


def jpeg(r: random.Random) -> Made:
    p = smooth(r, 16, 24)
    data = file_of(Image.fromarray(p), "JPEG", quality=95, subsampling=0)
    return Made(data, p, name="a.jpg", near=12, valid=True)


def progressive_jpeg(r: random.Random) -> Made:
    p = smooth(r, 16, 24)
    data = file_of(Image.fromarray(p), "JPEG", quality=95, progressive=True)
    return Made(data, p, name="a.JPG", near=16)


def grey_jpeg(r: random.Random) -> Made:
    p = smooth(r, 16, 16)[..., 0]
    return Made(file_of(Image.fromarray(p), "JPEG", quality=95), p, name="a.jpg", near=12)


def cmyk_jpeg(r: random.Random) -> Made:
    p = smooth(r, 16, 16)
    data = file_of(Image.fromarray(p).convert("CMYK"), "JPEG", quality=95)
    return Made(data, p, name="a.jpg", near=16)


def _turned(r: random.Random, orientation: int, format: str, name: str) -> Made:
    """A picture that its file holds turned, with the orientation that turns it back."""
    p = smooth(r, 16, 24)
    turns = {  # what the camera did, by orientation: EXIF 2.3, tag 0x0112
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    held = np.ascontiguousarray(turns[orientation](p)) if orientation in turns else p
    options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {}
    data = file_of(Image.fromarray(held), format, exif=exif, **options)
    return Made(data, p, name=name, near=12 if format == "JPEG" else 0)


def turned_2(r: random.Random) -> Made:
    return _turned(r, 2, "JPEG", "a.jpg")


def turned_3(r: random.Random) -> Made:
    return _turned(r, 3, "JPEG", "a.jpg")


def turned_5(r: random.Random) -> Made:
    return _turned(r, 5, "JPEG", "a.jpeg")


def turned_6(r: random.Random) -> Made:
    return _turned(r, 6, "JPEG", "a.jpg")


def turned_8_in_a_png(r: random.Random) -> Made:
    return _turned(r, 8, "PNG", "a.png")


def orientation_that_is_none(r: random.Random) -> Made:
    return _turned(r, r.choice([0, 9, 4711]), "JPEG", "a.jpg")


def damaged_exif(r: random.Random) -> Made:
    p = smooth(r, 16, 16)
    exif = b"Exif\0\0" + r.randbytes(40)
    return Made(file_of(Image.fromarray(p), "JPEG", quality=95, exif=exif), p, near=12)


def _frames(r: random.Random) -> tuple[np.ndarray, list[Image.Image]]:
    frames = [noise(r, 6, 6, 3) for _ in range(3)]
    return frames[0], [Image.fromarray(frame) for frame in frames]


def animated_png(r: random.Random) -> Made:
    p, frames = _frames(r)
    return Made(file_of(frames[0], "PNG", save_all=True, append_images=frames[1:]), p)


def animated_webp(r: random.Random) -> Made:
    p, frames = _frames(r)
    data = file_of(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    return Made(data, p)


def animated_gif(r: random.Random) -> Made:
    frames = [noise(r, 6, 6) // 2 for _ in range(3)]
    pictures = [Image.fromarray(frame) for frame in frames]
    return Made(file_of(pictures[0], "GIF", save_all=True, append_images=pictures[1:]), frames[0])


def webp_called_png(r: random.Random) -> Made:
    p = noise(r, 6, 6, 3)
    return Made(file_of(Image.fromarray(p), "WEBP", lossless=True), p)


def jpeg_called_png(r: random.Random) -> Made:
    made = jpeg(r)
    return Made(made.data, made.pixels, near=12)


def png_called_jpeg(r: random.Random) -> Made:
    made = plain(r)
    return Made(made.data, made.pixels, name="a.jpg")


def bmp_called_jpeg(r: random.Random) -> Made:
    p = noise(r, 6, 6, 3)
    return Made(file_of(Image.fromarray(p), "BMP"), p, name="a.jpeg")


def empty(r: random.Random) -> Made:
    return Made(b"", None, name=r.choice(["a.png", "a.jpg"]))


def chance(r: random.Random) -> Made:
    return Made(r.randbytes(300), None)


def page_of_the_web(r: random.Random) -> Made:
    return Made(b"<!DOCTYPE html><html><title>404</title></html>", None, name="a.jpg")


def postscript(r: random.Random) -> Made:
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    return Made(text, None)


def torn_png(r: random.Random) -> Made:
    data = file_of(Image.fromarray(noise(r, 12, 12, 3)), "PNG")
    return Made(data[: r.randrange(10, len(data) - 60)], None)


def torn_jpeg(r: random.Random) -> Made:
    data = file_of(Image.fromarray(noise(r, 24, 24, 3)), "JPEG")
    return Made(data[: r.randrange(4, len(data) // 2)], None, name="a.jpg", size=(24, 24))


def png_with_a_wrong_byte(r: random.Random) -> Made:
    """Its checksum tells."""
    data = bytearray(file_of(Image.fromarray(noise(r, 12, 12, 3)), "PNG"))
    data[data.index(b"IDAT") + 4 + r.randrange(20, 300)] ^= 1 << r.randrange(8)
    return Made(bytes(data), None, size=(12, 12))


def no_pixels(r: random.Random) -> Made:
    return Made(png([], 0, 8, 0), None)


def bomb(r: random.Random) -> Made:
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return Made(PNG + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9)), None)


def ninety_megapixels(r: random.Random) -> Made:
    side = 9504
    return Made(
        png([b"\xff" * (side // 8)] * side, side, 1, 0), np.full((8, 8), 255, np.uint8), size=(8, 8)
    )


def long_text(r: random.Random) -> Made:
    p = noise(r, 6, 6)
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * (1 << 21)))
    return Made(png([row.tobytes() for row in p], 6, 8, 0, text), p)


def many_texts(r: random.Random) -> Made:
    p = noise(r, 6, 6)
    text = chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"x" * (1 << 20)))
    return Made(png([row.tobytes() for row in p], 6, 8, 0, *[text] * 70), p)


def one_pixel(r: random.Random) -> Made:
    p = noise(r, 1, 1, 3)
    data = file_of(Image.fromarray(p), "PNG")
    return Made(data, np.broadcast_to(p, (8, 8, 3)).copy(), size=(8, 8))


def one_column(r: random.Random) -> Made:
    colour, long = noise(r, 1, 1, 3), r.randrange(2, 400)
    shape = r.choice([(long, 1, 3), (1, long, 3)])
    data = file_of(Image.fromarray(np.broadcast_to(colour, shape).copy()), "PNG")
    return Made(data, np.broadcast_to(colour, (8, 8, 3)).copy(), size=(8, 8))


def something_behind_the_end(r: random.Random) -> Made:
    made = plain(r)
    return Made(made.data + r.randbytes(100), made.pixels)


PICTURES: dict[str, Picture] = {
    made.__name__: made
    for made in (
        *(plain, grey, grey16, rgb16, grey_alpha16, big_endian_tiff16, pgm16, whole_numbers32),
        *(floats, lab, one_bit, two_bits, four_bits, palette, palette_with_opaque_transparency),
        *(palette_index_outside, opaque_alpha, grey_and_opaque_alpha, alpha),
        *(grey_transparent_level, interlaced_like_photoshop, jpeg, progressive_jpeg, grey_jpeg),
        *(cmyk_jpeg, turned_2, turned_3, turned_5, turned_6, turned_8_in_a_png),
        *(orientation_that_is_none, damaged_exif, animated_png, animated_webp, animated_gif),
        *(webp_called_png, jpeg_called_png, png_called_jpeg, bmp_called_jpeg, empty, chance),
        *(page_of_the_web, postscript, torn_png, torn_jpeg, png_with_a_wrong_byte),
        *(no_pixels, bomb, ninety_megapixels, long_text, many_texts),
        *(one_pixel, one_column, something_behind_the_end),
    )
}


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """ITU-R 601-2, in Pillow's fixed point."""
    red, green, blue = (pixels[..., i].astype(np.int64) for i in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)


def in_channels(pixels: np.ndarray | None, channels: int) -> Any:
    """(C, H, W) of a picture; NEVER of none."""
    if pixels is None:
        return NEVER
    if pixels.ndim == 2:
        return np.repeat(pixels[None], channels, 0)
    return to_grey(pixels)[None] if channels == 1 else pixels.transpose(2, 0, 1)


def in_a_class_folder(picture: Picture, random: random.Random, folder: Path) -> Case:
    made = picture(random)
    channels = random.choice([1, 3])
    (folder / "cat").mkdir()
    (folder / "cat" / made.name).write_bytes(made.data)

    def run() -> Any:
        found = open_folder(folder, ["cat"], (channels, *made.size), ids=None)
        ((images, labels),) = found.batches()
        assert labels.tolist() == [0]
        return images[0]

    right = in_channels(made.pixels, channels)
    return Case(run, (made.name,), right, valid=made.valid, near=made.near)


def read_back(folder: Path) -> tuple[Any, list[int]]:
    """The first picture of a pool and the labels of all, by the loader that decodes."""
    pool, _ = import_pool(folder)
    loader = make_loader("torch", pool, batch_size=len(pool), seed=0)
    try:
        images, labels = next(loader)
    finally:
        loader.close()
    first = labels.argsort()[0]
    return ((images[first] + 1) * 127.5).round().numpy(), sorted(labels.tolist())


def in_a_pool(picture: Picture, random: random.Random, folder: Path) -> Case:
    """In a tar, a parquet file or an image folder that is imported, and read by the loader."""
    made = picture(random)
    form = random.choice(["tar", "parquet", "metadata"])
    suffix = made.name.partition(".")[2].lower()
    if form == "tar":
        tar(folder / "a.tar", ("0." + suffix, made.data), ("0.cls", b"1"))
    elif form == "parquet":
        parquet(folder / "train-00000-of-00001.parquet", [made.data], label=[1])
    else:
        (folder / "train").mkdir()
        (folder / "train" / made.name).write_bytes(made.data)
        line = json.dumps({"file_name": made.name, "label": 1})
        (folder / "train" / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")

    def run() -> Any:
        found, labels = read_back(folder)
        assert labels == [1]
        if made.size != found.shape[1:] and made.pixels is not None:
            assert (found == found[:, :1, :1]).all()  # of one colour, whatever its size
            return np.broadcast_to(found[:, :1, :1], (len(found), *made.size)).copy()
        return found

    # of how many channels, the pool decides: grey files have one
    right = in_channels(made.pixels, 3 if np.ndim(made.pixels) == 3 else 1)

    def in_channels_of_file() -> Any:
        found = run()
        if right is not NEVER and right.shape[0] == 1 and found.shape[0] == 3:
            assert (found == found[:1]).all()
            return found[:1]
        return found

    named = (made.name, "0." + suffix, "row 0", "a sample of shape (1, 9504, 9504)")
    return Case(in_channels_of_file, named, right, valid=made.valid, near=made.near + 0.5)


listed("pictures", PICTURES, in_a_class_folder)
listed("pictures", PICTURES, in_a_pool)
