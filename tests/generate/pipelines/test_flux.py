"""FLUX.1 dev and schnell against diffusers' pipeline."""

import shutil
from functools import partial

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from dpfast.errors import InputError
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.pipelines.families.flux import positions
from dpfast.generate.pipelines.folder import dtype_option
from dpfast.generate.sampler import GuidedSampler
from dpfast.hardware.flops import count_work
from dpfast.planning.architectures import without_weights
from tests import tiny_pipelines
from tests.generate.pipelines.test_families import (
    CLOSE,
    LABELS,
    STEPS,
    TEMPLATE,
    images_of,
    is_one_graph,
    noise_for,
    quiet,
)
from tests.tiny_pipelines import NAMES

PROMPTS = [TEMPLATE.format(NAMES[label]) for label in LABELS]
KIND = diffusers.FluxPipeline
load = partial(
    Pipeline.from_pretrained, class_names=NAMES, prompt_template=TEMPLATE, height=16, width=16
)


@pytest.fixture(scope="module")
def folders(flux_folder, tmp_path_factory):
    schnell = tiny_pipelines.flux(tmp_path_factory.mktemp("schnell"), guidance_embeds=False)
    return {"dev": flux_folder, "schnell": schnell}


@pytest.fixture(scope="module")
def dev(folders):
    return [load(folders["dev"], fused=fused) for fused in (False, True)]


@pytest.fixture(scope="module")
def references(folders):
    return {name: quiet(KIND.from_pretrained(folder)) for name, folder in folders.items()}


def sampled(reference, noise, **options):
    """Latents (B, c, h, w) and images of the pipeline, which packs its latents by itself."""
    height, width = (2 * side for side in noise.shape[2:])
    call = partial(
        reference,
        PROMPTS,
        num_inference_steps=STEPS,
        latents=reference._pack_latents(noise, *noise.shape),
        height=height,
        width=width,
        **options,
    )
    latents = reference._unpack_latents(call(output_type="latent").images, height, width, 2)
    return latents, call(output_type="pt").images


def advanced(pipeline, noise, cfg_scale):
    """Latents of our sampler from given noise, the scale of guidance where the model takes it."""
    sampler = GuidedSampler(pipeline, steps=STEPS, cfg_scale=cfg_scale, compile=False)
    state = sampler.begin(LABELS, range(4))
    state.x.copy_(noise)
    return sampler.advance(state).x


@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_dev_takes_the_scale_of_guidance_as_an_input(scale, dev, references):
    """One prediction a step at any scale, on a grid that the image's length shifts."""
    noise = noise_for(dev[0])
    latents, images = sampled(references["dev"], noise, guidance_scale=scale)
    for pipeline in dev:  # plain, fused
        assert pipeline.denoiser.null_label is None
        got = advanced(pipeline, noise, scale)
        torch.testing.assert_close(got, latents, **CLOSE)
        torch.testing.assert_close(images_of(pipeline, got), images, **CLOSE)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_schnell_has_no_scale_and_takes_classifier_free_guidance(scale, folders, references):
    pipeline = load(folders["schnell"])
    noise = noise_for(pipeline)
    latents, images = sampled(
        references["schnell"],
        noise,
        true_cfg_scale=scale,
        negative_prompt=[""] * len(LABELS),
        max_sequence_length=256,
    )
    got = advanced(pipeline, noise, scale)
    torch.testing.assert_close(got, latents, **CLOSE)
    torch.testing.assert_close(images_of(pipeline, got), images, **CLOSE)


def test_an_image_that_is_no_square(folders, references):
    pipeline = load(folders["dev"], height=16, width=24)
    noise = noise_for(pipeline)
    assert noise.shape[2:] == (8, 12)
    assert pipeline.denoiser.image_tokens == 24
    latents, _ = sampled(references["dev"], noise, guidance_scale=2.0)
    torch.testing.assert_close(advanced(pipeline, noise, 2.0), latents, **CLOSE)
    expected = KIND._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
    assert torch.equal(positions(4, 6, like=noise), expected)
    with pytest.raises(InputError, match="width = 18: expected a multiple of 4"):
        load(folders["dev"], width=18)


def test_guidance_is_the_gradient_through_the_plain_modules(dev, references, learner):
    reference = references["dev"]
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    labels, t, scale = torch.tensor([0, 1, 2]), torch.tensor(400.0), torch.tensor(3.5)
    rows, pooled, places = reference.encode_prompt([TEMPLATE.format(name) for name in NAMES])
    leaf = x.clone().requires_grad_()
    made = reference.transformer(
        hidden_states=reference._pack_latents(leaf, *leaf.shape),
        timestep=t.expand(3) / 1000,
        guidance=scale.expand(3),
        pooled_projections=pooled,
        encoder_hidden_states=rows,
        txt_ids=places,
        img_ids=positions(4, 4, like=x),
    ).sample
    alpha, sigma = torch.tensor(0.6), torch.tensor(0.4)
    x0 = leaf - sigma * reference._unpack_latents(made, 16, 16, 2)
    log_p = learner(reference.vae.decode(x0 / 0.36 + 0.12).sample).log_softmax(1)
    (truth,) = torch.autograd.grad(-(log_p.exp() * log_p).sum(), leaf)
    for pipeline in dev:
        sampler = GuidedSampler(
            pipeline, learner, guidance=GuidanceConfig(omega=0.05), steps=2, compile=False
        )
        path = sampler.runner.parts.path
        gradient, _, _ = path.gradient(x, t, labels, alpha, sigma, scale=scale)
        assert float((gradient - truth).norm() / truth.norm()) < 1e-4


@pytest.mark.long
def test_a_step_with_its_gradient_is_one_graph(dev):
    is_one_graph(dev[0])


def test_samples_do_not_depend_on_their_batch(dev, learner):
    guidance = GuidanceConfig(omega=0.05, every=1)
    options = {"guidance": guidance, "steps": 3, "cfg_scale": 3.5, "compile": False}
    sampler = GuidedSampler(dev[1], learner, **options)
    together = sampler.generate(LABELS, [7, 8, 9, 10]).latents[2:3]
    alone = sampler.generate(LABELS[2:3], [9]).latents
    torch.testing.assert_close(together.float(), alone.float(), rtol=0, atol=2e-2)
    assert not torch.equal(sampler.generate(LABELS[2:3], [9], cfg_scale=1.0).latents, alone)


def test_weights_of_a_variant_in_shards(folders, tmp_path):
    half = KIND.from_pretrained(folders["dev"], **dtype_option(torch.float16))
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size="50KB")
    assert len(list((tmp_path / "transformer").glob("*.fp16*.safetensors"))) > 1
    pipeline = load(tmp_path, variant="fp16")
    whole = KIND.from_pretrained(tmp_path, variant="fp16", **dtype_option(torch.float32))
    noise = noise_for(pipeline)
    latents, _ = sampled(quiet(whole), noise, guidance_scale=3.5)
    torch.testing.assert_close(advanced(pipeline, noise, 3.5), latents, **CLOSE)


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer", "transformer"])
def test_a_part_that_is_missing_is_named(part, folders, tmp_path):
    shutil.copytree(folders["dev"], tmp_path / "copied", ignore=shutil.ignore_patterns(part))
    with pytest.raises(InputError, match=f"no part '{part}', which a FluxPipeline needs"):
        load(tmp_path / "copied")


def test_lora_weights_are_fused(folders, dev, tmp_path):
    name, generator = "transformer_blocks.0.attn.to_q", torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, 32), (32, 2)))
    file = tmp_path / "own.safetensors"
    factors = {"lora_A": down, "lora_B": up}
    save_file({f"transformer.{name}.{key}.weight": w for key, w in factors.items()}, file)
    plain = dev[0].denoiser
    changed = load(folders["dev"], lora=[f"{file}:0.5"]).denoiser
    weights = [each.model.get_submodule(name).weight for each in (changed, plain)]
    torch.testing.assert_close(weights[0], weights[1] + 0.5 * up @ down)


def test_what_the_models_do_not_take_is_refused(folders, tmp_path):
    with pytest.raises(InputError, match="negative_prompt: its model embeds the scale"):
        load(folders["dev"], negative_prompt="a dog")
    copied = shutil.copytree(folders["dev"], tmp_path / "copied")
    diffusers.DDIMScheduler().save_pretrained(copied / "scheduler")
    with pytest.raises(InputError, match="a FluxPipeline needs a flow-matching one"):
        load(copied)


@pytest.mark.parametrize(("name", "tokens"), [("dev", 512), ("schnell", 256)])
def test_a_plan_counts_what_torch_counts(name, tokens, folders, references):
    """But for what is done to the prompts alone, whose results are tables."""
    size = {"height": 16, "width": 16}
    planned = without_weights(folders[name], classes=3, dtype=torch.float16, **size)
    assert planned.denoiser.embeddings.dtype == torch.float16
    with torch.device("meta"), torch.no_grad():
        model = diffusers.FluxTransformer2DModel.from_config(references[name].transformer.config)
        rows, pooled, t = torch.zeros(2, tokens, 32), torch.zeros(2, 16), torch.tensor(500.0)
        with FlopCounterMode(display=False) as once:
            model.context_embedder(rows)
            model.time_text_embed.text_embedder(pooled)
        with FlopCounterMode(display=False) as counter:
            model(
                hidden_states=torch.zeros(2, 16, 16),
                timestep=t.expand(2),
                guidance=torch.ones(2) if name == "dev" else None,
                pooled_projections=pooled,
                encoder_hidden_states=rows,
                txt_ids=torch.zeros(tokens, 3),
                img_ids=torch.zeros(16, 3),
            )
        x, labels = torch.zeros(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64)
        work = count_work(lambda: planned.denoiser(x, t, labels))
    assert work.flops == counter.get_total_flops() - once.get_total_flops()
