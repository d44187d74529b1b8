"""SANA against diffusers' pipeline, and its autoencoder against diffusers' own."""

import shutil
from functools import partial

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpfast.errors import InputError
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.models.decoder import DeepCompressionDecoder, times_a_tiny_one
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.pipelines.families.sana import instruction
from dpfast.generate.pipelines.folder import dtype_option
from dpfast.generate.pipelines.prompts import without_padding
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
    run,
)
from tests.tiny_pipelines import NAMES

PROMPTS = [TEMPLATE.format(NAMES[label]) for label in LABELS]
KIND = diffusers.SanaPipeline
SMALL = {"height": 16, "width": 16}  # SanaPipeline itself wants multiples of 32
SOLVERS = {
    "dpmpp2m": None,
    "euler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}
load = partial(Pipeline.from_pretrained, class_names=NAMES, prompt_template=TEMPLATE)


@pytest.fixture(scope="module")
def pipelines(sana_folder):
    return [load(sana_folder, fused=fused) for fused in (False, True)]


@pytest.fixture(scope="module")
def small(sana_folder):
    return load(sana_folder, **SMALL)


@pytest.fixture(scope="module")
def reference(sana_folder):
    return quiet(KIND.from_pretrained(sana_folder))


def sampled(reference, noise, cfg_scale, **options):
    return reference(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=cfg_scale,
        latents=noise,
        height=32,
        width=32,
        use_resolution_binning=False,
        **{"output_type": "latent", **options},
    ).images


@pytest.mark.parametrize(
    ("solver", "cfg_scale"), [("dpmpp2m", 1.0), ("dpmpp2m", 4.5), ("euler", 4.5)]
)
def test_latents_and_images_are_those_of_diffusers(solver, cfg_scale, pipelines, reference):
    published = reference.scheduler
    reference.scheduler = SOLVERS[solver] or published
    noise = noise_for(pipelines[0])
    latents = sampled(reference, noise, cfg_scale)
    images = sampled(reference, noise, cfg_scale, output_type="pt")
    reference.scheduler = published
    for pipeline in pipelines:  # plain, fused
        got = run(pipeline, noise, cfg_scale, solver=solver)
        torch.testing.assert_close(got, latents, **CLOSE)
        torch.testing.assert_close(images_of(pipeline, got), images, **CLOSE)
    assert torch.equal(pipelines[0].table(5).rows, pipelines[0].table(5, solver="dpmpp2m").rows)


def test_the_autoencoder_encodes_what_it_decodes(pipelines, reference):
    decoder = pipelines[0].decoder
    assert isinstance(decoder, DeepCompressionDecoder)
    images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = reference.vae.encode(images).latent * 0.4
        torch.testing.assert_close(decoder.encode(images), expected)
    assert times_a_tiny_one(decoder, (4, 8, 8)) < 1  # of 8 and 16 channels; the tiny one has 64


def test_prompts_end_where_the_longest_does(small):
    """A letter is a token; the beginning and the end of the instruction come before. The empty one
    has no instruction. Where a prompt has no token at all it sees its padding.
    """
    rows, bias = small.denoiser.embeddings, small.denoiser.bias
    assert rows.shape == (4, 32, 16)
    assert (bias == 0).sum(2).flatten().tolist() == [22, 22, 30, 1]
    embeddings, mask = torch.randn(2, 40, 3), torch.zeros(2, 40)
    mask[0, :9] = 1
    assert without_padding(embeddings, mask)[0].shape[1] == 40
    mask[1, :1] = 1
    shorter, bias = without_padding(embeddings, mask)
    assert torch.equal(shorter, embeddings[:, :16])
    assert (bias[:, 0] == 0).sum(1).tolist() == [9, 1]


def test_guidance_is_the_gradient_through_the_plain_modules(sana_folder, reference, learner):
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    labels, t = torch.tensor([0, 1, 2]), torch.tensor(400)
    rows, mask, *_ = reference.encode_prompt(
        [TEMPLATE.format(name) for name in NAMES], False, complex_human_instruction=instruction()
    )
    leaf = x.clone().requires_grad_()
    made = reference.transformer(
        leaf, encoder_hidden_states=rows, encoder_attention_mask=mask, timestep=t.expand(3)
    ).sample
    alpha, sigma = torch.tensor(0.6), torch.tensor(0.4)
    log_p = learner(reference.vae.decode((leaf - sigma * made) / 0.4).sample).log_softmax(1)
    (truth,) = torch.autograd.grad(-(log_p.exp() * log_p).sum(), leaf)
    for fused in (False, True):
        sampler = GuidedSampler(
            load(sana_folder, fused=fused, **SMALL),
            learner,
            guidance=GuidanceConfig(omega=0.05),
            steps=2,
            compile=False,
        )
        gradient, _, _ = sampler.runner.parts.path.gradient(x, t, labels, alpha, sigma)
        assert float((gradient - truth).norm() / truth.norm()) < 1e-4


@pytest.mark.long
def test_a_step_with_its_gradient_is_one_graph(small):
    is_one_graph(small)


def test_samples_do_not_depend_on_their_batch(small, learner):
    guidance = GuidanceConfig(omega=0.05, every=1, anchor=0.5)
    options = {"guidance": guidance, "steps": 3, "cfg_scale": 3.0, "compile": False}
    sampler = GuidedSampler(small, learner, **options)
    together = sampler.generate(LABELS, [7, 8, 9, 10]).latents[2:3]
    alone = sampler.generate(LABELS[2:3], [9]).latents
    torch.testing.assert_close(together.float(), alone.float(), rtol=0, atol=2e-2)


def test_weights_of_a_variant_in_shards(sana_folder, tmp_path):
    half = KIND.from_pretrained(sana_folder, **dtype_option(torch.float16))
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.fp16*.safetensors"))) > 1
    pipeline = load(tmp_path, variant="fp16")
    whole = KIND.from_pretrained(tmp_path, variant="fp16", **dtype_option(torch.float32))
    noise = noise_for(pipeline)
    expected = sampled(quiet(whole), noise, 3.0)
    torch.testing.assert_close(run(pipeline, noise, 3.0), expected, **CLOSE)


@pytest.mark.parametrize("part", ["text_encoder", "vae", "transformer"])
def test_a_part_that_is_missing_is_named(part, sana_folder, tmp_path):
    shutil.copytree(sana_folder, tmp_path / "copied", ignore=shutil.ignore_patterns(part))
    with pytest.raises(InputError, match=f"no part '{part}', which a SanaPipeline needs"):
        load(tmp_path / "copied")


def test_a_transformer_of_1_5_norms_queries_and_keys(tmp_path):
    folder = tiny_pipelines.sana(tmp_path, qk_norm="rms_norm_across_heads", timestep_scale=0.5)
    pipeline, reference = load(folder), KIND.from_pretrained(folder)
    noise = noise_for(pipeline)
    expected = sampled(quiet(reference), noise, 3.0)
    torch.testing.assert_close(run(pipeline, noise, 3.0), expected, **CLOSE)


def test_a_sprint_is_refused(tmp_path):
    folder = tiny_pipelines.sana(tmp_path, guidance_embeds=True)
    with pytest.raises(InputError, match="guidance_embeds = True, as SANA-Sprint has it"):
        load(folder)


def test_a_plan_counts_what_torch_counts(sana_folder, reference):
    """But for the projection of the prompts, whose results are a table."""
    planned = without_weights(sana_folder, classes=3, dtype=torch.bfloat16, **SMALL)
    with torch.device("meta"), torch.no_grad():
        model = diffusers.SanaTransformer2DModel.from_config(reference.transformer.config)
        rows, x, t = torch.zeros(2, 300, 32), torch.zeros(2, 4, 8, 8), torch.tensor(500)
        with FlopCounterMode(display=False) as once:
            model.caption_projection(rows)
        with FlopCounterMode(display=False) as counter:
            model(x, rows, t.expand(2), encoder_attention_mask=torch.ones(2, 300))
        labels = torch.zeros(2, dtype=torch.int64)
        work = count_work(lambda: planned.denoiser(x, t, labels))
    assert work.flops == counter.get_total_flops() - once.get_total_flops()
