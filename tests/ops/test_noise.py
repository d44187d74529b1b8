from __future__ import annotations

import math

import pytest
import torch

from dpfast.ops import dispatch, normal
from dpfast.ops.noise import philox, philox_words, reference, reference_words, words
from dpfast.ops.triton_stub import tl, triton
from tests.tolerances import NORMAL

from .conftest import INTERPRETED

# Random123 1.14, kat_vectors: counter, key and the ten-round result of philox4x32.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
IDS = [0, 1, 5, 2**31, 2**32 + 7, 2**40 + 3, -1]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers_of_the_reference(counter, key, expected):
    result = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(word) for word in result] == expected


@triton.jit
def philox_kernel(keys, out):
    block = tl.load(keys + 3).to(tl.uint32) + tl.zeros((16,), tl.uint32)
    words = philox_words(tl.load(keys), block, tl.load(keys + 1), tl.load(keys + 2))
    for i in tl.static_range(4):
        tl.store(out + 16 * i + tl.arange(0, 16), words[i].to(tl.int32, bitcast=True))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers_of_the_kernels(counter, key, expected, backend, device):
    """All three through the kernels' own function: element // 4 of a real sample ends long before
    2^32 - 1.
    """
    if backend == "reference":
        pytest.skip("the reference has a test of its own")
    if backend == "native":
        assert dispatch.native_module().philox(*counter, *key) == tuple(expected)
        return
    words = [counter[1] << 32 | counter[0], counter[3] << 32 | key[0], key[1], counter[2]]
    keys = torch.tensor([(word + 2**63) % 2**64 - 2**63 for word in words], device=device)
    out = torch.empty((4, 16), dtype=torch.int32, device=device)
    philox_kernel[(1,)](keys, out)
    assert out.long().bitwise_and(0xFFFFFFFF).tolist() == [[word] * 16 for word in expected]


def test_the_first_known_answer_through_the_operation(device):
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    assert words(zero, 4, seed=0, stream=0).flatten().tolist() == KNOWN_ANSWERS[0][2]


@pytest.mark.parametrize("elements", [1, 4, 7, 1023, 1024, 1025, 4099])
@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (2**40 + 9, 3), (-5, 2**32 - 1)])
def test_words_are_identical_on_every_backend(elements, seed, stream, device):
    ids = torch.tensor(IDS[::3] if INTERPRETED else IDS, device=device)
    assert torch.equal(
        words(ids, elements, seed=seed, stream=stream), reference_words(ids, elements, seed, stream)
    )


@pytest.mark.parametrize("shape", [(1,), (3,), (4, 9, 5), (1031,), (3, 32, 32)], ids=str)
def test_normals_match_fp64(shape, device):
    ids = torch.tensor(IDS, device=device)
    z = normal(ids, shape, seed=11, stream=2)
    assert z.shape == (len(IDS), *shape)
    torch.testing.assert_close(
        z.double(), reference(ids, shape, 11, 2).double(), rtol=NORMAL, atol=NORMAL
    )


def test_a_sample_keeps_its_noise(device):
    ids = torch.tensor(IDS, device=device)
    whole = normal(ids, (2, 333), seed=1, stream=0)
    order = torch.tensor([4, 0, 6], device=device)
    torch.testing.assert_close(
        normal(ids[order], (2, 333), seed=1, stream=0), whole[order], rtol=0, atol=0
    )
    torch.testing.assert_close(
        normal(ids, (2, 300), seed=1, stream=0)[:, 0], whole[:, 0, :300], rtol=0, atol=0
    )
    assert torch.equal(
        normal(ids.repeat(2)[::2], (5,), seed=1, stream=0),
        normal(ids.repeat(2)[::2].clone(), (5,), seed=1, stream=0),
    )


def test_seed_and_stream_may_live_on_the_device(device):
    ids = torch.arange(3, device=device)
    for seed, stream in [(7, 3), (-(2**50), 2**31)]:
        on_device = normal(
            ids,
            (21,),
            seed=torch.tensor(seed, device=device),
            stream=torch.tensor(stream, device=device),
        )
        assert torch.equal(on_device, normal(ids, (21,), seed=seed, stream=stream))
    assert torch.equal(
        normal(ids, (9,), seed=2**64 - 1, stream=0), normal(ids, (9,), seed=-1, stream=0)
    )


def test_keys_are_independent(device):
    ids = torch.arange(2, device=device)
    draws = [normal(ids, (500,), seed=s, stream=t).flatten() for s in (0, 1, 2**32) for t in (0, 1)]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws), device=device)
    assert correlation.abs().max() < 5 / math.sqrt(1000)


@pytest.mark.parametrize("part", [slice(0, None, 2), slice(1, None, 2), slice(None)])
def test_distribution(part, device):
    stats = pytest.importorskip("scipy.stats")
    rows = 2 if INTERPRETED else 64
    z = (
        normal(torch.arange(rows, device=device), (2048,), seed=3, stream=9)[:, part]
        .flatten()
        .cpu()
        .numpy()
    )
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert abs(z.mean()) < 4 / math.sqrt(z.size)
    assert abs(z.var() - 1) < 6 / math.sqrt(z.size)


@pytest.mark.parametrize("shape", [(0,), (3, 0)], ids=str)
def test_empty(shape, device):
    assert normal(torch.arange(2, device=device), shape, seed=0, stream=0).shape == (2, *shape)
    assert normal(torch.arange(0, device=device), (4,), seed=0, stream=0).shape == (0, 4)


def test_compiles_into_one_graph(device):
    ids = torch.arange(3, device=device)

    def draw(ids, seed):
        return normal(ids, (2, 5), seed=seed, stream=1) + normal(ids, (2, 5), seed=3, stream=1)

    seed = torch.tensor(4, device=device)
    torch.testing.assert_close(
        torch.compile(draw, fullgraph=True, backend="aot_eager")(ids, seed), draw(ids, seed)
    )


def test_registered_operation(device):
    ids, seed = torch.arange(3, device=device), torch.tensor(5, device=device)
    torch.library.opcheck(torch.ops.dpfast.normal.default, (ids, [2, 3], 0, seed, 1, None))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sample_ids": torch.zeros(3)}, TypeError, r"sample_ids must be int64.*\(3,\)"),
        (
            {"sample_ids": torch.zeros(3, 1, dtype=torch.int64)},
            ValueError,
            r"sample_ids has shape \(3, 1\)",
        ),
        ({"shape": (-1,)}, ValueError, "shape must hold non-negative"),
        ({"shape": (2.5,)}, TypeError, r"shape must be a tuple or list of integers, got \(2.5,\)"),
        ({"shape": 4}, TypeError, "shape must be a tuple or list of integers, got 4"),
        ({"seed": 1.5}, TypeError, "seed must be an integer"),
        ({"seed": 2**64}, ValueError, "seed must fit into 64 bits"),
        ({"stream": torch.zeros(2, dtype=torch.int64)}, ValueError, r"stream has shape \(2,\)"),
        (
            {"seed": torch.zeros((), dtype=torch.int64, device="meta")},
            ValueError,
            r"seed.*is on meta",
        ),
    ],
)
def test_bad_input(arguments, error, message, backend):
    given = {"sample_ids": torch.arange(3), "shape": (4,), "seed": 0, "stream": 0} | arguments
    with pytest.raises(error, match=message):
        normal(given.pop("sample_ids"), given.pop("shape"), **given)


@pytest.mark.parametrize("seed", [2**31 - 1, 2**31, 2**32 - 1, 2**32, -1, -(2**31) - 1])
def test_seeds_at_the_ends_of_32_bits(seed, device):
    ids = torch.tensor([3, 2**40], device=device)
    expected = reference(ids.cpu(), (8,), seed, 1)
    assert (normal(ids, (8,), seed=seed, stream=1).cpu() - expected).abs().max() < 1e-6
