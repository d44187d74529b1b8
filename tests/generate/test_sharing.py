"""What a frozen denoiser computes in one product instead of many: the predictions stay the same."""

import copy

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0

from dpfast.generate.models.conditioning import share_conditioning
from dpfast.generate.models.projections import fuse_projections
from dpfast.generate.pipelines import Pipeline
from tests.tiny_pipelines import NAMES, randomise


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
    assert (
        before - after == 3 * 3 + 2
    )  # two embeddings and a projection a block, two embeddings for the output


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
