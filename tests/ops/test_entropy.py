from __future__ import annotations

import math

import pytest
import torch

from dpfast.ops import entropy, entropy_and_grad
from tests.tolerances import ENTROPY, ENTROPY_GRAD, HALF_ULP

from .conftest import INTERPRETED, far_apart

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    (1, 1),
    (5, 3),
    (37, 10),
    (3, 100),
    (41, 1271),
    (37, 1000),
    (0, 10),
    (2, 21841),
    (1, 128256),
    (1, 262144),
]
if INTERPRETED:
    SHAPES = [(1, 1), (5, 3), (37, 10), (3, 100), (4, 1271), (5, 1000), (0, 10), (1, 21841)]


def truth(logits: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """H and dH/dz in fp64, the gradient by autograd."""
    z = logits.detach().double().requires_grad_()
    log_p = torch.log_softmax(z / temperature, dim=-1)
    values = -(log_p.exp() * log_p).sum(dim=-1)
    (gradient,) = torch.autograd.grad(values.sum(), z)
    return values.detach(), gradient


def assert_exact(logits: torch.Tensor, temperature: float = 1.0) -> None:
    values, gradient = entropy_and_grad(logits, temperature=temperature)
    expected, expected_gradient = truth(logits, temperature)
    assert values.dtype == torch.float32
    assert gradient.dtype == logits.dtype
    assert gradient.shape == logits.shape
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=ENTROPY)
    torch.testing.assert_close(
        gradient.double(),
        expected_gradient,
        rtol=HALF_ULP[logits.dtype],
        atol=ENTROPY_GRAD[logits.dtype] / temperature,
    )
    torch.testing.assert_close(
        entropy(logits, temperature=temperature), values, rtol=0, atol=ENTROPY
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_matches_fp64(shape, dtype, device):
    assert_exact((4 * torch.randn(shape)).to(device, dtype))


@pytest.mark.parametrize("temperature", [0.25, 3.0])
@pytest.mark.parametrize("classes", [7, 1000])
def test_temperature(classes, temperature, device):
    assert_exact(torch.randn(5, classes, device=device), temperature)


@pytest.mark.parametrize("shape", [(37, 10), (5, 1000), (3, 20000)], ids=str)
def test_out_may_be_the_logits(shape, device):
    logits = torch.randn(shape, device=device)
    values, gradient = entropy_and_grad(logits)
    out = torch.empty_like(logits)
    assert entropy_and_grad(logits, out=out)[1] is out
    assert torch.equal(out, gradient)
    again, _ = entropy_and_grad(logits, out=logits)
    assert torch.equal(again, values)
    assert torch.equal(logits, gradient)


def test_out_of_another_kind_is_refused(device):
    logits = torch.randn(4, 6, device=device)
    with pytest.raises(ValueError, match=r"out has shape \(6, 4\), expected \(4, 6\)"):
        entropy_and_grad(logits, out=logits.new_empty(6, 4))
    with pytest.raises(ValueError, match="expected contiguous memory"):
        entropy_and_grad(logits, out=logits.new_empty(6, 4).T)


@pytest.mark.parametrize("classes", [10, 600])
def test_strided_rows_and_columns(classes, device):
    wide = torch.randn(6, 2 * classes + 3, device=device)
    assert_exact(wide[::2, 3 : 3 + classes])
    assert_exact(wide[:, 1 : 2 * classes : 2])
    assert_exact(torch.randn(classes, 4, device=device).T)


@pytest.mark.parametrize("classes", [10, 20000])
def test_rows_further_apart_than_32_bits_count(classes, device):
    assert_exact(far_apart(classes, torch.bfloat16, device).copy_(torch.randn(2, classes)))


@pytest.mark.parametrize("classes", [10, 1000])
def test_extremes(classes, device):
    logits = torch.zeros(5, classes, device=device)
    logits[1, 0], logits[2, 1], logits[3], logits[4, ::2] = 1e4, -1e4, 1e4, -1e4
    values, gradient = entropy_and_grad(logits)
    expected = torch.tensor([classes, 1, classes - 1, classes, classes // 2], device=device).log()
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=ENTROPY)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 700])
def test_impossible_classes_have_no_part(classes, dtype, device):
    logits = torch.randn(4, classes, device=device).to(dtype)
    logits[:, 3] = -math.inf
    kept = torch.cat((logits[:, :3], logits[:, 4:]), dim=1)
    values, gradient = entropy_and_grad(logits)
    torch.testing.assert_close(values, entropy(kept), rtol=0, atol=ENTROPY)
    assert (gradient[:, 3] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("classes", [5, 600])
def test_broken_rows_stay_alone(classes, device):
    clean = torch.randn(8, classes, device=device)
    logits = clean.clone()
    logits[1, 2], logits[3, 0], logits[6] = math.nan, math.inf, -math.inf
    values, gradient = entropy_and_grad(logits)
    expected, expected_gradient = entropy_and_grad(clean)
    broken = torch.tensor([1, 3, 6], device=device)
    whole = torch.tensor([0, 2, 4, 5, 7], device=device)
    assert values[broken].isnan().all()
    assert gradient[broken].isnan().all()
    torch.testing.assert_close(values[whole], expected[whole], rtol=0, atol=0)
    torch.testing.assert_close(gradient[whole], expected_gradient[whole], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 6), (2, 80)], ids=str)
def test_entropy_is_differentiable(shape, device):
    logits = torch.randn(shape, device=device, requires_grad=True)
    expected = truth(logits)[1].float()
    for value in (entropy(logits), entropy_and_grad(logits)[0]):
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=ENTROPY_GRAD[torch.float32])


def test_a_second_derivative_is_refused(device):
    logits = torch.randn(3, 6, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(entropy(logits).square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_reference_passes_gradcheck():
    from dpfast.ops.entropy import reference

    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: reference(z, 0.7)[0], logits)


def test_function_transforms(device):
    weight = torch.randn(6, 9, device=device)
    x = torch.randn(4, 6, device=device)

    def objective(x):
        return entropy(x @ weight).sum()

    expected = torch.func.vjp(lambda x: truth_entropy(x @ weight).sum(), x)[1](
        torch.ones((), device=device)
    )[0]
    torch.testing.assert_close(torch.func.grad(objective)(x), expected)
    torch.testing.assert_close(
        torch.func.vjp(objective, x)[1](torch.ones((), device=device))[0], expected
    )
    per_row = torch.func.vmap(torch.func.grad(lambda row: objective(row.unsqueeze(0))))(x)
    torch.testing.assert_close(per_row, expected)
    batched = torch.func.vmap(entropy_and_grad, in_dims=1)(x.unsqueeze(0).expand(3, 4, 6))
    torch.testing.assert_close(batched[0][2], entropy(x[2].expand(3, 6)))


def truth_entropy(logits: torch.Tensor) -> torch.Tensor:
    log_p = torch.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def test_compiles_into_one_graph(device):
    logits = torch.randn(5, 11, device=device)
    compiled = torch.compile(
        lambda z: entropy_and_grad(z, temperature=2.0), fullgraph=True, backend="aot_eager"
    )
    for actual, expected in zip(
        compiled(logits), entropy_and_grad(logits, temperature=2.0), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("gradient", [False, True])
def test_registered_operation(gradient, device):
    torch.library.opcheck(
        torch.ops.dpfast.entropy.default, (torch.randn(3, 5, device=device), 1.5, gradient)
    )


@pytest.mark.parametrize(
    ("logits", "temperature", "error", "message"),
    [
        ([[1.0]], 1.0, TypeError, "logits must be a tensor"),
        (
            torch.zeros(2, 3, dtype=torch.float64),
            1.0,
            TypeError,
            r"logits must be float32.*\(2, 3\)",
        ),
        (torch.zeros(2, 3, dtype=torch.int64), 1.0, TypeError, "logits must be float32"),
        (torch.zeros(3), 1.0, ValueError, r"logits has shape \(3,\), expected \(B, K\)"),
        (torch.zeros(3, 0), 1.0, ValueError, r"logits has shape \(3, 0\)"),
        (torch.zeros(2, 3), 0.0, ValueError, "temperature must be finite and positive"),
        (torch.zeros(2, 3), math.inf, ValueError, "temperature must be finite and positive"),
        (torch.zeros(2, 3), "1", TypeError, "temperature must be a number"),
    ],
)
@pytest.mark.parametrize("function", [entropy, entropy_and_grad])
def test_bad_input(function, logits, temperature, error, message, backend):
    with pytest.raises(error, match=message):
        function(logits, temperature=temperature)
