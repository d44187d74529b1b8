"""Promises that hold for any input, tried on inputs that hypothesis looks for."""

from __future__ import annotations

import math

import pytest
import torch

from dpfast.ops import entropy, entropy_and_grad, guided_step, normal
from dpfast.ops.noise import reference
from tests.ops.conftest import INTERPRETED
from tests.tolerances import ENTROPY, NORMAL

pytest.importorskip("hypothesis", reason="the inputs are hypothesis' choice")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

examples = settings(
    max_examples=5 if INTERPRETED else 30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@examples
@given(
    rows=st.integers(1, 9),
    classes=st.integers(1, 700),
    scale=st.floats(0, 30),
    shift=st.floats(-50, 50),
    seed=st.integers(0, 2**31),
)
def test_entropy_and_its_gradient(rows, classes, scale, shift, seed, device):
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(rows, classes, generator=generator)).to(device)
    values, gradient = entropy_and_grad(logits)
    assert (values >= -ENTROPY).all()
    assert (values <= math.log(classes) + ENTROPY).all()
    assert gradient.double().sum(dim=1).abs().max() < 1e-5
    # Rounding of logits + shift moves the result by up to its size: an ulp of 200 is 1.5e-5.
    torch.testing.assert_close(entropy(logits + shift), values, rtol=0, atol=2e-4)
    assert (values <= entropy(torch.zeros_like(logits)) + ENTROPY).all()


@examples
@given(
    batch=st.integers(1, 5),
    elements=st.integers(1, 200),
    step=st.integers(0, 6),
    cfg_scale=st.floats(0, 10),
    omega=st.floats(0, 2),
    seed=st.integers(0, 2**31),
)
def test_relative_guidance_moves_by_omega_norms(
    batch, elements, step, cfg_scale, omega, seed, device
):
    torch.manual_seed(seed)
    x, cond, uncond, grad = (torch.randn(batch, elements).to(device) for _ in range(4))
    table = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 0.0]] * 7, device=device)
    moved = guided_step(x, cond, uncond, grad, table, step, cfg_scale=cfg_scale, omega=omega) - x
    expected = omega * x.norm(dim=1) * (grad.norm(dim=1) / (grad.norm(dim=1) + 1e-8))
    torch.testing.assert_close(moved.norm(dim=1), expected, rtol=1e-4, atol=1e-4)
    assert ((moved * grad).sum(dim=1) >= -1e-6).all()


@examples
@given(
    batch=st.integers(1, 5),
    elements=st.integers(2, 200),
    kappa=st.floats(1, 20),
    prediction=st.sampled_from(["epsilon", "v", "sample", "flow"]),
    against=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
@example(batch=4, elements=2, kappa=1.0, prediction="epsilon", against=0.76613870507, seed=645)
def test_no_anchored_move_leads_away_from_the_label_at_kappa_of_one_or_more(
    batch, elements, kappa, prediction, against, seed, device
):
    torch.manual_seed(seed)
    x, cond, uncond, grad = (torch.randn(batch, elements).to(device) for _ in range(4))
    label = (cond - uncond) * (1 if prediction == "sample" else -1)
    grad = (1 - against) * grad - against * label
    # x_next is what x~ is at sigma = 0, or at "sample" eps at alpha = 0 and sigma = 1
    row = (
        [0.0, 1.0, 0.0, 1.0, 0.0, 0.0] if prediction == "sample" else [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    )
    table = torch.tensor([row], device=device)
    options = {"cfg_scale": 2.0, "omega": 0.5, "prediction": prediction}
    moved = guided_step(x, cond, uncond, grad, table, 0, anchor=kappa, **options) - x
    along = (moved * label).sum(dim=1) / label.norm(dim=1)
    assert (along >= -1e-4 * x.norm(dim=1)).all()
    # |d| is the root of numbers near 1 that cancel to 2^-10, and keep 2^-12 of it or so
    assert (moved.norm(dim=1) <= 0.5 * x.norm(dim=1) * (1 + 2**-10)).all()


@examples
@given(
    sample=st.integers(-(2**63), 2**63 - 1),
    seed=st.integers(-(2**63), 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
    elements=st.integers(1, 300),
)
def test_normals_of_any_key(sample, seed, stream, elements, device):
    ids = torch.tensor([sample], device=device)
    z = normal(ids, (elements,), seed=seed, stream=stream)
    assert z.isfinite().all()
    signed = seed - 2**64 if seed >= 2**63 else seed
    torch.testing.assert_close(
        z, reference(ids, (elements,), signed, stream), rtol=NORMAL, atol=NORMAL
    )
