"""Rows in float8: within half a unit of fp64's values, alone and behind the norm."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpfast.errors import InputError
from dpfast.ops import Quantised, dispatch, gate_norm_modulate, gate_norm_quantise, quantise
from tests.ops.test_gate_norm_modulate import given, truth
from tests.tolerances import HALF_ULP

module = importlib.import_module("dpfast.ops.quantise")  # the function has its name
norm_module = importlib.import_module("dpfast.ops.gate_norm_modulate")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOAT8 = torch.float8_e4m3fn
# numpy, in which the interpreter computes, warns of what a GPU does in silence
SILENT = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def quantised(x: Tensor, *, gelu: bool = False) -> Quantised:
    """``quantise``; in the interpreter, which gets a number wrong that rounds up to the next power
    of two (127.5 becomes 64), what is rounded comes from the kernel and torch rounds it.
    """
    if not dispatch.INTERPRETED:
        return quantise(x, gelu=gelu)
    values, scales = module._forward(x, gelu, torch.float32)
    return Quantised(values.to(FLOAT8), scales)


def norm_quantised(streams: list[Tensor], named: dict[str, Tensor]) -> tuple[Tensor, Quantised]:
    if not dispatch.INTERPRETED:
        return gate_norm_quantise(*streams, **named, eps=1e-6)
    x, *branch = streams
    rows = (named.get(name) for name in ("gate", "scale", "shift"))
    stream, values, scales = norm_module._quantised(
        x, branch[0] if branch else None, *rows, 1e-6, torch.float32
    )
    return stream if branch else x, Quantised(values.to(FLOAT8), scales)


def assert_rounded(made: Quantised, exact: Tensor, *, before: float) -> None:
    """Each value is exact's to half a unit of float8; before: the relative error, of a row's
    largest, of what was rounded.
    """
    assert (made.values.dtype, made.scales.dtype) == (FLOAT8, torch.float32)
    largest = exact.abs().amax(-1, keepdim=True)
    assert made.scales.shape == largest.shape
    torch.testing.assert_close(made.scales.double(), largest / 448, rtol=before + 1e-6, atol=1e-14)
    error = (made.values.double() * made.scales - exact).abs()
    unit = torch.maximum(exact.abs() / 16, largest / 448 / 1024)
    assert bool((error <= unit * 1.001 + 2 * (before + 1e-6) * largest).all())


@SILENT
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 48, 1152])
def test_matches_fp64(channels, dtype, gelu, device, backend):
    # rows of sizes far apart
    x = (torch.randn(2, 5, channels) * torch.logspace(-3, 2, 5)[:, None]).to(device, dtype)
    exact = F.gelu(x.double(), approximate="tanh") if gelu else x.double()
    # where all of a row is in the tail of the GELU, fp32 is left with few digits of it
    assert_rounded(quantised(x, gelu=gelu), exact, before=3e-3 if gelu and channels < 48 else 1e-6)


@pytest.mark.parametrize("use", ["DiT, first", "DiT, between"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 48, 1152])
def test_behind_the_norm_it_matches_fp64(channels, dtype, use, device, backend):
    streams, named = given(use, channels, dtype, device)
    stream, made = norm_quantised(streams, named)
    assert torch.equal(stream, gate_norm_modulate(*streams, **named, eps=1e-6)[0])
    _, exact = truth([each.double() for each in streams], named)
    steps = 1.5 if backend == "triton" else 8  # as for the norm alone
    assert_rounded(made, exact, before=steps * HALF_ULP[dtype] + 2e-6)


def test_the_largest_of_a_row_is_the_largest_float8_and_a_row_of_zeros_is_zeros(device):
    x = torch.randn(4, 48, device=device)
    x[2] = 0
    values, scales = quantised(x)
    assert values.float().abs().amax(1).tolist() == [448, 448, 0, 448]
    assert bool((scales > 0).all())


@SILENT
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("gelu", [False, True])
def test_a_row_that_is_not_finite_stays_so_and_touches_no_other(bad, gelu, device):
    x = torch.randn(3, 48, device=device)
    right = quantised(x, gelu=gelu)
    x[1, 7] = bad
    values, scales = quantised(x, gelu=gelu)
    rows = values.float() * scales
    assert not bool(rows[1].isfinite().all())
    assert torch.equal(rows[::2], (right.values.float() * right.scales)[::2])


def test_no_token_depends_on_another(device):
    streams, named = given("DiT, between", 48, torch.bfloat16, device)
    both = norm_quantised(streams, named)[1]
    alone = norm_quantised([each[:1] for each in streams], {n: v[:1] for n, v in named.items()})[1]
    for left, right in zip(both, alone, strict=True):
        assert torch.equal(left[:1].float(), right.float())


def test_a_counter_sees_the_shapes_and_the_bytes():
    x = torch.empty(2, 5, 48, device="meta", dtype=torch.bfloat16)
    for values, scales in (quantise(x, gelu=True), gate_norm_quantise(x, x)[1]):
        assert (values.shape, values.dtype) == (x.shape, FLOAT8)
        assert (scales.shape, scales.dtype) == ((2, 5, 1), torch.float32)
    assert module._traffic(x, True, out=(values, scales)) == (480 * 3 + 40,)
    traffic = norm_module._quantising_traffic
    assert traffic(x, None, out=(None, values, scales)) == (480 * 3 + 40,)
    assert traffic(x, x, out=(x, values, scales)) == (480 * 7 + 40,)


def test_it_is_a_constant_for_autograd(device):
    x = torch.randn(2, 5, 48, device=device, requires_grad=True)
    stream, made = gate_norm_quantise(x)
    assert not any(t.requires_grad for t in (stream, *made, *quantise(x)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantise(torch.tensor(1.0)), InputError, r"x has shape \(\), expected \(..., D\)"),
        (lambda: quantise(torch.zeros(2, 0)), InputError, r"x has shape \(2, 0\), expected"),
        (lambda: quantise(torch.zeros(2, 3).double()), TypeError, "x must be float32, float16"),
        (lambda: gate_norm_quantise(torch.zeros(3, 8)), InputError, r"expected \(B, T, D\)"),
        (
            lambda: gate_norm_quantise(torch.zeros(2, 5, 8), gate=torch.zeros(2, 8)),
            InputError,
            "gate is given without a branch",
        ),
        (lambda: gate_norm_quantise(torch.zeros(2, 5, 8), eps=-1.0), InputError, "eps = -1.0"),
    ],
    ids=["no row", "no channel", "fp64", "norm: shape", "norm: gate", "norm: eps"],
)
def test_what_it_cannot_use_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
