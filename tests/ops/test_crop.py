"""Crop, resize, shift and mirror in one map: against torch's own, the plain gather and by hand.

A GPU's kernel: under Triton's interpreter against plain PyTorch, and its machine code.
"""

import pytest
import torch
import torch.nn.functional as F

from dpfast.ops import audit, dispatch, gather_batch
from dpfast.ops.chunk_rows import ChunkTable
from dpfast.ops.crop import (
    BLOCK,
    WARPS,
    StoredImages,
    Transform,
    crop_batch,
    crop_kernel,
    reference,
    resample,
    taps,
)
from dpfast.ops.gather import constants
from dpfast.ops.triton_stub import tl

MEAN = [0.48, 0.45, 0.40]
STD = [0.22, 0.23, 0.25]
SIZES = [
    ((3, 20, 31), (9, 14)),
    ((1, 8, 12), (16, 29)),
    ((3, 17, 9), (17, 9)),
    ((2, 40, 7), (5, 7)),
]


def stored(images, chunk_rows=5):
    """Images (N, C, H, W) in chunks of a few rows."""
    rows = images.flatten(1)
    chunks = []
    for part in rows.split(chunk_rows):
        chunk = torch.zeros(chunk_rows * rows.shape[1], dtype=torch.uint8)
        chunk[: part.numel()] = part.flatten()
        chunks.append(chunk)
    table = ChunkTable(chunk_rows, rows.shape[1]).with_chunks(chunks)
    return StoredImages(table, len(images), images.shape[1:])


def pixels(count, channels, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator
    )


def crop(
    images, indices, boxes, mean=None, std=None, dtype=torch.float32, channels_last=True, **options
):
    channels = images.shape[1]
    return crop_batch(
        stored(images),
        indices,
        boxes=boxes,
        mean=mean or MEAN[:channels],
        std=std or STD[:channels],
        dtype=dtype,
        channels_last=channels_last,
        **options,
    )


@pytest.mark.parametrize(
    ("height", "width", "size"), [(20, 31, (9, 14)), (8, 12, (16, 29)), (17, 9, (17, 9))]
)
def test_whole_pixel_boxes_are_torchs_antialiased_resize(height, width, size):
    """A box is torch's resize of the cropped image, away from the box's edges, where the box sees
    its neighbours.
    """
    images = pixels(1, 3, height + 40, width + 40).float()
    box = torch.tensor([[20.0, 20.0, height, width]])
    wide = F.interpolate(
        images[..., 20 : 20 + height, 20 : 20 + width], size, mode="bilinear", antialias=True
    )
    ours = resample(images, box, size)
    edge = [max(1, -(-n // o)) for n, o in zip(size, (height, width), strict=True)]
    inside = (..., slice(edge[0], -edge[0]), slice(edge[1], -edge[1]))
    torch.testing.assert_close(ours[inside], wide[inside], rtol=0, atol=2e-3)
    if size == (height, width):
        assert torch.equal(ours, wide)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_whole_image_is_the_plain_gather_bit_by_bit(channels, channels_last, dtype):
    images, indices = pixels(12, channels, 7, 19), torch.tensor([3, 11, 0, 3])
    mean, std = [*MEAN, 0.5][:channels], [*STD, 0.5][:channels]
    flip = torch.tensor([True, False, True, False])
    options = {
        "flip": flip,
        "mean": mean,
        "std": std,
        "dtype": dtype,
        "channels_last": channels_last,
    }
    ours = crop(
        images, indices, torch.tensor([[0.0, 0, 7, 19]]).expand(4, 4), size=(7, 19), **options
    )
    assert torch.equal(ours, gather_batch(images, indices, **options))
    assert ours.is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


@pytest.mark.skipif(dispatch.native() is None, reason="the native kernels are not built")
@pytest.mark.parametrize("size", [(24, 24), (10, 33), (50, 7), (1, 1)])
def test_the_kernel_is_the_reference(size, monkeypatch):
    """Boxes larger and smaller than the crop, of any fraction, and beyond the image; both backends,
    flips included.
    """
    generator = torch.Generator().manual_seed(1)
    images, indices = pixels(40, 3, 24, 30), torch.randint(0, 40, (64,), generator=generator)
    boxes = torch.rand(64, 4, generator=generator) * torch.tensor(
        [20.0, 20, 30, 40]
    ) + torch.tensor([-8.0, -8, 1, 1])
    flip = torch.rand(64, generator=generator) < 0.5
    monkeypatch.setattr(dispatch, "FORCED", "native")
    native = crop(images, indices, boxes, size=size, flip=flip)
    monkeypatch.setattr(dispatch, "FORCED", "reference")
    torch.testing.assert_close(
        native, crop(images, indices, boxes, size=size, flip=flip), rtol=0, atol=2e-6
    )


def test_a_shift_repeats_the_border_and_keeps_every_pixel():
    images = pixels(1, 1, 6, 8)
    moved = crop(
        images,
        torch.tensor([0]),
        torch.tensor([[-2.0, 3, 6, 8]]),
        size=(6, 8),
        mean=[0.0],
        std=[1 / 255],
    )
    padded = F.pad(images.float(), (3, 3, 2, 2), mode="replicate")
    assert torch.equal(moved, padded[..., 0:6, 6:14])


def test_it_writes_where_it_is_told():
    images, box = pixels(9, 3, 8, 8), torch.tensor([[1.0, 1, 5, 5]])
    out = torch.empty(1, 3, 4, 4).to(memory_format=torch.channels_last)
    assert crop(images, torch.tensor([8]), box, size=(4, 4), out=out) is out
    assert torch.equal(out, crop(images, torch.tensor([8]), box, size=(4, 4)))


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"indices": torch.tensor([9])}, IndexError, "the table holds 9"),
        ({"indices": torch.tensor([0.0])}, TypeError, "indices"),
        ({"boxes": torch.ones(2, 4)}, ValueError, "boxes"),
        ({"boxes": torch.tensor([[0.0, 0, 0, 4]])}, ValueError, "heights and widths above 0"),
        ({"boxes": torch.tensor([[0.0, 0, float("nan"), 4]])}, ValueError, "finite"),
        ({"flip": torch.ones(1)}, TypeError, "flip"),
        ({"boxes": None}, ValueError, r"size = \(4, 4\), the images are \(8, 8\)"),
        ({"out": torch.empty(1, 3, 5, 4)}, ValueError, "out"),
        ({"mean": [0.5]}, ValueError, "mean"),
    ],
)
def test_bad_input_is_named(change, error, named):
    options = {
        "indices": torch.tensor([0]),
        "boxes": torch.tensor([[0.0, 0, 8, 8]]),
        "size": (4, 4),
    } | change
    with pytest.raises(error, match=named):
        crop(pixels(9, 3, 8, 8), **options)


@pytest.mark.parametrize(
    ("lengths", "outputs", "expected"), [([7.0, 9.0], 9, 2), ([9.1], 9, 4), ([40.0], 5, 16)]
)
def test_a_launch_knows_how_many_inputs_a_triangle_covers(lengths, outputs, expected):
    assert taps(torch.tensor(lengths), outputs) == expected
    assert taps(torch.tensor([]), outputs) == 2


@pytest.mark.skipif(audit.missing() is not None, reason="the audit needs Triton's Linux wheel")
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("element", ["u8", "fp32"])
def test_the_kernel_keeps_everything_in_registers(element, channels_last):
    arguments = {
        **dict.fromkeys(("addresses", "indices"), "*i64"),
        **dict.fromkeys(("boxes", "scale", "bias", "out"), "*fp32"),
        **{
            "flip": "*u8",
            "chunk_rows": "i32",
            "stride": "i32:16",
            "CHANNELS": 3,
            "HEIGHT": 256,
            "WIDTH": 256,
        },
        **{
            "LINES": 224,
            "COLUMNS": 224,
            "ROW_TAPS": 2,
            "COLUMN_TAPS": 2,
            "CHANNELS_LAST": channels_last,
        },
        **{"ELEMENT": tl.uint8 if element == "u8" else tl.float32, "BLOCK": BLOCK},
    }
    variant = audit.Variant(
        name="crop",
        kernel=crop_kernel,
        arguments=arguments,
        warps=WARPS,
        reads=0,
        writes=0,
    )
    for report in audit.audit([variant]):
        assert report.local_bytes == 0
        assert report.occupancy >= 0.5


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="runs in Triton's interpreter")
@pytest.mark.parametrize(("shape", "size"), SIZES)
@pytest.mark.parametrize(
    ("channels_last", "dtype"), [(True, torch.float32), (False, torch.bfloat16)]
)
def test_the_kernel_makes_the_batches_of_plain_pytorch(shape, size, channels_last, dtype):
    (channels, height, width), images = shape, pixels(11, *shape)
    form = {
        "mean": MEAN[:channels],
        "std": STD[:channels],
        "dtype": dtype,
        "channels_last": channels_last,
    }
    indices = torch.tensor([10, 0, 5, 5, 3])
    boxes = torch.tensor(
        [
            [0, 0, height, width],
            [2, 1, height - 3, width - 2],
            [-2, 3, height, width],
            [0.5, 0.3, 4, 3],
            [1, 1, 5, 5],
        ]
    )
    flip = torch.tensor([True, False, True, False, True])
    scale, bias = constants(form["mean"], form["std"], channels, dispatch.CPU)
    expected = reference(images[indices], Transform(boxes, flip, size, scale, bias))
    # 2.7e-6: the kernel finds places in fp32.
    error = {torch.float32: 6e-6, torch.bfloat16: 2e-2}[dtype]
    form_of = {"boxes": boxes, "flip": flip, "size": size, **form}
    apart = [  # not next to each other
        rows.repeat_interleave(2, 0)[::2] for rows in (indices, boxes, flip)
    ]
    strided = {"boxes": apart[1], "flip": apart[2], "size": size, **form}
    made = {
        "strides": crop_batch(stored(images, 4), apart[0], **strided),
        "rows": crop_batch(stored(images, 4), indices, **form_of),
        "bytes": crop_batch(images[indices], **form_of),
        "floats": crop_batch(images[indices].double(), **form_of),
    }
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for batch in made.values():
        assert batch.dtype == dtype
        assert batch.is_contiguous(memory_format=layout)
        torch.testing.assert_close(batch.float(), expected, rtol=0, atol=error)
    if size == (height, width):  # a whole image is itself
        whole = torch.tensor([[0.0, 0, height, width]]).expand(5, 4)
        plain = (images[indices] * scale[:, None, None] + bias[:, None, None]).to(dtype)
        unmoved = crop_batch(stored(images, 4), indices, boxes=whole, **form)
        atol = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(unmoved, plain, rtol=0, atol=atol)


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="runs in Triton's interpreter")
def test_no_images_make_an_empty_batch():
    empty = crop(pixels(11, 1, 4, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    assert empty.shape == (0, 1, 4, 4)
