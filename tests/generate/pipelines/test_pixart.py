"""PixArt-alpha and -Sigma against diffusers' pipelines."""

import json
import shutil
from functools import partial

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpfast.errors import InputError
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.pipelines import Pipeline
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
    noise_for,
    quiet,
    run,
)
from tests.tiny_pipelines import NAMES

PROMPTS = [TEMPLATE.format(NAMES[label]) for label in LABELS]
KINDS = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "dpmpp2m": (diffusers.DPMSolverMultistepScheduler, {}),
}
load = partial(Pipeline.from_pretrained, class_names=NAMES, prompt_template=TEMPLATE)


@pytest.fixture(scope="module")
def pipelines(pixart_folder):
    return [load(pixart_folder, fused=fused) for fused in (False, True)]


@pytest.fixture(scope="module")
def reference(pixart_folder):
    return quiet(diffusers.PixArtSigmaPipeline.from_pretrained(pixart_folder))


def sampled(reference, noise, cfg_scale, **options):
    return reference(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=cfg_scale,
        latents=noise,
        clean_caption=False,
        use_resolution_binning=False,
        **{"output_type": "latent", **options},
    ).images


@pytest.mark.parametrize("solver", KINDS)
@pytest.mark.parametrize("cfg_scale", [1.0, 4.5])
def test_latents_and_images_are_those_of_diffusers(cfg_scale, solver, pipelines, reference):
    kind, options = KINDS[solver]
    reference.scheduler = kind.from_config(reference.scheduler.config, **options)
    noise = noise_for(pipelines[0])
    latents = sampled(reference, noise, cfg_scale)
    images = sampled(reference, noise, cfg_scale, output_type="pt")
    for pipeline in pipelines:  # plain, fused
        got = run(pipeline, noise, cfg_scale, solver=solver)
        torch.testing.assert_close(got, latents, **CLOSE)
        torch.testing.assert_close(images_of(pipeline, got), images, **CLOSE)


def test_alpha_is_told_the_size_of_the_image(tmp_path, monkeypatch):
    """As at 1024 px, where alone diffusers gives it."""
    kind = diffusers.PixArtAlphaPipeline
    folder = tiny_pipelines.pixart(tmp_path, kind=kind, use_additional_conditions=True)
    pipeline, reference = load(folder, height=16, width=32), kind.from_pretrained(folder)
    noise, labels, t = noise_for(pipeline), torch.tensor(LABELS), torch.tensor(300)
    assert noise.shape[1:] == (4, 8, 16)
    rows, mask, *_ = reference.encode_prompt(PROMPTS, False)
    size = {
        "resolution": torch.tensor([[16.0, 32.0]]).repeat(4, 1),
        "aspect_ratio": torch.tensor([[0.5]]).repeat(4, 1),
    }
    with torch.no_grad():
        given = {"encoder_hidden_states": rows, "encoder_attention_mask": mask}
        expected = reference.transformer(
            noise, timestep=t.expand(4), added_cond_kwargs=size, **given
        ).sample[:, :4]
        torch.testing.assert_close(pipeline.denoiser(noise, t, labels), expected, **CLOSE)
        size["aspect_ratio"] *= 2
        other = reference.transformer(
            noise, timestep=t.expand(4), added_cond_kwargs=size, **given
        ).sample[:, :4]
        assert float((other - expected).abs().max()) > 1e-3


def test_padding_is_cut_off_and_masked(pipelines):
    """Of 300 tokens the prompts have up to 20; those of the empty one are 1 and padding."""
    denoiser = pipelines[0].denoiser
    tokens = denoiser.embeddings.shape[1]
    assert denoiser.embeddings.shape == (4, tokens, 24)
    assert tokens % 8 == 0
    assert tokens < 40
    assert denoiser.bias[-1, 0].tolist() == [0.0] + [-10000.0] * (tokens - 1)
    longer, t = load(pipelines[0].folder, class_names=(*NAMES, "cat" * 20)), torch.tensor(500)
    assert longer.denoiser.embeddings.shape[1] > tokens
    x, labels = noise_for(longer), torch.tensor([0, 2, 1, 0])
    with torch.no_grad():
        torch.testing.assert_close(longer.denoiser(x, t, labels), denoiser(x, t, labels))


def test_guidance_is_the_gradient_through_the_plain_modules(pipelines, reference, learner):
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    labels, t = torch.tensor([0, 1, 2]), torch.tensor(400)
    rows, mask, *_ = reference.encode_prompt([TEMPLATE.format(name) for name in NAMES], False)
    leaf = x.clone().requires_grad_()
    made = reference.transformer(
        leaf,
        rows,
        t.expand(3),
        {"resolution": None, "aspect_ratio": None},
        encoder_attention_mask=mask,
    ).sample[:, :4]
    alpha, sigma = torch.tensor(0.8), torch.tensor(0.6)
    images = reference.vae.decode((leaf - sigma * made) / alpha / 0.5).sample
    log_p = learner(images).log_softmax(1)
    (truth,) = torch.autograd.grad(-(log_p.exp() * log_p).sum(), leaf)
    for pipeline in pipelines:
        sampler = GuidedSampler(
            pipeline, learner, guidance=GuidanceConfig(omega=0.05), steps=2, compile=False
        )
        gradient, _, _ = sampler.runner.parts.path.gradient(x, t, labels, alpha, sigma)
        assert float((gradient - truth).norm() / truth.norm()) < 1e-4


def test_samples_do_not_depend_on_their_batch(pipelines, learner):
    guidance = GuidanceConfig(omega=0.05, every=1, anchor=0.5)
    options = {"guidance": guidance, "steps": 3, "cfg_scale": 3.0, "compile": False}
    sampler = GuidedSampler(pipelines[1], learner, **options)
    together = sampler.generate(LABELS, [7, 8, 9, 10]).latents[2:3]
    alone = sampler.generate(LABELS[2:3], [9]).latents
    torch.testing.assert_close(together.float(), alone.float(), rtol=0, atol=2e-2)


def test_weights_of_a_variant_in_shards(reference, tmp_path):
    diffusers.PixArtSigmaPipeline.from_pretrained(
        reference.config._name_or_path, **dtype_option(torch.float16)
    ).save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.fp16*.safetensors"))) > 1
    pipeline = load(tmp_path, variant="fp16")
    whole = quiet(
        diffusers.PixArtSigmaPipeline.from_pretrained(
            tmp_path, variant="fp16", **dtype_option(torch.float32)
        )
    )
    noise = noise_for(pipeline)
    got = run(pipeline, noise, 3.0, solver="dpmpp2m")
    torch.testing.assert_close(got, sampled(whole, noise, 3.0), **CLOSE)


def test_the_published_class_of_the_transformer(pixart_folder, pipelines, tmp_path):
    """Folders name Transformer2DModel, which the transformer was before it had a class."""
    folder = shutil.copytree(pixart_folder, tmp_path / "copied")
    former = {"_class_name": "Transformer2DModel", "double_self_attention": False}
    former |= {"only_cross_attention": False, "num_vector_embeds": None}
    for file, values in (
        (folder / "transformer" / "config.json", former),
        (folder / "model_index.json", {"transformer": ["diffusers", "Transformer2DModel"]}),
    ):
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    x, t, labels = noise_for(pipelines[0]), torch.tensor(400), torch.tensor(LABELS)
    with torch.no_grad():
        assert torch.equal(load(folder).denoiser(x, t, labels), pipelines[0].denoiser(x, t, labels))


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "transformer"])
def test_a_part_that_is_missing_is_named(part, pixart_folder, tmp_path):
    shutil.copytree(pixart_folder, tmp_path / "copied", ignore=shutil.ignore_patterns(part))
    with pytest.raises(InputError, match=f"no part '{part}', which a PixArtSigmaPipeline needs"):
        load(tmp_path / "copied")


def test_a_plan_counts_what_torch_counts(pixart_folder, reference):
    """But for the projection of the prompts, whose results are a table."""
    planned = without_weights(pixart_folder, classes=3, dtype=torch.float16)
    assert planned.denoiser.embeddings.dtype == torch.float16
    with torch.device("meta"), torch.no_grad():
        model = diffusers.PixArtTransformer2DModel.from_config(reference.transformer.config)
        rows, x, t = torch.zeros(2, 300, 32), torch.zeros(2, 4, 8, 8), torch.tensor(500)
        with FlopCounterMode(display=False) as once:
            model.caption_projection(rows)
        with FlopCounterMode(display=False) as counter:
            model(
                x,
                rows,
                t.expand(2),
                {"resolution": None, "aspect_ratio": None},
                encoder_attention_mask=torch.ones(2, 300),
            )
        labels = torch.zeros(2, dtype=torch.int64)
        work = count_work(lambda: planned.denoiser(x, t, labels))
    assert work.flops == counter.get_total_flops() - once.get_total_flops()
