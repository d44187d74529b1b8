"""What a frozen denoiser computes in fewer and larger products: the predictions stay the same."""

import copy

import diffusers
import pytest
import torch
from diffusers.models.activations import GELU
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from torch import nn

from dpfast.generate.models.frozen_layers import (
    FrozenLinear,
    freeze_linear,
    fuse_projections,
    share_conditioning,
)
from dpfast.generate.pipelines import Pipeline
from tests.tiny_pipelines import NAMES, randomise

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN"
)


def block(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(24, 40), GELU(40, 96, approximate="tanh"), nn.Linear(96, 24, bias=False)
    )
    return layers.to(dtype).requires_grad_(False)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    plain = block()
    return plain, freeze_linear(copy.deepcopy(plain))


@needs_onednn
def test_every_linear_layer_and_the_gelu_behind_one_are_replaced(pair):
    assert [type(layer) for layer in pair[1]] == [FrozenLinear] * 3
    assert [layer.gelu for layer in pair[1]] == [False, True, False]


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 24), (3, 16, 24), (0, 16, 24)])
def test_values_are_those_of_the_layers_they_replace(pair, shape):
    plain, frozen = pair
    x = torch.randn(shape)
    exact = copy.deepcopy(plain).double()(x.double())
    with torch.no_grad():
        fused = frozen(x)
    for made in (fused, frozen(x)):
        torch.testing.assert_close(made.double(), exact, rtol=0, atol=2e-6)


@needs_onednn
def test_one_full_graph_with_the_vjp_inside(pair):
    plain, frozen = pair

    def gradient(model, x):
        with torch.no_grad():
            value, backward = torch.func.vjp(lambda x: model(2 * x), x)
            return value + model(x), backward(torch.ones_like(value))[0]

    x = torch.randn(4, 16, 24)
    made = torch.compile(gradient, fullgraph=True)(frozen, x)
    for ours, exact in zip(made, gradient(plain, x), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_other_dtypes_keep_pytorchs_layers():
    assert not any(
        isinstance(layer, FrozenLinear) for layer in freeze_linear(block(torch.bfloat16)).modules()
    )


@pytest.fixture(scope="module")
def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=5,
    )
    randomise(model)
    return model.eval().requires_grad_(False)


def count_products(model, *args, **kwargs):
    products = []

    def note(module, given, out):
        products.append(module)

    hooks = [
        m.register_forward_hook(note) for m in model.modules() if isinstance(m, torch.nn.Linear)
    ]
    out = model(*args, **kwargs).sample
    for hook in hooks:
        hook.remove()
    return out, len(products)


def test_conditioning_of_all_blocks_at_once_is_that_of_each(dit):
    """Timesteps and labels may differ by row; the last label is the null class."""
    x, t, labels = (
        torch.randn(6, 4, 8, 8),
        torch.tensor([0, 1, 500, 999, 999, 3]),
        torch.tensor([0, 5, 4, 3, 2, 1]),
    )
    expected, before = count_products(dit, x, timestep=t, class_labels=labels)
    shared = share_conditioning(copy.deepcopy(dit), 1000)
    got, after = count_products(shared, x, timestep=t, class_labels=labels)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    # two embeddings and a projection a block, two embeddings for the output
    assert before - after == 3 * 3 + 2


def test_a_shared_conditioning_keeps_no_second_copy_of_its_weights(dit):
    shared = share_conditioning(copy.deepcopy(dit), 10)
    held = sum(p.numel() for p in shared.parameters()) + sum(b.numel() for b in shared.buffers())
    assert held < sum(p.numel() for p in dit.parameters())


def test_fused_projections_are_the_parts(dit, stable_diffusion_folder):
    unet = diffusers.UNet2DConditionModel.from_pretrained(stable_diffusion_folder / "unet").eval()
    text, x, t = (
        torch.randn(2, 7, unet.config.cross_attention_dim),
        torch.randn(2, 4, 8, 8),
        torch.tensor([7, 300]),
    )
    for model, args, condition in (
        (dit, (x,), {"timestep": t, "class_labels": torch.tensor([0, 3])}),
        (unet, (x, t), {"encoder_hidden_states": text}),
    ):
        with torch.no_grad():
            expected, before = count_products(model, *args, **condition)
            fused = fuse_projections(copy.deepcopy(model))
            got, after = count_products(fused, *args, **condition)
        layers = [m for m in fused.modules() if isinstance(m, Attention)]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert before - after == sum(1 if layer.is_cross_attention else 2 for layer in layers)
        assert sum(p.numel() for p in fused.parameters()) == sum(
            p.numel() for p in model.parameters()
        )


def test_denoisers_are_loaded_fused(stable_diffusion_folder):
    model = Pipeline.from_pretrained(stable_diffusion_folder, class_names=NAMES).denoiser.model
    processors = {type(m.processor) for m in model.modules() if isinstance(m, Attention)}
    assert processors == {FusedAttnProcessor2_0}
    assert not any(p.requires_grad for p in model.parameters())
