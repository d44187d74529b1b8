"""What models launch and move on a GPU, counted on the meta device; for a layer, by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpfast.hardware.traffic import count_traffic
from dpfast.ops import entropy_and_grad
from dpfast.planning.architectures import published

META = torch.device("meta")
NHWC = torch.channels_last


def images(layout: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    return torch.empty(2, 32, 8, 8, device=META, dtype=torch.bfloat16).to(memory_format=layout)


SIZE = 2 * 32 * 8 * 8 * 2  # bytes of images()


def test_a_group_norm_transposes_what_lies_in_nhwc_and_the_next_convolution_transposes_back() -> (
    None
):
    norm = nn.GroupNorm(4, 32, device=META, dtype=torch.bfloat16)
    layer = nn.Conv2d(32, 32, 3, padding=1, bias=False, device=META, dtype=torch.bfloat16)
    layer.to(memory_format=NHWC)
    weight = layer.weight.numel() * 2
    x, transposed = images(), images(NHWC)
    plain = count_traffic(lambda: norm(x))
    assert (plain.launches, plain.layout_copies, plain.bytes()) == (2, 0, 3 * SIZE)
    both = count_traffic(lambda: layer(norm(transposed)))
    assert (both.launches, both.layout_copies) == (5, 2)
    assert both.pointwise == (2 + 3 + 2) * SIZE
    assert both.bytes("product") == 2 * SIZE + weight


def test_a_convolution_adds_its_bias_apart_and_transposes_inside_where_all_is_nchw() -> None:
    layer = nn.Conv2d(32, 32, 1, device=META, dtype=torch.bfloat16)
    x = images()
    found = [(k.kind, k.bytes) for k in count_traffic(lambda: layer(x)).kernels]
    weight = layer.weight.numel() * 2
    assert found == [
        ("layout", 2 * SIZE),
        ("layout", 2 * SIZE),
        ("product", 2 * SIZE + weight),
        ("pointwise", 2 * SIZE),
    ]


def test_views_are_free_a_broadcast_is_read_once_and_the_backward_pass_counts() -> None:
    x = images().requires_grad_(True)
    row = torch.empty(1, 32, 1, 1, device=META, dtype=torch.bfloat16)
    assert count_traffic(lambda: x.permute(0, 2, 3, 1).flatten(1, 2)).launches == 0
    assert count_traffic(lambda: x + row.expand(2, 32, 8, 8)).bytes() == 2 * SIZE + 64
    grad = images()
    with_backward = count_traffic(lambda: torch.autograd.grad(F.silu(x), x, grad))
    assert [k.bytes for k in with_backward.kernels] == [2 * SIZE, 3 * SIZE]


def test_a_product_has_its_flops_and_the_length_of_its_sums() -> None:
    half = {"device": META, "dtype": torch.bfloat16}
    x = images(NHWC).requires_grad_(True)
    layer = nn.Conv2d(32, 48, 3, padding=1, bias=False, **half).requires_grad_(False)
    y = torch.empty(2, 48, 8, 8, **half).to(memory_format=NHWC)
    both = count_traffic(lambda: torch.autograd.grad(layer(x), x, y)).kernels
    each = 2 * 2 * 8 * 8 * 32 * 48 * 9
    products = [(k.flops, k.depth) for k in both if k.kind == "product"]
    assert products == [(each, 9 * 32), (each, 9 * 48)]
    rows, weight, into = (torch.empty(*shape, **half) for shape in ((6, 32), (32, 8), (6, 8)))
    for call in (lambda: rows @ weight, lambda: into.addmm_(rows, weight)):
        (product,) = count_traffic(call).kernels
        assert (product.flops, product.depth) == (2 * 6 * 32 * 8, 32)
    q, k = (torch.empty(2, 4, tokens, 40, **half).requires_grad_() for tokens in (64, 77))

    def attention() -> object:
        out = F.scaled_dot_product_attention(q, k, k)
        return torch.autograd.grad(out, (q, k), torch.empty_like(out))

    products = [(k.flops, k.depth) for k in count_traffic(attention).kernels if k.flops]
    each = 2 * 2 * 4 * 64 * 77 * 40
    assert products == [(2 * each, 40), (5 * each, 40)]  # with the scores once more
    assert not any(kernel.own for kernel in both)


def test_the_keys_and_values_of_all_prompts_are_one_product_and_a_small_part_of_a_step() -> None:
    denoiser = published("stable-diffusion-1.5", dtype=torch.bfloat16, fused=True).denoiser
    labels = torch.zeros(32, dtype=torch.int64, device=META)
    with torch.no_grad():
        rows = count_traffic(lambda: denoiser._text(denoiser.embeddings.index_select(0, labels)))
    assert rows.launches == 2
    assert sum(kernel.flops for kernel in rows.kernels) == pytest.approx(0.0945e12, rel=1e-3)
    assert rows.bytes() == pytest.approx(0.173e9, rel=1e-2)


def test_an_operation_of_ours_is_never_counted_as_nothing() -> None:
    logits = torch.empty(8, 10, device=META)
    with pytest.raises(NotImplementedError, match="has no formula of its traffic"):
        count_traffic(lambda: entropy_and_grad(logits))


# Launches, gigabytes beside the products and copies that only transpose, plain and fused: of a
# denoiser's step, of its decoder at half the rows. docs/records/numerics.md has the table.
STEPS = {
    "stable-diffusion-1.5": ((32, 980, 74.13, 155), (32, 535, 26.78, 0)),
    "dit-xl-2": ((64, 552, 34.51, 2), (64, 210, 8.60, 0)),
}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", STEPS)
def test_the_step_of_a_published_denoiser(name: str, fused: bool) -> None:
    rows, launches, gigabytes, transposes = STEPS[name][fused]
    denoiser = published(name, dtype=torch.bfloat16, fused=fused).denoiser
    if name != "dit-xl-2":
        denoiser.model.to(memory_format=NHWC)
    with META, torch.no_grad():
        x, labels = torch.empty(rows, *denoiser.sample_shape), torch.zeros(rows, dtype=torch.int64)
        step = count_traffic(lambda: denoiser(x, torch.empty((), dtype=torch.int64), labels))
    assert (step.launches, step.layout_copies) == (launches, transposes)
    assert step.pointwise == pytest.approx(gigabytes * 1e9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "rows", "launches", "gigabytes"),
    [("stable-diffusion-1.5", 16, 1097, 37.99), ("dit-xl-2", 32, 526, 20.23)],
)
def test_the_prediction_of_a_guided_step_and_its_gradient(
    name: str, rows: int, launches: int, gigabytes: float
) -> None:
    denoiser = published(name, dtype=torch.bfloat16, fused=True).denoiser

    def guided() -> None:
        with META:
            x = torch.empty(rows, *denoiser.sample_shape).requires_grad_()
            labels = torch.zeros(rows, dtype=torch.int64)
            prediction = denoiser(x, torch.empty((), dtype=torch.int64), labels)
            torch.autograd.grad(prediction, x, torch.empty_like(prediction))

    both = count_traffic(guided)
    assert (both.launches, both.layout_copies) == (launches, 0)
    assert both.pointwise == pytest.approx(gigabytes * 1e9, rel=1e-3)
    assert [k.name for k in both.kernels if k.name == "cat"] == []  # of gradients


@pytest.mark.parametrize(
    ("fused", "launches", "gigabytes", "transposes"),
    [(False, 282, 213.19, 76), (True, 154, 66.1, 0)],
    ids=["plain", "fused"],
)
def test_the_decoder_of_16_images_of_512_pixels(
    fused: bool, launches: int, gigabytes: float, transposes: int
) -> None:
    decoder = published("stable-diffusion-1.5", dtype=torch.bfloat16, fused=fused).decoder
    with META, torch.no_grad():
        latents = torch.empty(16, 4, 64, 64)
        decoding = count_traffic(lambda: decoder(latents))
    assert (decoding.launches, decoding.layout_copies) == (launches, transposes)
    assert decoding.pointwise == pytest.approx(gigabytes * 1e9, rel=1e-3)


@pytest.mark.parametrize(
    ("fused", "launches", "gigabytes"), [(False, 207, 30.95), (True, 127, 14.22)]
)
def test_the_tiny_decoder_of_16_images_of_512_pixels_and_its_gradient(
    fused: bool, launches: int, gigabytes: float
) -> None:
    decoder = published("stable-diffusion-1.5", dtype=torch.bfloat16, fused=fused).guidance_decoder

    def guided() -> None:
        with META:
            latents = torch.empty(16, 4, 64, 64).requires_grad_()
            images = decoder(latents)
            torch.autograd.grad(images, latents, torch.empty_like(images))

    both = count_traffic(guided)
    assert (both.launches, both.layout_copies) == (launches, 1 - fused)
    assert both.pointwise == pytest.approx(gigabytes * 1e9, rel=1e-3)
