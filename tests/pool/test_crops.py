"""Boxes on a GPU: its kernel under Triton's interpreter against plain PyTorch, and its machine
code.
"""

import os
import subprocess
import sys

import pytest
import torch

from dpfast.ops import audit
from dpfast.ops.chunk_rows import ChunkTable
from dpfast.ops.triton_stub import tl
from dpfast.pool import crops
from dpfast.pool.batch import BatchFormat, crop_rows, from_images, resample

MEAN, STD = (0.48, 0.45, 0.40), (0.22, 0.23, 0.25)
SIZES = [
    ((3, 20, 31), (9, 14)),
    ((1, 8, 12), (16, 29)),
    ((3, 17, 9), (17, 9)),
    ((2, 40, 7), (5, 7)),
]


def test_the_kernel_makes_the_batches_of_plain_pytorch_in_triton_s_interpreter():
    """In a process of its own: Triton reads the switch when a kernel is defined."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "DPFAST_BACKEND": ""}
    subprocess.run(
        [sys.executable, "-m", "tests.pool.test_crops"], env=environment, check=True, timeout=120
    )


@pytest.mark.parametrize(
    ("lengths", "outputs", "expected"), [([7.0, 9.0], 9, 2), ([9.1], 9, 4), ([40.0], 5, 16)]
)
def test_a_launch_knows_how_many_inputs_a_triangle_covers(lengths, outputs, expected):
    assert crops.taps(torch.tensor(lengths), outputs) == expected
    assert crops.taps(torch.tensor([]), outputs) == 2


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
        **{"ELEMENT": tl.uint8 if element == "u8" else tl.float32, "BLOCK": crops.BLOCK},
    }
    variant = audit.Variant(
        name="crops",
        kernel=crops.crops_kernel,
        arguments=arguments,
        warps=crops.WARPS,
        reads=0,
        writes=0,
    )
    for report in audit.audit([variant]):
        assert report.local_bytes == 0
        assert report.occupancy >= 0.5


def images_of(shape, count=11):
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8)


def table_of(images, chunk_rows):
    rows = images.flatten(1)
    chunks = [
        torch.zeros(chunk_rows * rows.shape[1], dtype=torch.uint8)
        for _ in range(-(-len(rows) // chunk_rows))
    ]
    for chunk, part in zip(chunks, rows.split(chunk_rows), strict=True):
        chunk[: part.numel()] = part.flatten()
    return ChunkTable(chunk_rows, rows.shape[1]).with_chunks(tuple(chunks))


def check(shape, size, channels_last, dtype):
    torch.manual_seed(0)
    (channels, height, width), images = shape, images_of(shape)
    form = BatchFormat(
        mean=MEAN[:channels], std=STD[:channels], dtype=dtype, channels_last=channels_last
    )
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
    scale, bias = form.affine(channels, torch.device("cpu"))
    normalised = images[indices].float() * scale[:, None, None] + bias[:, None, None]
    expected = resample(normalised, boxes, size, flip)
    error = {torch.float32: 6e-6, torch.bfloat16: 2e-2}[
        dtype
    ]  # 2.7e-6: the kernel finds places in fp32
    apart = [
        rows.repeat_interleave(2, 0)[::2] for rows in (indices, boxes, flip)
    ]  # not next to each other
    made = {
        "strides": crop_rows(
            table_of(images, 4), shape, apart[0], form, boxes=apart[1], flip=apart[2], size=size
        ),
        "rows": crop_rows(
            table_of(images, 4), shape, indices, form, boxes=boxes, flip=flip, size=size
        ),
        "bytes": from_images(images[indices], form, flip=flip, boxes=boxes, size=size),
        "floats": from_images(images[indices].double(), form, flip=flip, boxes=boxes, size=size),
    }
    for batch in made.values():
        assert batch.dtype == dtype
        assert batch.is_contiguous(memory_format=form.layout)
        torch.testing.assert_close(batch.float(), expected, rtol=0, atol=error)
    if size == (height, width):  # a whole image is itself, bit by bit
        whole = torch.tensor([[0.0, 0, height, width]]).expand(5, 4)
        plain = (images[indices] * scale[:, None, None] + bias[:, None, None]).to(dtype)
        unmoved = crop_rows(table_of(images, 4), shape, indices, form, boxes=whole)
        torch.testing.assert_close(
            unmoved, plain, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2
        )


if __name__ == "__main__":
    for shape, size in SIZES:
        check(shape, size, True, torch.float32)
        check(shape, size, False, torch.bfloat16)
    empty = crop_rows(
        table_of(images_of((1, 4, 4)), 4),
        (1, 4, 4),
        torch.zeros(0, dtype=torch.int64),
        BatchFormat(),
        boxes=torch.zeros(0, 4),
    )
    assert empty.shape == (0, 1, 4, 4)
