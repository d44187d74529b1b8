from __future__ import annotations

import pytest
import torch

from dpfast.ops import gather_batch
from tests.tolerances import GATHER, HALF_ULP

from .conftest import far_apart

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(9, 1, 28, 28), (7, 3, 8, 9), (5, 4, 5, 16), (6, 5, 3, 7), (4, 3, 1, 1), (3, 3, 16, 48)]


def truth(store, indices, flip, mean, std):
    rows = store[indices].double() / 255
    if flip is not None:
        rows[flip] = rows[flip].flip(3)
    return (rows - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[
        :, None, None
    ]


def constants(channels):
    return [0.1 * c + 0.2 for c in range(channels)], [0.3 + 0.05 * c for c in range(channels)]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(shape, dtype, channels_last, device):
    store = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    indices = torch.randint(0, shape[0], (5,), device=device)
    flip = torch.tensor([True, False, True, True, False], device=device)
    mean, std = constants(shape[1])
    for mirrored in (None, flip):
        batch = gather_batch(
            store,
            indices,
            flip=mirrored,
            mean=mean,
            std=std,
            dtype=dtype,
            channels_last=channels_last,
        )
        expected = truth(
            store.cpu(), indices.cpu(), None if mirrored is None else flip.cpu(), mean, std
        )
        assert batch.dtype == dtype
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert batch.is_contiguous(memory_format=layout)
        torch.testing.assert_close(
            batch.cpu().double(), expected, rtol=HALF_ULP[dtype], atol=GATHER
        )


def test_every_byte(device):
    store = torch.arange(256, dtype=torch.uint8, device=device).reshape(1, 1, 16, 16)
    indices = torch.zeros(1, dtype=torch.int64, device=device)
    batch = gather_batch(
        store, indices, mean=[0.0], std=[1.0], dtype=torch.float32, channels_last=False
    )
    torch.testing.assert_close(
        batch.flatten() * 255, torch.arange(256.0, device=device), rtol=1e-6, atol=0
    )


def test_strided_stores_and_indices(device):
    store = torch.randint(0, 256, (8, 3, 4, 6), dtype=torch.uint8, device=device)
    indices = torch.tensor([3, 9, 0, 9, 1], device=device)[::2]
    flip = torch.tensor([True, False, False, True, True], device=device)[::2]
    mean, std = constants(3)
    for view in (store[::2], store.permute(0, 1, 3, 2), store[:, :, 1:3]):
        expected = truth(view.cpu(), indices.cpu(), flip.cpu(), mean, std)
        batch = gather_batch(
            view, indices, flip=flip, mean=mean, std=std, dtype=torch.float32, channels_last=True
        )
        torch.testing.assert_close(
            batch.cpu().double(), expected, rtol=HALF_ULP[torch.float32], atol=GATHER
        )


def test_rows_further_apart_than_32_bits_count(device):
    store = (
        far_apart(72, torch.uint8, device).copy_(torch.randint(0, 256, (2, 72))).view(2, 3, 4, 6)
    )
    options = {"mean": [0.5] * 3, "std": [0.2] * 3, "dtype": torch.float32, "channels_last": True}
    indices = torch.tensor([1, 0], device=device)
    assert torch.equal(
        gather_batch(store, indices, **options), gather_batch(store.clone(), indices, **options)
    )


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_out_takes_the_batch(channels_last, device):
    store = torch.randint(0, 256, (6, 3, 4, 5), dtype=torch.uint8, device=device)
    indices = torch.tensor([4, 0, 4], device=device)
    options = {
        "mean": [0.1] * 3,
        "std": [0.2] * 3,
        "dtype": torch.float32,
        "channels_last": channels_last,
    }
    expected = gather_batch(store, indices, **options)
    out = torch.empty_like(expected)
    assert gather_batch(store, indices, out=out, **options) is out
    assert torch.equal(out, expected)
    layout = "channels_last" if channels_last else "contiguous"
    other = out.contiguous(
        memory_format=torch.contiguous_format if channels_last else torch.channels_last
    )
    with pytest.raises(
        ValueError, match=rf"out of shape \(3, 3, 4, 5\) has strides .* expected {layout} memory"
    ):
        gather_batch(store, indices, out=other, **options)
    with pytest.raises(TypeError, match=r"out must be float32, got torch\.float16"):
        gather_batch(store, indices, out=out.half(), **options)


def test_constants_may_be_tensors(device):
    store = torch.randint(0, 256, (4, 3, 4, 6), dtype=torch.uint8, device=device)
    indices = torch.arange(4, device=device)
    mean, std = constants(3)
    options = {"dtype": torch.float32, "channels_last": False}
    expected = gather_batch(store, indices, mean=mean, std=std, **options)
    tensors = {"mean": torch.tensor(mean, device=device), "std": torch.tensor(std, device=device)}
    torch.testing.assert_close(gather_batch(store, indices, **tensors, **options), expected)


def test_empty(device):
    store = torch.zeros(4, 3, 5, 6, dtype=torch.uint8, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    mean, std = constants(3)
    batch = gather_batch(store, none, mean=mean, std=std, dtype=torch.float32, channels_last=True)
    assert batch.shape == (0, 3, 5, 6)


@pytest.mark.parametrize("index", [-1, 4])
def test_index_outside_the_store(index, backend, device):
    store = torch.zeros(4, 1, 2, 2, dtype=torch.uint8, device=device)
    indices = torch.tensor([0, index], device=device)
    options = {"mean": [0.0], "std": [1.0], "dtype": torch.float32, "channels_last": False}
    if backend == "triton":
        batch = gather_batch(store, indices, **options)
        assert (batch[0] == 0).all()
        assert batch[1].isnan().all()
    else:
        with pytest.raises(IndexError):
            gather_batch(store, indices, **options)


def test_compiles_into_one_graph(device):
    store = torch.randint(0, 256, (4, 3, 4, 6), dtype=torch.uint8, device=device)

    def batch(store, indices, flip):
        return gather_batch(
            store,
            indices,
            flip=flip,
            mean=[0.5] * 3,
            std=[0.2] * 3,
            dtype=torch.bfloat16,
            channels_last=True,
        )

    indices, flip = torch.tensor([2, 0], device=device), torch.tensor([True, False], device=device)
    compiled = torch.compile(batch, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(store, indices, flip), batch(store, indices, flip))


@pytest.mark.parametrize("channels_last", [False, True])
def test_registered_operation(channels_last, device):
    store = torch.randint(0, 256, (4, 3, 4, 6), dtype=torch.uint8, device=device)
    scale = torch.ones(3, device=device)
    arguments = (
        store,
        torch.tensor([2, 0], device=device),
        None,
        scale,
        scale,
        torch.float16,
        channels_last,
    )
    torch.library.opcheck(torch.ops.dpfast.gather_batch.default, arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"store": torch.zeros(2, 3, 4, 4)}, TypeError, r"store must be uint8.*\(2, 3, 4, 4\)"),
        (
            {"store": torch.zeros(2, 3, 4, dtype=torch.uint8)},
            ValueError,
            r"store has shape \(2, 3, 4\)",
        ),
        ({"indices": torch.zeros(2)}, TypeError, "indices must be int64"),
        (
            {"indices": torch.zeros(2, 1, dtype=torch.int64)},
            ValueError,
            r"indices has shape \(2, 1\)",
        ),
        (
            {"indices": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "indices.*is on meta",
        ),
        (
            {"flip": torch.zeros(3, dtype=torch.bool)},
            ValueError,
            r"flip has shape \(3,\), expected \(2,\)",
        ),
        ({"flip": torch.zeros(2)}, TypeError, "flip must be bool"),
        ({"mean": [0.5]}, ValueError, "mean has 1 values, expected one for each of 3 channels"),
        ({"mean": 0.5}, TypeError, "mean must be a sequence of numbers or a tensor, got 0.5"),
        ({"std": ["a", 1, 1]}, TypeError, "std must be a sequence of numbers or a tensor"),
        ({"std": torch.ones(4)}, ValueError, r"std has shape \(4,\), expected \(3,\)"),
        ({"dtype": torch.float64}, TypeError, "dtype must be float32"),
    ],
)
def test_bad_input(arguments, error, message, backend):
    given = {
        "store": torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        "indices": torch.zeros(2, dtype=torch.int64),
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "dtype": torch.float32,
        "channels_last": False,
    } | arguments
    with pytest.raises(error, match=message):
        gather_batch(given.pop("store"), given.pop("indices"), **given)
