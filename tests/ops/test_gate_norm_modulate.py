"""Gated residual, norm and modulation: values and gradients against fp64, for each use of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpfast.errors import InputError
from dpfast.hardware.traffic import count_traffic
from dpfast.ops import gate_norm_modulate
from tests.tolerances import HALF_ULP

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# which of gate, offset, weight and bias, scale and shift a model gives, and whether a branch ends
USES = {
    "DiT, first": (False, {"scale", "shift"}),
    "DiT, between": (True, {"gate", "scale", "shift"}),
    "UNet, first": (False, {"weight", "bias"}),
    "UNet, between": (True, {"weight", "bias"}),
    "UNet, without a tape": (False, {"offset", "weight", "bias"}),
    "everything": (True, {"gate", "offset", "weight", "bias", "scale", "shift"}),
}


def given(use: str, channels: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], dict]:
    """x and, where there is one, the branch (2, 5, D); everything else by name."""
    branch, names = USES[use]
    streams = [torch.randn(2, 5, channels).to(device, dtype) for _ in range(1 + branch)]
    rows = torch.randn(2, 3 * channels).to(device, dtype).chunk(3, dim=1)
    vectors = torch.randn(3, channels).to(device, dtype)
    order = ("gate", "scale", "shift", "offset", "weight", "bias")
    named = dict(zip(order, (*rows, *vectors), strict=True))
    return streams, {name: value for name, value in named.items() if name in names}


def truth(streams: list[Tensor], named: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    u, *branch = streams
    wide = {name: value.double() for name, value in named.items()}
    for h in branch:
        u = u + (wide["gate"][:, None] * h if "gate" in wide else h)
    y = F.layer_norm(
        u + wide.get("offset", 0.0), u.shape[-1:], wide.get("weight"), wide.get("bias"), 1e-6
    )
    return u, y * (1 + wide["scale"][:, None]) + wide["shift"][:, None] if "scale" in wide else y


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 10, 48, 1152])
def test_matches_fp64(channels, dtype, use, device, backend):
    streams, named = given(use, channels, dtype, device)
    taped = [each.clone().requires_grad_() for each in streams]
    wide = [each.double().requires_grad_() for each in streams]
    found = gate_norm_modulate(*taped, **named, eps=1e-6)
    exact = truth(wide, named)
    # the reference rounds after each of its up to seven operations
    steps = 1.5 if backend == "triton" else 8
    bound = steps * HALF_ULP[dtype] + 2e-6
    for made, right in zip(found, exact, strict=True):
        assert made.dtype == dtype
        scale = float(right.detach().abs().max())
        torch.testing.assert_close(made.double(), right, rtol=0, atol=bound * scale)
    du, dy = torch.randn_like(streams[0]), torch.randn_like(streams[0])
    for outputs, seeds in (((0, 1), (du, dy)), ((1,), (dy,))):
        gradients = torch.autograd.grad(
            [found[i] for i in outputs], taped, list(seeds), retain_graph=True
        )
        rights = torch.autograd.grad(
            [exact[i] for i in outputs], wide, [s.double() for s in seeds], retain_graph=True
        )
        for made, right in zip(gradients, rights, strict=True):
            scale = float(right.abs().max())
            torch.testing.assert_close(made.double(), right, rtol=0, atol=3 * bound * scale)


@pytest.mark.parametrize("use", USES)
def test_the_gradient_under_vjp_is_that_of_the_tape(use, device):
    streams, named = given(use, 32, torch.float32, device)
    seed = torch.randn_like(streams[0])
    taped = [each.clone().requires_grad_() for each in streams]
    y = gate_norm_modulate(*taped, **named)[1]
    expected = torch.autograd.grad(y, taped, seed)
    _, backward = torch.func.vjp(lambda *given: gate_norm_modulate(*given, **named)[1], *streams)
    for made, right in zip(backward(seed), expected, strict=True):
        torch.testing.assert_close(made, right, rtol=0, atol=1e-6)


def test_a_row_of_equal_numbers_is_finite(device):
    x = torch.full((1, 2, 8), 3.0, device=device, requires_grad=True)
    _, y = gate_norm_modulate(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.zeros_like(y))
    assert dx.isfinite().all()


def test_without_a_branch_the_stream_is_x_itself_and_constants_have_no_gradient(device):
    x = torch.randn(2, 3, 8, device=device, requires_grad=True)
    weight = torch.randn(8, device=device, requires_grad=True)
    stream, y = gate_norm_modulate(x, weight=weight)
    assert torch.equal(stream, x)
    assert stream.data_ptr() == x.data_ptr()
    assert torch.autograd.grad(y.sum(), weight, allow_unused=True) == (None,)


def test_the_gradient_of_the_stream_is_summed_in_the_kernel():
    x, du, dy = (torch.empty(2, 3, 8, device="meta") for _ in range(3))
    x.requires_grad_()

    def both() -> None:
        torch.autograd.grad(gate_norm_modulate(x), x, (du, dy))

    size = 4 * x.numel()
    assert [kernel.bytes for kernel in count_traffic(both).kernels] == [2 * size, 4 * size]


def test_no_sample_depends_on_another(device):
    streams, named = given("everything", 48, torch.bfloat16, device)
    both = gate_norm_modulate(*streams, **named)
    first = {n: v[:1] if v.dim() == 2 else v for n, v in named.items()}
    alone = gate_norm_modulate(*(each[:1] for each in streams), **first)
    for left, right in zip(both, alone, strict=True):
        assert torch.equal(left[:1], right)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(3, 8)}, InputError, r"x has shape \(3, 8\), expected \(B, T, D\)"),
        ({"branch": torch.zeros(2, 5, 7)}, InputError, "branch has shape"),
        ({"gate": torch.zeros(2, 8)}, InputError, "gate is given without a branch"),
        ({"scale": torch.zeros(3, 8)}, InputError, r"scale has shape \(3, 8\), expected \(2, 8\)"),
        ({"weight": torch.zeros(7)}, InputError, "weight has shape"),
        ({"eps": -1e-5}, InputError, "eps = -1e-05"),
    ],
    ids=["x", "branch", "gate", "scale", "weight", "eps"],
)
def test_what_it_cannot_use_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        gate_norm_modulate(**({"x": torch.zeros(2, 5, 8)} | changes))
