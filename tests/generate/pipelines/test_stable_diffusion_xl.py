"""Stable Diffusion XL and what was distilled from it, or from 1.x, against diffusers' pipelines."""

import copy
import gc
import json
import shutil
from functools import partial

import diffusers
import pytest
import torch
import transformers
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm
from torch.utils.flop_counter import FlopCounterMode

from dpfast.errors import InputError
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.pipelines.folder import dtype_option
from dpfast.generate.sampler import GuidedSampler
from dpfast.hardware.flops import count_work
from dpfast.ops import normal
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
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
KINDS = {
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "dpmpp2m": (diffusers.DPMSolverMultistepScheduler, {}),
}


load = partial(Pipeline.from_pretrained, class_names=NAMES, prompt_template=TEMPLATE)


def reference_of(folder, kind=diffusers.StableDiffusionXLPipeline, **options):
    return quiet(kind.from_pretrained(folder, **options))


@pytest.fixture(scope="module")
def reference(stable_diffusion_xl_folder):
    return reference_of(stable_diffusion_xl_folder, add_watermarker=False)


@pytest.fixture(scope="module")
def pipelines(stable_diffusion_xl_folder):
    return [load(stable_diffusion_xl_folder, fused=fused) for fused in (False, True)]


@pytest.fixture
def copied(stable_diffusion_xl_folder, tmp_path):
    return shutil.copytree(stable_diffusion_xl_folder, tmp_path / "copied")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("solver", KINDS)
@pytest.mark.parametrize("cfg_scale", [1.0, 5.0])
def test_latents_and_images_are_those_of_diffusers(cfg_scale, solver, pipelines, reference):
    kind, options = KINDS[solver]
    reference.scheduler = kind.from_config(reference.scheduler.config, **options)
    noise = noise_for(pipelines[0])
    call = partial(
        reference, PROMPTS, num_inference_steps=STEPS, guidance_scale=cfg_scale, latents=noise
    )
    latents, images = call(output_type="latent").images, call(output_type="pt").images
    for pipeline in pipelines:  # plain, fused
        got = run(pipeline, noise, cfg_scale, solver=solver)
        torch.testing.assert_close(got, latents, **CLOSE)
        torch.testing.assert_close(images_of(pipeline, got), images, **CLOSE)


def test_the_conditions_of_a_fused_model_are_made_once(pipelines):
    """22 products of the time in one, 5 of the text in one: what a prompt adds to it is a table."""
    plain, fused = (pipeline.denoiser for pipeline in pipelines)
    x, t = torch.zeros(2, *plain.sample_shape), torch.tensor(500)
    labels = torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        work = [count_work(lambda d=d: d(x, t, labels)).flops for d in (plain, fused)]
    assert work[1] == work[0]
    assert fused.added.shape == (len(NAMES) + 1, 32)
    assert not fused.whole_timesteps


def test_the_empty_prompt_is_one_where_the_folder_says_so(copied):
    edit(copied / "model_index.json", force_zeros_for_empty_prompt=False)
    pipeline = load(copied)
    noise = noise_for(pipeline)
    assert bool(pipeline.denoiser.embeddings[-1].any())
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "latents": noise}
    expected = reference_of(copied)(PROMPTS, output_type="latent", **arguments).images
    torch.testing.assert_close(run(pipeline, noise, 3.0, solver="euler"), expected, **CLOSE)
    edit(copied / "model_index.json", force_zeros_for_empty_prompt="yes")
    with pytest.raises(InputError, match="force_zeros_for_empty_prompt = 'yes': expected true"):
        load(copied)


def test_the_text_encoders_are_let_go_of(stable_diffusion_xl_folder):
    kinds = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)

    def alive():
        return sum(type(each) in kinds for each in gc.get_objects())

    before = alive()
    pipeline = load(stable_diffusion_xl_folder)
    assert alive() == before
    assert pipeline.denoiser.embeddings.shape == (4, 16, 40)


def test_the_decoder_runs_in_float32(stable_diffusion_xl_folder):
    half = load(stable_diffusion_xl_folder, dtype="float16")
    assert (half.denoiser.dtype, half.decoder.dtype) == (torch.float16, torch.float32)


def test_weights_in_shards_are_the_same(copied, pipelines):
    unet = diffusers.UNet2DConditionModel.from_pretrained(copied / "unet")
    shutil.rmtree(copied / "unet")
    unet.save_pretrained(copied / "unet", max_shard_size="40KB")
    assert len(list((copied / "unet").glob("*.safetensors"))) > 1
    x, t, labels = noise_for(pipelines[0]), torch.tensor(400), torch.tensor(LABELS)
    with torch.no_grad():
        assert torch.equal(load(copied).denoiser(x, t, labels), pipelines[0].denoiser(x, t, labels))


def test_weights_of_the_variant_fp16(reference, tmp_path):
    """Saved in 16 bits, and read as such by both."""
    half = diffusers.StableDiffusionXLPipeline(
        **{name: copy.deepcopy(part) for name, part in reference.components.items()},
        add_watermarker=False,
    )
    half.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    pipeline = load(tmp_path, variant="fp16")
    noise = noise_for(pipeline)
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "latents": noise}
    whole = reference_of(tmp_path, variant="fp16", **dtype_option(torch.float32))
    whole.scheduler = diffusers.DDIMScheduler.from_config(whole.scheduler.config, clip_sample=False)
    expected = whole(PROMPTS, output_type="latent", **arguments).images
    torch.testing.assert_close(run(pipeline, noise, 3.0, solver="ddim"), expected, **CLOSE)
    with pytest.raises(InputError, match="say --variant fp16"):
        load(tmp_path)


def test_the_sizes_that_a_model_is_told_are_those_of_the_images(
    stable_diffusion_xl_folder, reference
):
    pipeline = load(stable_diffusion_xl_folder, height=24, width=16)
    assert pipeline.denoiser.sample_shape == (4, 12, 8)
    reference.scheduler = diffusers.EulerDiscreteScheduler.from_config(reference.scheduler.config)
    noise = noise_for(pipeline)
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "latents": noise}
    expected = reference(PROMPTS, height=24, width=16, output_type="latent", **arguments).images
    torch.testing.assert_close(run(pipeline, noise, solver="euler"), expected, **CLOSE)


def test_a_negative_prompt_stands_in_the_place_of_zeros(stable_diffusion_xl_folder, reference):
    pipeline = load(stable_diffusion_xl_folder, negative_prompt="a dog")
    reference.scheduler = diffusers.EulerDiscreteScheduler.from_config(reference.scheduler.config)
    noise = noise_for(pipeline)
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "latents": noise}
    negative = ["a dog"] * len(PROMPTS)
    expected = reference(PROMPTS, negative_prompt=negative, output_type="latent", **arguments)
    got = run(pipeline, noise, 3.0, solver="euler")
    torch.testing.assert_close(got, expected.images, **CLOSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"addition_embed_type": None}, "'unet' has addition_embed_type = None; expected 'text_"),
        ({"addition_time_embed_dim": 5}, "'unet' takes 48 numbers of prompt and sizes .* give 54"),
    ],
)
def test_a_unet_of_other_conditions_is_refused(changes, message, copied):
    edit(copied / "unet" / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        load(copied)


def test_samples_do_not_depend_on_their_batch(pipelines, learner):
    sampler = GuidedSampler(
        pipelines[1],
        learner,
        guidance=GuidanceConfig(omega=0.05, every=1, anchor=0.5),
        steps=3,
        solver="euler",
        cfg_scale=3.0,
        compile=False,
    )
    together = sampler.generate(LABELS, [7, 8, 9, 10])
    alone = sampler.generate(LABELS[2:3], [9])
    torch.testing.assert_close(
        together.latents[2:3].float(), alone.latents.float(), rtol=0, atol=2e-2
    )
    other = sampler.generate(LABELS[2:3], [9], anchor=0.0)
    assert not torch.equal(other.images, alone.images)


@pytest.mark.parametrize("steps", [1, 3])
def test_turbo(steps, tmp_path, monkeypatch):
    """An ancestral scheduler with trailing timesteps: "auto" takes its noise, and cfg_scale = 1."""
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    folder = tiny_pipelines.stable_diffusion_xl(tmp_path, scheduler)
    pipeline = load(folder)
    sampler = GuidedSampler(pipeline, steps=steps, cfg_scale=1.0, compile=False)
    ids, shape = torch.tensor([5, 0, 2, 1 << 40]), pipeline.denoiser.sample_shape
    streams = iter(range(1, 9))
    monkeypatch.setattr(
        scheduling_euler_ancestral_discrete,
        "randn_tensor",
        lambda *_, **__: normal(ids, shape, seed=0, stream=next(streams)),
    )
    expected = reference_of(folder)(
        PROMPTS,
        guidance_scale=0.0,
        num_inference_steps=steps,
        latents=normal(ids, shape, seed=0, stream=0),
        output_type="latent",
    ).images
    torch.testing.assert_close(sampler.advance(sampler.begin(LABELS, ids)).x, expected, **CLOSE)


@pytest.mark.parametrize(
    ("kind", "fused"),
    [
        ("LatentConsistencyModelPipeline", False),
        ("LatentConsistencyModelPipeline", True),
        ("StableDiffusionXLPipeline", True),
    ],
)
def test_a_model_that_embeds_the_scale_of_guidance(kind, fused, tmp_path, monkeypatch):
    make = tiny_pipelines.stable_diffusion
    make = tiny_pipelines.stable_diffusion_xl if "XL" in kind else make
    folder = make(tmp_path, diffusers.LCMScheduler(**BETAS), time_cond_proj_dim=9)
    edit(folder / "model_index.json", _class_name=kind)
    pipeline = load(folder, fused=fused)
    denoiser, shape = pipeline.denoiser, pipeline.denoiser.sample_shape
    assert denoiser.null_label is None
    sampler = GuidedSampler(pipeline, steps=2, cfg_scale=4.0, compile=False)
    assert not any(variant.cfg for variant in sampler.variants(guided=True))
    ids, streams = torch.tensor([5, 0, 2, 1 << 40]), iter(range(1, 99))
    monkeypatch.setattr(
        scheduling_lcm,
        "randn_tensor",
        lambda *_, **__: normal(ids, shape, seed=0, stream=next(streams)),
    )
    reference, found = reference_of(folder, getattr(diffusers, kind)), []
    for scale in (4.0, 1.5):
        streams = iter(range(1, 99))
        found.append(
            reference(
                PROMPTS,
                guidance_scale=scale,
                num_inference_steps=2,
                latents=normal(ids, shape, seed=0, stream=0),
                output_type="latent",
            ).images
        )
        begun = sampler.begin(LABELS, ids, cfg_scale=scale)
        torch.testing.assert_close(sampler.advance(begun).x, found[-1], **CLOSE)
    assert float((found[0] - found[1]).abs().max()) > 1e-2


def test_guidance_sees_the_scale_that_is_embedded(tmp_path, learner, caplog):
    folder = tiny_pipelines.stable_diffusion(
        tmp_path, diffusers.LCMScheduler(**BETAS), time_cond_proj_dim=8
    )
    pipeline = load(folder)
    options = {"steps": 2, "compile": False, "cfg_scale": 3.0}
    guided = partial(GuidanceConfig, omega=0.05, every=1)
    sampler = GuidedSampler(pipeline, learner, guidance=guided(), **options)
    bounded = GuidedSampler(pipeline, learner, guidance=guided(), memory_budget=1 << 30, **options)
    images = sampler.generate(LABELS).latents
    torch.testing.assert_close(bounded.generate(LABELS).latents, images, rtol=0, atol=2e-2)
    x, labels = torch.randn(3, *pipeline.denoiser.sample_shape), torch.tensor([0, 1, 2])
    alpha, sigma = sampler.table.rows[0, :2]
    path, t = sampler.runner.parts.path, sampler.table.timesteps[0]
    at = partial(path.gradient, x, t, labels, alpha, sigma)
    assert torch.equal(at(scale=torch.tensor(1.0))[1], at()[1])
    gradient, prediction, _ = at(scale=torch.tensor(3.0))
    assert float((prediction - at()[1]).abs().max()) > 1e-3
    leaf = x.clone().requires_grad_()
    made = pipeline.denoiser(leaf, t, labels, torch.tensor(3.0))
    log_p = learner(pipeline.guidance_decoder((leaf - sigma * made) / alpha)).log_softmax(1)
    (truth,) = torch.autograd.grad(-(log_p.exp() * log_p).sum(), leaf)
    assert float((gradient - truth).norm() / truth.norm()) < 1e-4
    anchored = GuidedSampler(pipeline, learner, guidance=guided(anchor=0.5), **options)
    with pytest.raises(InputError, match="embeds cfg_scale and makes one; expected 0"):
        anchored.generate([0])
    idle = GuidedSampler(pipeline, cfg_interval=(0.0, 0.5), **options)
    idle.generate([0])
    assert "cfg_interval = (0, 0.5) has no effect: the generator of" in caplog.text


def test_a_plan_counts_what_torch_counts(stable_diffusion_xl_folder, reference, pipelines):
    """But for the layers behind the pooled embedding, whose results are a table."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet = diffusers.UNet2DConditionModel.from_config(reference.unet.config)
        unet(
            torch.zeros(2, 4, 8, 8),
            torch.tensor(500),
            encoder_hidden_states=torch.zeros(2, 16, 40),
            added_cond_kwargs={"text_embeds": torch.zeros(2, 24), "time_ids": torch.zeros(2, 6)},
        )
    tabulated = 2 * 2 * sum(w.numel() for w in unet.add_embedding.parameters() if w.dim() == 2)
    planned = without_weights(stable_diffusion_xl_folder, classes=3, dtype=torch.float16)
    assert planned.denoiser.embeddings.shape == pipelines[0].denoiser.embeddings.shape
    assert (planned.denoiser.dtype, planned.decoder.dtype) == (torch.float16, torch.float32)
    with torch.device("meta"), torch.no_grad():
        x, t = torch.zeros(2, 4, 8, 8), torch.tensor(500)
        labels = torch.zeros(2, dtype=torch.int64)
        work = count_work(lambda: planned.denoiser(x, t, labels))
    assert work.flops == counter.get_total_flops() - tabulated
