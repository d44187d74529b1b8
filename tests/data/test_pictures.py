"""What image files and pictures show, and that everything else is one line that names the file."""

import contextlib
import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dpfast.data.folders import fit_picture, read_image
from dpfast.data.jpeg import for_decoder, read_header
from dpfast.data.pictures import SUFFIXES, UNREAD, from_image_file, pictures_in
from dpfast.data.real import given_real
from dpfast.errors import InputError
from tests.data.pictures import BASE, FRAMES, KINDS, TURN, XMP, encoded, exif, jpeg, photo

RAMP = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
GREY = photo(9, 7)[..., 0]
SEED = 20260  # of the damaged files


def shown(data):
    return from_image_file(data)


def png(*chunks, size=(4, 4), bits=8, colour=0):
    """A PNG file by hand: its header, these chunks and no more than they hold."""
    head = struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in ((b"IHDR", head), *chunks, (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(kind + data))
        parts += [struct.pack(">I", len(data)), kind, data, check]
    return b"".join(parts)


ROWS = b"IDAT", zlib.compress(b"".join(b"\0" + bytes(4) for _ in range(4)))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_upper_eight_bits_everywhere(format, tmp_path):
    data = encoded(RAMP, format)
    wanted = torch.from_numpy((RAMP >> 8).astype(np.uint8))[None]
    assert torch.equal(torch.from_numpy(shown(data)), wanted)
    (tmp_path / "x.png").write_bytes(data)
    assert torch.equal(read_image(tmp_path / "x.png", (1, 16, 16)), wanted)
    assert torch.equal(read_image(tmp_path / "x.png", (3, 16, 16)), wanted.expand(3, 16, 16))
    pictures = [(Image.open(io.BytesIO(data)), 0) for _ in range(2)]
    real = given_real(pictures, classes=["ramp"], shape=(1, 16, 16))
    assert torch.equal(real.validation.images[0], wanted)


def test_16_bits_of_a_big_endian_picture_are_read_as_such():
    picture = Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes())
    wanted = torch.from_numpy((RAMP >> 8).astype(np.uint8))[None]
    assert torch.equal(fit_picture(picture, (1, 16, 16)), wanted)


def test_16_bit_colours_keep_their_upper_eight_bits():
    values = (np.arange(48).reshape(4, 4, 3) * 1365).astype(">u2")
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))
    found = shown(png((b"IDAT", rows), bits=16, colour=2))
    assert np.array_equal(found, (values >> 8).astype(np.uint8).transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pictures_without_a_range_are_refused(mode, tmp_path):
    picture = Image.fromarray(RAMP.astype(np.int32 if mode == "I" else np.float32))
    named = "nothing says which value is white"
    (tmp_path / "x.png").write_bytes(encoded(picture, "TIFF"))
    with pytest.raises(InputError, match=rf"x\.png: cannot be read as an image: .*{named}"):
        read_image(tmp_path / "x.png", (1, 16, 16))
    with pytest.raises(InputError, match=f"item 0 .*{named}"):
        given_real([(picture, 0)] * 2, classes=["ramp"], shape=(1, 16, 16))


def palette(**transparency):
    picture = Image.fromarray(photo(9, 7)).quantize(16)
    picture.info |= transparency
    return picture


@pytest.mark.parametrize(
    ("picture", "channels"),
    [
        (Image.fromarray(GREY), 1),
        (Image.fromarray(GREY > 99), 1),
        (Image.merge("LA", [Image.fromarray(GREY)] * 2), 1),
        (Image.fromarray(photo(9, 7)), 3),
        (Image.fromarray(np.dstack([photo(9, 7), GREY])), 3),
        (palette(), 3),
        (palette(transparency=bytes(range(0, 256, 16))), 3),
        (palette(transparency=3), 3),
    ],
    ids=["L", "1", "LA", "RGB", "RGBA", "P", "P-alphas", "P-alpha"],
)
@pytest.mark.filterwarnings("error")
def test_grey_has_one_channel_and_alpha_is_left_out(picture, channels):
    """The values of torchvision's loader, which converts to RGB."""
    found = shown(encoded(picture, "PNG"))
    opened = Image.open(io.BytesIO(encoded(picture, "PNG")))
    rows = np.asarray(opened.convert("RGBA"))[..., :3].transpose(2, 0, 1)
    assert np.array_equal(found, rows[:channels])
    assert found.flags.writeable
    assert found.flags.c_contiguous


def test_cmyk_is_converted():
    found = shown(KINDS["CMYK"]).astype(int)
    assert np.abs(found - BASE.transpose(2, 0, 1)).mean() < 4


def turned_files():
    for turn in range(10):
        yield f"JPEG {turn}", jpeg(BASE, exif=TURN[turn])
        yield f"PNG {turn}", encoded(BASE, "PNG", exif=TURN[turn])
        yield f"WebP {turn}", encoded(BASE, "WEBP", exif=TURN[turn], lossless=True)
    yield "four bytes", jpeg(BASE, exif=exif(6, order=">", size=4))
    yield "XMP", KINDS["XMP alone"]
    yield "XMP of a PNG", encoded(BASE, "WEBP", xmp=XMP[29:], lossless=True)
    yield "16 bits", encoded(RAMP, "PNG", exif=TURN[6])
    yield "palette", encoded(palette(), "PNG", exif=TURN[5])


TURNED = dict(turned_files())


@pytest.mark.parametrize("kind", TURNED)
def test_a_picture_is_upright_as_datasets_shows_it(kind, tmp_path):
    features = pytest.importorskip("datasets").features
    theirs = features.Image().decode_example({"bytes": TURNED[kind], "path": None})
    found = shown(TURNED[kind])
    if kind == "16 bits":
        assert np.array_equal(found[0], np.asarray(theirs) >> 8)
    else:
        assert np.array_equal(found, np.asarray(theirs.convert("RGB")).transpose(2, 0, 1))
    (tmp_path / "x.jpg").write_bytes(TURNED[kind])
    _, height, width = found.shape
    read = read_image(tmp_path / "x.jpg", (len(found), height, width))
    assert np.array_equal(read.numpy(), found)
    given = fit_picture(Image.open(tmp_path / "x.jpg"), (len(found), height, width))
    assert torch.equal(given, read)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize("note", [b"Exif\0\0 none", TURN[6][:20], TURN[6][:8], b"Exif\0\0II*\0"])
def test_a_damaged_exif_turns_nothing(note):
    assert np.array_equal(shown(jpeg(BASE, exif=note)), shown(jpeg(BASE)))


@pytest.mark.parametrize(("format", "exact"), [("PNG", 1), ("WEBP", 1), ("GIF", 0)])
def test_of_several_frames_the_first_is_shown(format, exact):
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(FRAMES[0], format, save_all=True, append_images=FRAMES[1:], **options)
    found = shown(data).transpose(1, 2, 0).astype(int)
    others = np.abs(found - np.asarray(FRAMES[1])).mean()
    first = np.abs(found - BASE).mean()
    assert first == 0 if exact else first < others / 5


def test_image_files_are_found_through_links_and_without_hidden_ones(tmp_path):
    root, other = tmp_path / "real", tmp_path / "other"
    for name in ("a.png", "b/c.JPG", "b/._c.JPG", ".hidden/d.png", "b/notes.txt", "e.webp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    other.mkdir()
    (other / "f.bmp").write_bytes(b"")
    (root / "link").symlink_to(other)
    (root / "b" / "up").symlink_to(root)  # a circle
    found = {str(file.relative_to(root)) for file in pictures_in(root)}
    assert found == {"a.png", "b/c.JPG", "e.webp", "link/f.bmp"}
    assert all(suffix == suffix.lower() for suffix in SUFFIXES)


def test_images_of_all_formats_that_are_read_are_found_and_others_are_named(tmp_path):
    names = ["a.tif", "b.TIFF", "c.gif", "d.jfif", "e.jpe", "f.apng", "g.dib"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert [file.name for file in pictures_in(tmp_path)] == names
    assert not set(SUFFIXES) & set(UNREAD)
    for name in ("x.ppm", "x.HEIC", "x.jp2"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(InputError, match=f"{name}: images of this kind are not read; expected"):
            list(pictures_in(tmp_path))
        (tmp_path / name).unlink()


TEXT = b"k\0\0" + zlib.compress(b"x" * (1 << 21))
BOMB = encoded(Image.new("1", (14000, 13000)), "PNG")


UNREADABLE = {
    "empty": (b"", "it is no PNG, JPEG, WEBP, BMP, GIF or TIFF file"),
    "text": (b"no image", "it is no PNG"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is no PNG"),
    "text chunk": (png((b"zTXt", TEXT), ROWS), "too large"),
    "international text chunk": (png((b"iTXt", b"k\0\1\0\0\0" + TEXT[3:]), ROWS), "too large"),
    "bomb": (BOMB, "182000000 pixels"),
    "no pixels": (png(), "cannot load"),
    "no deflate": (png((b"IDAT", b"no deflate")), "broken"),
    "PNG header cut off": (png(ROWS)[:-30], "a damaged one"),
    "PNG cut off": (encoded(BASE, "PNG")[:-90], "truncated"),
    "JPEG cut off": (jpeg(BASE)[:-90], "truncated"),
    "WebP cut off": (encoded(BASE, "WEBP")[:-90], "."),
    "BMP cut off": (encoded(BASE, "BMP")[:-90], "truncated"),
    "GIF cut off": (encoded(BASE, "GIF")[:-90], "truncated"),
    "TIFF cut off": (encoded(BASE, "TIFF")[:-190], "truncated"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_image_is_one_line_that_names_the_file(kind, tmp_path):
    data, why = UNREADABLE[kind]
    file = tmp_path / "x.png"
    file.write_bytes(data)
    for read in (lambda: read_image(file, (3, 8, 8)), lambda: from_image_file(data, str(file))):
        with pytest.raises(
            InputError, match=rf"x\.png: cannot be read as an image: .*({why})"
        ) as e:
            read()
        assert "\n" not in str(e.value)


def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    for name, why in (("folder", "directory"), ("link", "No such file"), ("none", "No such file")):
        with pytest.raises(InputError, match=rf"{name}\.png: cannot be read .*{why}"):
            read_image(tmp_path / f"{name}.png", (1, 8, 8))


def damaged(number):
    """A file of one of six formats with some of its bytes changed, cut off or repeated."""
    random = np.random.default_rng((SEED, number))
    formats = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"]
    base = [photo(11, 17, seed=number), photo(11, 17, seed=number)[..., 0], RAMP][number % 3]
    format = formats[number % len(formats)]
    if base.dtype == np.uint16 and format not in ("PNG", "TIFF"):
        base = photo(11, 17)
    data = bytearray(encoded(base, format, **({"exif": TURN[6]} if format != "BMP" else {})))
    for _ in range(random.integers(1, 6)):
        data[random.integers(len(data))] = random.integers(256)
    if random.random() < 0.3:
        data = data[: random.integers(len(data))]
    if random.random() < 0.2:
        at = random.integers(len(data) + 1)
        data[at:at] = data[:at]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged EXIF and TIFF
@pytest.mark.parametrize("number", range(120))
def test_a_damaged_file_gives_pixels_or_one_line(number):
    for read in (from_image_file, read_header, for_decoder):
        with contextlib.suppress(InputError):
            found = read(damaged(number), "the name")
            if read is from_image_file:
                assert found.dtype == np.uint8
                assert found.shape[0] in (1, 3)


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_some_of_them_readable_and_the_rest_named():
    said = []
    for number in range(120):
        try:
            from_image_file(damaged(number), "the name")
        except InputError as error:
            said.append(str(error))
    assert 30 < len(said) < 110
    assert all(words.startswith("the name: ") and "\n" not in words for words in said)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_header_of_a_jpeg_file_says_what_pillow_finds(kind):
    opened = Image.open(io.BytesIO(KINDS[kind]))
    header = read_header(KINDS[kind], "x")
    assert (header.width, header.height) == opened.size
    assert header.channels == (1 if opened.mode == "L" else 3)
    data, size = for_decoder(KINDS[kind], "x")
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(KINDS[kind])))
    assert size == upright.size[::-1]
    assert np.array_equal(shown(data), shown(KINDS[kind]))
    copied = header.notes or header.components == 4
    assert (data is KINDS[kind]) == (not copied)  # most files are not


def test_a_hidden_folder_may_hold_the_images_themselves(tmp_path):
    """It is what lies below a folder that may be hidden, not the folder that a user names."""
    root = tmp_path / ".cache" / "real"
    root.mkdir(parents=True)
    (root / "a.png").write_bytes(b"")
    assert [os.path.basename(file) for file in pictures_in(root)] == ["a.png"]
