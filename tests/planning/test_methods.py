"""Counted work against the published figures of the models, and the costs that follow from it."""

import dataclasses

import pytest
import torch

from dpfast.hardware.flops import Fused, Passes, count_passes, count_work
from dpfast.hardware.peaks import samples_per_second
from dpfast.planning.methods import PREDECESSOR, Method, PartFlops, stable_diffusion_15


def test_a_linear_layer_counts_two_flops_a_weight_in_each_direction():
    layer = torch.nn.Linear(3, 5, device="meta").requires_grad_(False)
    assert count_passes(layer, torch.empty(4, 3, device="meta")) == Passes(30, 30)


@pytest.mark.parametrize("masked", [False, True])
def test_an_attention_counts_the_same_by_whatever_names_it_is_called(masked):
    """diffusers' newer models say its operands by keywords. On meta tensors it holds no scores."""
    q, k = torch.empty(2, 3, 8, 4, device="meta"), torch.empty(2, 3, 16, 4, device="meta")
    mask = torch.empty(2, 3, 1, 16, device="meta") if masked else None
    attention = torch.nn.functional.scaled_dot_product_attention
    calls = (
        lambda: attention(q, k, k, mask),
        lambda: attention(query=q, key=k, value=k, attn_mask=mask),
    )
    by_place, by_name = map(count_work, calls)
    assert by_place == by_name
    assert by_place.flops == 2 * (2 * 3 * 8 * 16 * 4) * 2
    with Fused():
        assert [call().shape for call in calls] == [q.shape] * 2


@pytest.fixture(scope="module")
def sd():
    return stable_diffusion_15(512)


def test_stable_diffusion_has_its_known_flops(sd):
    tera = {
        name: getattr(sd, name).forward / 1e12
        for name in ("denoiser", "decoder", "tiny", "learner")
    }
    assert tera == pytest.approx(
        {"denoiser": 0.803, "decoder": 2.515, "tiny": 0.141, "learner": 0.035}, abs=0.001
    )
    assert sd.denoiser.backward / 1e12 == pytest.approx(0.923, abs=0.001)


def test_guidance_costs_what_the_shared_forward_and_the_tiny_decoder_leave_of_it(sd):
    costs = {
        "predecessor": PREDECESSOR,
        "full": Method(tiny=False),
        "extra": Method(gradient="extra"),
        "ours": Method(),
    }
    thirty = {
        name: dataclasses.replace(m, steps=30, guided=6).ratio(sd) for name, m in costs.items()
    }
    assert thirty == pytest.approx(
        {"predecessor": 1.81, "full": 1.72, "extra": 1.25, "ours": 1.15}, abs=0.006
    )
    assert Method().ratio(sd) <= 1.15


def test_methods_add_their_parts_up():
    one = PartFlops(
        name="",
        denoiser=Passes(1, 2),
        decoder=Passes(10, 20),
        tiny=Passes(3, 4),
        learner=Passes(0.5, 0.25),
    )
    assert Method(steps=4, guided=0).total(one) == 4 * 2 + 10
    assert Method(steps=4, guided=0, cfg_steps=1).total(one) == 5 + 10
    assert Method(steps=4, guided=2).total(one) == 18 + 2 * (2 + 7 + 0.75)
    assert Method(steps=4, guided=2, gradient="extra", tiny=False).total(one) == 18 + 2 * (
        3 + 30 + 0.75
    )
    assert Method(steps=4, guided=2, gradient="latent").total(one) == 18 + 2 * 7.75


def test_limits_are_of_known_devices():
    assert samples_per_second("H100", 50.7e12) == pytest.approx(19.5, abs=0.05)
    with pytest.raises(ValueError, match=r"device = 'abacus': expected one of a100"):
        samples_per_second("abacus", 1.0)
