from __future__ import annotations

import itertools
import math

import pytest
import torch

from dpfast.ops import DynamicThreshold, guided_step
from dpfast.ops.guided_step import triton as kernel
from dpfast.ops.noise import reference as reference_normal
from tests.tolerances import CANCELLED, GUIDED, HALF_ULP

from .conftest import INTERPRETED

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PREDICTIONS = ["epsilon", "v", "sample", "flow"]
SHAPES = [(3, 4, 8, 8), (2, 1), (5, 3, 5, 7), (2, 1024), (0, 4, 8, 8), (2, 3, 75, 101)]
BOTH = (False, True)


def solver_table(device: str, steps: int = 7) -> torch.Tensor:
    angle = torch.linspace(1.3, 0.2, steps)
    columns = (
        angle.cos(),
        angle.sin(),
        (angle - 0.1).cos(),
        (angle - 0.1).sin(),
        0.3 - angle / 7,
        0.2 + angle / 9,
    )
    return torch.stack(columns, dim=1).to(device)


def tensors(shape, device, dtype=torch.float32):
    x, cond, uncond, grad, previous = (torch.randn(shape).to(device, dtype) for _ in range(5))
    return x, cond, uncond, (grad.float() * 1e-2).to(dtype), previous


def label_score(x, cond, uncond, alpha, sigma, prediction):
    """score(x | label) - score(x), from the two predictions by way of their eps: the score is
    -eps / sigma.
    """
    score_cond, score_uncond = (
        {
            "epsilon": -pred,
            "v": -(sigma * x + alpha * pred),
            "sample": -(x - alpha * pred) / sigma,
            "flow": -(x + alpha * pred),
        }[prediction]
        / sigma
        for pred in (cond, uncond)
    )
    return score_cond - score_uncond


def truth(
    x,
    cond,
    uncond,
    grad,
    table,
    step,
    *,
    cfg_scale,
    omega,
    mode,
    prediction,
    anchor=None,
    clip=None,
    x0_prev=None,
    sample_ids=None,
    seed=0,
):
    """The formulas of the module's docstring, one sample at a time in fp64."""
    following, x0s = [], []
    alpha, sigma, a, b, c, d = table[step].double().unbind()
    per_sample = [
        torch.as_tensor(value, dtype=torch.float64).expand(len(x)) for value in (cfg_scale, omega)
    ]
    anchors = torch.as_tensor(0.0 if anchor is None else anchor).double().cpu().expand(len(x))
    for i in range(len(x)):
        state, pred, scale, weight = (
            x[i].double(),
            cond[i].double(),
            per_sample[0][i],
            per_sample[1][i],
        )
        if uncond is not None:
            pred = uncond[i].double() + scale * (pred - uncond[i].double())
        g = torch.zeros_like(state) if grad is None else grad[i].double()
        pull = g / (g.norm() + 1e-8)
        if anchor is not None and anchors[i] != 0 and g.norm() > 0:
            label = label_score(
                state, cond[i].double(), uncond[i].double(), alpha, sigma, prediction
            )
            if label.norm() > 0:
                toward = g / g.norm() + anchors[i] * label / label.norm()
                pull = g.norm() / (g.norm() + 1e-8) * toward / max(toward.norm(), 1 / 32)
                g = g.norm() * toward
        if mode == "relative":
            state = state + weight * state.norm() * pull
        if prediction == "epsilon":
            eps = pred
        elif prediction == "v":
            eps = sigma * state + alpha * pred
        elif prediction == "sample":
            eps = (state - alpha * pred) / sigma
        else:
            eps = state + alpha * pred
        x0 = state - sigma * pred if prediction == "flow" else alpha * state - sigma * pred
        x0 = {"epsilon": (state - sigma * eps) / alpha, "sample": pred}.get(prediction, x0)
        if mode == "score":
            eps = eps - weight * sigma * g
            x0 = x0 + weight * sigma**2 / alpha * g
        if isinstance(clip, tuple):
            bound = torch.quantile(x0.abs().flatten(), clip[0]).clamp(1.0, clip[1])
            x0 = x0.clamp(-bound, bound) / bound
        elif clip is not None:
            x0 = x0.clamp(-clip, clip)
        result = a * x0 + b * eps
        if x0_prev is not None:
            result = result + c * x0_prev[i].double()
        if sample_ids is not None:
            result = (
                result
                + d
                * reference_normal(sample_ids[i : i + 1], x.shape[1:], seed, step + 1)[0].double()
            )
        following.append(result)
        x0s.append(x0)
    return torch.stack(following), torch.stack(x0s)


def assert_close(actual, expected, dtype, scale=1.0):
    torch.testing.assert_close(
        actual.cpu().double(), expected, rtol=HALF_ULP[dtype], atol=GUIDED * scale
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(shape, dtype, device):
    if INTERPRETED and math.prod(shape[1:]) > 2048:
        shape = (1, 3, 45, 51)
    x, cond, uncond, grad, previous = tensors(shape, device, dtype)
    table = solver_table(device)
    ids = torch.arange(shape[0], device=device) + 2**33
    options = {"cfg_scale": 3.0, "omega": 0.1, "mode": "relative", "prediction": "v", "seed": 5}
    x0 = torch.full_like(x, torch.nan)
    following = guided_step(
        x, cond, uncond, grad, table, 2, x0_prev=previous, sample_ids=ids, x0_out=x0, **options
    )
    assert following.shape == x.shape
    assert following.dtype == dtype
    if shape[0]:
        cpu = [tensor.cpu() for tensor in (x, cond, uncond, grad, table)]
        expected, expected_x0 = truth(
            *cpu, 2, x0_prev=previous.cpu(), sample_ids=ids.cpu(), **options
        )
        assert_close(following, expected, dtype)
        assert_close(x0, expected_x0, dtype)


@pytest.mark.parametrize(
    "clip", [None, 0.7, DynamicThreshold(0.9, 2.0)], ids=["free", "clip", "dynamic"]
)
@pytest.mark.parametrize("mode", ["relative", "score"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_variant(prediction, mode, clip, device):
    x, cond, uncond, grad, previous = tensors((2, 2, 5, 7), device)
    table, ids = solver_table(device), torch.tensor([2**35, -3], device=device)
    variants = list(itertools.product(BOTH, BOTH, BOTH, BOTH))
    for has_uncond, has_grad, has_previous, has_noise in variants[::5] if INTERPRETED else variants:
        inputs = [x, cond, uncond if has_uncond else None, grad if has_grad else None, table]
        terms = {
            "x0_prev": previous if has_previous else None,
            "sample_ids": ids if has_noise else None,
        }
        options = {
            "cfg_scale": 2.5,
            "omega": 0.2,
            "mode": mode,
            "prediction": prediction,
            "clip": clip,
            "seed": 9,
        }
        x0 = torch.full_like(x, torch.nan)
        following = guided_step(*inputs, 3, x0_out=x0, **terms, **options)
        cpu = [None if value is None else value.cpu() for value in (*inputs, *terms.values())]
        expected, expected_x0 = truth(*cpu[:5], 3, x0_prev=cpu[5], sample_ids=cpu[6], **options)
        assert_close(following, expected, torch.float32, 4)
        assert_close(x0, expected_x0, torch.float32, 4)


@pytest.mark.parametrize("anchor", [None, 0.5], ids=["", "anchor"])
@pytest.mark.parametrize("clip", [None, DynamicThreshold(0.9, 2.0)], ids=["free", "dynamic"])
@pytest.mark.parametrize("mode", ["relative", "score"])
def test_samples_that_no_single_program_holds(mode, clip, anchor, device, monkeypatch):
    monkeypatch.setattr(kernel, "WHOLE", 1024)
    monkeypatch.setattr(kernel, "SPLIT", 512)
    x, cond, uncond, grad, previous = tensors((3, 3, 19, 23), device)
    grad[1, 2, 18, 22] = math.nan
    table, ids = solver_table(device), torch.tensor([4, 2**35, -3], device=device)
    options = {
        "cfg_scale": 2.5,
        "omega": 0.2,
        "anchor": anchor,
        "mode": mode,
        "prediction": "v",
        "clip": clip,
        "seed": 9,
    }
    x0, skipped = torch.full_like(x, torch.nan), torch.zeros((), dtype=torch.int64, device=device)
    following = guided_step(
        x,
        cond,
        uncond,
        grad,
        table,
        3,
        x0_prev=previous,
        sample_ids=ids,
        x0_out=x0,
        skipped=skipped,
        **options,
    )
    assert skipped.item() == 1
    grad[1] = 0
    cpu = [value.cpu() for value in (x, cond, uncond, grad, table, previous, ids)]
    expected, expected_x0 = truth(*cpu[:5], 3, x0_prev=cpu[5], sample_ids=cpu[6], **options)
    assert_close(following, expected, torch.float32, 4)
    assert_close(x0, expected_x0, torch.float32, 4)


@pytest.mark.parametrize("ratio", [0.0, 0.37, 0.5, 0.995, 1.0])
@pytest.mark.parametrize("elements", [1, 2, 33, 300])
def test_dynamic_threshold_is_the_exact_quantile(elements, ratio, device):
    x = 3 * torch.randn(3, elements, device=device)
    x[1] = x[1].round()  # many equal values
    table = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 0.0]], device=device)
    clipped = guided_step(
        x,
        x,
        None,
        None,
        table,
        0,
        cfg_scale=1.0,
        omega=0.0,
        prediction="sample",
        clip=DynamicThreshold(ratio, 100.0),
    )
    bound = torch.quantile(x.double().abs(), ratio, dim=1, keepdim=True).clamp(min=1.0)
    assert_close(clipped, (x.double().clamp(-bound, bound) / bound).cpu(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["relative", "score"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_an_anchor_turns_the_step_to_the_label(prediction, mode, dtype, device):
    """At odd sizes, with numbers, device scalars and one value a sample, and with everything that a
    step may have beside it.
    """
    table = solver_table(device)
    for shape, clip, has_rest in (
        ((3, 2, 5, 7), None, False),
        ((2, 1), 0.7, True),
        ((2, 3, 11, 31), DynamicThreshold(0.9, 2.0), True),
        ((2, 4, 16, 16), None, True),
    ):
        x, cond, uncond, grad, previous = tensors(shape, device, dtype)
        ids = torch.arange(shape[0], device=device) - 2**33
        rest = {"x0_prev": previous, "sample_ids": ids} if has_rest else {}
        options = {"cfg_scale": 1.5, "omega": 0.2, "mode": mode, "prediction": prediction}
        options |= {"clip": clip, "seed": 3}
        for anchor in (
            0.5,
            torch.tensor(1.0, device=device),
            torch.tensor([2.5, 0.0, 0.25], device=device)[: shape[0]],
        ):
            x0 = torch.full_like(x, torch.nan)
            following = guided_step(
                x, cond, uncond, grad, table, 3, anchor=anchor, x0_out=x0, **rest, **options
            )
            cpu = [tensor.cpu() for tensor in (x, cond, uncond, grad, table)]
            on_cpu = {name: value.cpu() for name, value in rest.items()}
            expected, expected_x0 = truth(*cpu, 3, anchor=anchor, **on_cpu, **options)
            assert_close(following, expected, dtype, 4)
            assert_close(x0, expected_x0, dtype, 4)


@pytest.mark.parametrize("clip", [None, DynamicThreshold(0.9, 2.0)], ids=["free", "dynamic"])
def test_predictions_that_a_program_does_not_hold(clip, device, monkeypatch):
    monkeypatch.setattr(kernel, "HELD", 64)
    inputs = tensors((2, 3, 9, 11), device)[:4]
    table, options = solver_table(device), {"cfg_scale": 2.5, "omega": 0.2, "mode": "relative"}
    options |= {"prediction": "sample", "clip": clip, "anchor": 0.75}
    following = guided_step(*inputs, table, 3, **options)
    cpu = [tensor.cpu() for tensor in (*inputs, table)]
    assert_close(following, truth(*cpu, 3, **options)[0], torch.float32, 4)


def anchored(inputs, anchor, *, mode="relative", **rest):
    """The step of x, both predictions and the gradient, as (x_next, samples skipped)."""
    device = inputs[0].device
    skipped = torch.zeros((), dtype=torch.int64, device=device)
    options = {"cfg_scale": 2.0, "omega": 0.3, "mode": mode, "skipped": skipped, **rest}
    table = solver_table(device)
    return guided_step(*inputs, table, 2, anchor=anchor, **options), skipped.item()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in Triton's interpreter
@pytest.mark.parametrize("anchor", [1e6, 1e15, 1e20, 3e38, math.inf])
def test_an_anchor_of_any_size_moves_as_far_towards_the_label(anchor, device):
    x, cond, uncond, grad, _ = tensors((2, 3, 5, 7), device)
    options = {"cfg_scale": 1.5, "omega": 0.2, "mode": "relative", "prediction": "epsilon"}
    cpu = [tensor.cpu() for tensor in (x, cond, uncond, grad, solver_table(device))]
    expected, _ = truth(*cpu, 3, anchor=min(anchor, 1e30), **options)
    for said in (anchor, torch.full((2,), anchor, device=device)):
        found = guided_step(x, cond, uncond, grad, solver_table(device), 3, anchor=said, **options)
        assert_close(found, expected, torch.float32, 4)


@pytest.mark.parametrize("mode", ["relative", "score"])
def test_an_anchor_of_zero_is_the_step_without_one_bit_for_bit(mode, device):
    x, cond, uncond, grad, _ = tensors((4, 3, 7, 9), device)
    cond[1] = 1e30  # the square of its difference is infinite, which nobody looks at
    expected, _ = anchored((x, cond, uncond, grad), None, mode=mode)
    for zero in (0, 0.0, torch.tensor(0.0, device=device), torch.zeros(4, device=device)):
        following, skipped = anchored((x, cond, uncond, grad), zero, mode=mode)
        assert torch.equal(following, expected)
        assert skipped == 0


@pytest.mark.parametrize("mode", ["relative", "score"])
def test_samples_without_a_label_score_take_the_step_without_an_anchor(mode, device):
    x, cond, uncond, grad, _ = tensors((4, 3, 50), device)
    uncond[2] = cond[2]
    expected, _ = anchored((x, cond, uncond, grad), None, mode=mode)
    following, skipped = anchored((x, cond, uncond, grad), 0.5, mode=mode)
    assert torch.equal(following[2], expected[2])
    assert not torch.isclose(following[[0, 1, 3]], expected[[0, 1, 3]]).all(dim=(1, 2)).any()
    without = [anchored((x, cond, None, grad), anchor, mode=mode)[0] for anchor in (None, 0.5)]
    assert torch.equal(*without)
    assert skipped == 0


@pytest.mark.parametrize("mode", ["relative", "score"])
def test_an_anchor_without_a_gradient_moves_nothing(mode, device):
    x, cond, uncond, grad, _ = tensors((3, 60), device)
    grad[1] = 0
    following, skipped = anchored((x, cond, uncond, grad), 0.5, mode=mode)
    unguided = [anchored((x, cond, uncond, None), anchor, mode=mode)[0] for anchor in (None, 0.5)]
    assert torch.equal(*unguided)
    torch.testing.assert_close(following[1], unguided[0][1], rtol=1e-6, atol=1e-6)
    assert skipped == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in Triton's interpreter
@pytest.mark.parametrize("mode", ["relative", "score"])
def test_a_label_score_that_is_not_finite_counts_as_skipped(mode, device):
    x, cond, uncond, grad, _ = tensors((5, 70), device)
    unguided, _ = anchored((x, cond, uncond, None), None, mode=mode)
    expected, _ = anchored((x, cond, uncond, grad), 0.5, mode=mode)
    cond[0, 3], uncond[3, 69], grad[3, 1], grad[4, 2] = math.nan, -math.inf, math.nan, math.inf
    cond[1, 5] = 3e19  # finite, but no fp32 holds its square
    following, skipped = anchored((x, cond, uncond, grad), 0.5, mode=mode)
    assert skipped == 4
    assert torch.equal(following[2], expected[2])
    whole = torch.ones(70, dtype=torch.bool, device=device)
    whole[[3, 5, 69]] = False
    for row in (0, 1, 3, 4):
        torch.testing.assert_close(
            following[row][whole], unguided[row][whole], rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("mode", ["relative", "score"])
def test_an_anchor_may_differ_between_samples(mode, device):
    """Rows of zero are those without an anchor, no row sees another, and NaN stays in its own."""
    inputs = tensors((5, 3, 40), device)[:4]
    kappas = torch.tensor([0.0, 0.5, 0.0, 2.0, math.nan], device=device)
    following, skipped = anchored(inputs, kappas, mode=mode)
    expected, _ = anchored(inputs, None, mode=mode)
    assert torch.equal(following[[0, 2]], expected[[0, 2]])
    assert following[4].isnan().all()
    assert skipped == 0
    for order in ([3], [1, 3, 0], [4, 2, 1, 0, 3]):
        part = [tensor[order] for tensor in inputs]
        moved, _ = anchored(part, kappas[order], mode=mode)
        torch.testing.assert_close(moved, following[order], rtol=0, atol=0, equal_nan=True)
    for row in (1, 3):
        part = [tensor[[row]] for tensor in inputs]
        for kappa in (kappas[row], kappas[row].item()):
            moved, _ = anchored(part, kappa, mode=mode)
            torch.testing.assert_close(moved[0], following[row], rtol=1e-6, atol=1e-6)


def test_a_gradient_against_the_label_score_leaves_nothing_to_move_along(device):
    """At kappa = 1 and a gradient just against c, d is 0: so is the move, and it grows with d."""
    x, cond, uncond, aside, _ = tensors((1, 4096), device)
    # along the difference of the predictions, which for epsilon is against c
    difference = cond - uncond
    aside = aside - (aside * difference).sum() / difference.square().sum() * difference
    aside = aside / aside.norm() * difference.norm()
    unguided, _ = anchored((x, cond, uncond, None), None)
    full = (anchored((x, cond, uncond, difference), None)[0] - unguided).norm().item()
    for turn, share in ((0.0, 0.0), (1 / 320, 0.1), (1 / 64, 0.5), (1 / 8, 1.0)):
        grad = 1e-3 * (difference + turn * aside)
        moved, _ = anchored((x, cond, uncond, grad), 1.0)
        cpu = [tensor.cpu() for tensor in (x, cond, uncond, grad, solver_table(device))]
        options = {"cfg_scale": 2.0, "omega": 0.3, "mode": "relative", "prediction": "epsilon"}
        expected, _ = truth(*cpu, 2, anchor=1.0, **options)
        torch.testing.assert_close(moved.cpu().double(), expected, rtol=0, atol=CANCELLED)
        length = (moved - unguided).norm().item()
        assert length == pytest.approx(share * full, rel=0.02, abs=2e-3 * full)


def test_mixed_dtypes(device):
    x, cond, uncond, grad, _ = tensors((2, 4, 6, 6), device)
    cond, uncond, grad = cond.bfloat16(), uncond.half(), grad.bfloat16()
    options = {"cfg_scale": 4.0, "omega": 0.1, "mode": "relative", "prediction": "epsilon"}
    table = solver_table(device)
    following = guided_step(x, cond, uncond, grad, table, 1, **options)
    cpu = [tensor.cpu() for tensor in (x, cond, uncond, grad, table)]
    assert_close(following, truth(*cpu, 1, **options)[0], torch.float32, 4)


@pytest.mark.parametrize("mode", ["relative", "score"])
def test_omega_may_differ_between_samples(mode, device):
    x, cond, uncond, grad, _ = tensors((3, 4, 5), device)
    table = solver_table(device)
    scales, weights = (
        torch.tensor([1.0, 0.0, 7.5], device=device),
        torch.tensor([0.0, 0.3, 0.1], device=device),
    )
    whole = guided_step(x, cond, uncond, grad, table, 2, cfg_scale=scales, omega=weights, mode=mode)
    for i in range(3):
        rows = [tensor[i : i + 1] for tensor in (x, cond, uncond, grad)]
        for scale, weight in [(scales[i], weights[i]), (scales[i].item(), weights[i].item())]:
            alone = guided_step(*rows, table, 2, cfg_scale=scale, omega=weight, mode=mode)
            torch.testing.assert_close(alone[0], whole[i], rtol=1e-6, atol=1e-6)


def test_step_and_seed_may_live_on_the_device(device):
    x, cond, _, _, _ = tensors((2, 4, 5), device)
    table, ids = solver_table(device), torch.arange(2, device=device)
    options = {"cfg_scale": 1.0, "omega": 0.0, "sample_ids": ids}
    for step, dtype in itertools.product((0, 3, 6), (torch.int64, torch.int32)):
        expected = guided_step(x, cond, None, None, table, step, seed=3, **options)
        at, seed = torch.tensor(step, dtype=dtype, device=device), torch.tensor(3, device=device)
        assert torch.equal(
            guided_step(x, cond, None, None, table, at, seed=seed, **options), expected
        )
    for step, prediction, clip in itertools.product(
        (-1, 7), PREDICTIONS, (None, 1.0, DynamicThreshold(0.9, 2.0))
    ):
        at = torch.tensor(step, device=device)
        outside = guided_step(
            x, cond, None, None, table, at, prediction=prediction, clip=clip, **options
        )
        assert outside.isnan().all()


def test_each_step_has_its_own_noise(device):
    zero = torch.zeros(2, 40, device=device)
    table = torch.tensor([[1.0, 0.5, 0.0, 0.0, 0.0, 1.0]], device=device).repeat(3, 1)
    ids = torch.tensor([8, 3], device=device)
    for step in range(3):
        drawn = guided_step(
            zero, zero, None, None, table, step, cfg_scale=1.0, omega=0.0, sample_ids=ids, seed=2
        )
        torch.testing.assert_close(
            drawn.cpu(), reference_normal(ids.cpu(), (40,), 2, step + 1), rtol=1e-5, atol=1e-6
        )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in Triton's interpreter
@pytest.mark.parametrize("mode", ["relative", "score"])
def test_gradient_that_is_not_finite_counts_as_none(mode, device):
    x, cond, uncond, grad, _ = tensors((5, 3, 70), device)
    table = solver_table(device)
    options = {"cfg_scale": 2.0, "omega": 0.3, "mode": mode}
    expected = guided_step(x, cond, uncond, grad, table, 2, **options)
    unguided = guided_step(x, cond, uncond, None, table, 2, **options)
    grad[0, 1, 3], grad[2, 2, 69], grad[3, 0, 0] = math.nan, -math.inf, 1e30
    skipped = torch.full((), 10, dtype=torch.int64, device=device)
    following = guided_step(x, cond, uncond, grad, table, 2, skipped=skipped, **options)
    assert skipped.item() == 13
    torch.testing.assert_close(following[[1, 4]], expected[[1, 4]], rtol=0, atol=0)
    torch.testing.assert_close(following[[0, 2, 3]], unguided[[0, 2, 3]], rtol=1e-6, atol=1e-6)


def test_zero_gradient_and_zero_omega_leave_the_step_unguided(device):
    x, cond, uncond, grad, _ = tensors((3, 90), device)
    table = solver_table(device)
    for mode in ("relative", "score"):
        options = {"cfg_scale": 2.0, "mode": mode}
        unguided = guided_step(x, cond, uncond, None, table, 2, omega=0.3, **options)
        for gradient, omega in ((torch.zeros_like(grad), 0.3), (grad, 0.0)):
            following = guided_step(x, cond, uncond, gradient, table, 2, omega=omega, **options)
            torch.testing.assert_close(following, unguided, rtol=1e-6, atol=1e-6)


def test_coefficients_of_zero(device):
    x, cond, _, grad, _ = tensors((2, 30), device)
    table = torch.tensor(
        [[0.0, 1.0, 0.1, 0.9, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]], device=device
    )
    start = guided_step(
        x, cond, None, grad, table, 0, cfg_scale=1.0, omega=0.5, mode="score", prediction="flow"
    )
    torch.testing.assert_close(
        start, 0.1 * (x - cond) + 0.9 * (x - 0.5 * grad), rtol=1e-6, atol=1e-6
    )
    end = guided_step(x, cond, None, None, table, 1, cfg_scale=1.0, omega=0.0, prediction="sample")
    torch.testing.assert_close(end, cond, rtol=0, atol=0)


def test_outputs_given_by_the_caller(device):
    x, cond, uncond, grad, _ = tensors((3, 4, 6, 6), device)
    table = solver_table(device)
    options = {"cfg_scale": 2.0, "omega": 0.1}
    expected = guided_step(x, cond, uncond, grad, table, 2, **options)
    out = torch.full_like(x, torch.nan)
    assert guided_step(x, cond, uncond, grad, table, 2, out=out, **options) is out
    assert torch.equal(out, expected)
    for target in (out.to(memory_format=torch.channels_last), torch.stack((out, out))[0]):
        guided_step(x, cond, uncond, grad, table, 2, out=target, **options)
        assert torch.equal(target, expected)
    guided_step(x, cond, uncond, grad, table, 2, out=x, **options)
    assert torch.equal(x, expected)


def test_strided_inputs(device):
    x, cond, uncond, grad, previous = (
        tensor.to(memory_format=torch.channels_last) for tensor in tensors((3, 4, 6, 6), device)
    )
    table, ids = solver_table(device), torch.arange(6, device=device)[::2]
    options = {"cfg_scale": torch.rand(6, device=device)[::2], "omega": 0.1, "sample_ids": ids}
    expected = guided_step(
        *(tensor.contiguous() for tensor in (x, cond, uncond, grad)),
        table,
        2,
        x0_prev=previous.contiguous(),
        **options,
    )
    assert torch.equal(
        guided_step(x, cond, uncond, grad, table, 2, x0_prev=previous, **options), expected
    )


def test_samples_do_not_see_each_other(device):
    x, cond, uncond, grad, previous = tensors((4, 50), device)
    table, ids = solver_table(device), torch.arange(4, device=device)
    options = {"cfg_scale": 2.0, "omega": 0.1, "clip": DynamicThreshold(0.9, 3.0)}
    whole = guided_step(
        x, cond, uncond, grad, table, 1, x0_prev=previous, sample_ids=ids, **options
    )
    order = torch.tensor([2, 0], device=device)
    part = [tensor[order] for tensor in (x, cond, uncond, grad)]
    subset = guided_step(*part, table, 1, x0_prev=previous[order], sample_ids=ids[order], **options)
    assert torch.equal(subset, whole[order])


def test_compiles_into_one_graph(device):
    x, cond, uncond, grad, previous = tensors((2, 4, 5), device)
    table, ids = solver_table(device), torch.arange(2, device=device)

    def step(x, at, seed, omega, skipped):
        x0 = torch.empty_like(x)
        options = {"x0_prev": previous, "sample_ids": ids, "x0_out": x0, "skipped": skipped}
        following = guided_step(
            *(x, cond, uncond, grad, table, at),
            **{"cfg_scale": 2.0, "omega": omega, "anchor": 5 * omega, "seed": seed, **options},
        )
        guided_step(x, cond, None, None, table, at, cfg_scale=1.0, omega=0.0, clip=1.0, out=x)
        return following, x0

    arguments = [torch.tensor(value, device=device) for value in (2, 7, 0.1, 0)]
    grad[1, 2, 3] = math.nan
    expected_x, actual_x = x.clone(), x.clone()
    expected = step(expected_x, *arguments)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(actual_x, *arguments)
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right)
    torch.testing.assert_close(actual_x, expected_x)
    assert arguments[-1].item() == 2


def test_registered_operation(device):
    x, cond, uncond, grad, previous = tensors((2, 4, 5), device)
    at, skipped = torch.tensor(2, device=device), torch.zeros((), dtype=torch.int64, device=device)
    arguments = (
        torch.zeros_like(x),
        torch.zeros_like(x),
        skipped,
        x,
        cond,
        uncond,
        grad,
        previous,
        solver_table(device),
        0,
        at,
        2.0,
        None,
        0.0,
        torch.rand(2, device=device),
        0.0,
        torch.rand(2, device=device),
        "relative",
        "v",
        math.inf,
        -1.0,
        1.0,
        torch.arange(2, device=device),
        3,
        None,
    )
    torch.library.opcheck(torch.ops.dpfast.guided_step.default, arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.float64)}, TypeError, r"x must be float32.*\(2, 3\)"),
        ({"x": torch.zeros(2)}, ValueError, r"x has shape \(2,\), expected \(B, ...\)"),
        ({"pred_cond": None}, TypeError, "pred_cond must be a tensor"),
        (
            {"pred_cond": torch.zeros(2, 4)},
            ValueError,
            r"pred_cond has shape \(2, 4\), expected " r"\(2, 3\)",
        ),
        (
            {"pred_uncond": torch.zeros(1, 3)},
            ValueError,
            r"pred_uncond has shape \(1, 3\), " r"expected \(2, 3\)",
        ),
        ({"grad": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "grad must be float32"),
        ({"grad": torch.zeros(2, 3, device="meta")}, ValueError, "grad.*is on meta"),
        ({"x0_prev": torch.zeros(3, 2)}, ValueError, r"x0_prev has shape \(3, 2\)"),
        ({"out": torch.zeros(2, 3, dtype=torch.float16)}, TypeError, "out must be float32"),
        ({"x0_out": torch.zeros(2)}, ValueError, r"x0_out has shape \(2,\)"),
        (
            {"table": torch.zeros(4, 5)},
            ValueError,
            r"table has shape \(4, 5\), expected \(steps, " r"6\)",
        ),
        ({"table": torch.zeros(4, 6, dtype=torch.float64)}, TypeError, "table must be float32"),
        ({"step": 4}, ValueError, r"step must be in \[0, 4\), the rows of the table, got 4"),
        ({"step": -1}, ValueError, "step must be in"),
        ({"step": torch.zeros(2, dtype=torch.int64)}, ValueError, r"step has shape \(2,\)"),
        ({"step": 0.0}, TypeError, "step must be an integer"),
        (
            {"cfg_scale": torch.zeros(3)},
            ValueError,
            r"cfg_scale has shape \(3,\), expected \(\) or " r"\(2,\)",
        ),
        ({"omega": "0.1"}, TypeError, "omega must be a number"),
        ({"anchor": "1"}, TypeError, "anchor must be a number"),
        ({"anchor": True}, TypeError, "anchor must be a number"),
        ({"anchor": -0.5}, ValueError, "anchor must be at least 0, got -0.5"),
        ({"anchor": math.nan}, ValueError, "anchor must be at least 0, got nan"),
        ({"anchor": torch.ones(3)}, ValueError, r"anchor has shape \(3,\), expected .* \(2,\)"),
        ({"anchor": torch.ones((), device="meta")}, ValueError, "anchor.*is on meta"),
        ({"omega": torch.zeros((), device="meta")}, ValueError, "omega.*is on meta"),
        ({"mode": "absolute"}, ValueError, "mode must be one of relative, score"),
        ({"prediction": "eps"}, ValueError, "prediction must be one of epsilon, v, sample, flow"),
        ({"clip": -1.0}, ValueError, "clip must be positive"),
        ({"clip": (1.5, 1.0)}, ValueError, r"clip needs a ratio in \[0, 1\]"),
        ({"clip": "1"}, TypeError, "clip must be None, a number or a DynamicThreshold"),
        (
            {"clip": (0.9, 1.0, 2.0)},
            TypeError,
            r"clip must be .* or a DynamicThreshold, got \(0.9, " r"1.0, 2.0\)",
        ),
        ({"clip": (0.9, "1")}, TypeError, "clip must be None, a number or a DynamicThreshold"),
        (
            {"sample_ids": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"sample_ids has shape \(3,\)",
        ),
        ({"sample_ids": torch.zeros(2)}, TypeError, "sample_ids must be int64"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
        ({"skipped": torch.zeros(2, dtype=torch.int64)}, ValueError, r"skipped has shape \(2,\)"),
    ],
)
def test_bad_input(arguments, error, message, backend):
    given = {
        "x": torch.zeros(2, 3),
        "pred_cond": torch.zeros(2, 3),
        "pred_uncond": None,
        "grad": None,
        "table": torch.zeros(4, 6),
        "step": 0,
        "cfg_scale": 1.0,
        "omega": 0.0,
    } | arguments
    positional = [
        given.pop(name) for name in ("x", "pred_cond", "pred_uncond", "grad", "table", "step")
    ]
    with pytest.raises(error, match=message):
        guided_step(*positional, **given)


@pytest.mark.parametrize("elements", [8192, 8200, 16384, 16385])
def test_a_quantile_is_found_at_the_sizes_where_the_launch_changes(elements, device):
    x, cond, uncond, grad, _ = tensors((2, elements), device)
    x[0, :5] = 7.5  # repeated values at the quantile
    clip = DynamicThreshold(0.9995, 50.0)
    options = {"cfg_scale": 2.5, "omega": 0.2, "mode": "relative", "prediction": "v", "clip": clip}
    following = guided_step(x, cond, uncond, grad, solver_table(device), 3, **options)
    cpu = [value.cpu() for value in (x, cond, uncond, grad, solver_table(device))]
    assert_close(following, truth(*cpu, 3, **options)[0], torch.float32, 4)
