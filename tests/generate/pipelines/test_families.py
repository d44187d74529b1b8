"""Each family against the diffusers pipeline that saved it: same folder, same initial noise, same
images.

The update is ``guided_step`` over ``Pipeline.table``, without the sampler around it.
"""

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_lcm, scheduling_tcd
from diffusers.utils.torch_utils import randn_tensor

from dpfast.generate.guidance import GuidancePath, predict_x0
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from dpfast.ops import guided_step, normal
from tests import tiny_pipelines
from tests.tiny_pipelines import NAMES

TEMPLATE = "a red photo of a {}"
LABELS = [0, 2, 1, 2]
STEPS = 6
CLOSE = {"rtol": 0, "atol": 1e-4}  # worst: 1.2e-5 on latents of up to 25, 8e-7 on images


def noise_for(pipeline, seed=3):
    shape = (len(LABELS), *pipeline.denoiser.sample_shape)
    return randn_tensor(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(pipeline, noise, cfg_scale=1.0, **options):
    """Final latents of unguided sampling."""
    denoiser, table = pipeline.denoiser, pipeline.table(STEPS, **options)
    labels = torch.tensor(LABELS)
    x, x0 = noise * table.initial_scale, torch.zeros_like(noise)
    for step, t in enumerate(table.timesteps):
        empty = (
            denoiser(x, t, torch.full_like(labels, denoiser.null_label)) if cfg_scale != 1 else None
        )
        x0_prev, x0 = x0, torch.empty_like(x)
        x = guided_step(
            x,
            denoiser(x, t, labels),
            empty,
            None,
            table.rows,
            step,
            cfg_scale=cfg_scale,
            omega=0.0,
            prediction=denoiser.prediction,
            clip=table.clip,
            x0_prev=x0_prev,
            x0_out=x0,
        )
    return x


def images_of(pipeline, latents):
    with torch.no_grad():
        return pipeline.decoder(latents).div(2).add(0.5).clamp(0, 1)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("learned_sigma", [False, True])
def test_dit(learned_sigma, cfg_scale, tmp_path):
    folder = tiny_pipelines.dit(tmp_path, learned_sigma=learned_sigma, tiny=False)
    pipeline = Pipeline.from_pretrained(folder)
    reference = quiet(diffusers.DiTPipeline.from_pretrained(folder))
    expected = reference(
        LABELS,
        cfg_scale,
        torch.Generator().manual_seed(3),
        num_inference_steps=STEPS,
        output_type="pt",
    ).images
    got = images_of(pipeline, run(pipeline, noise_for(pipeline), cfg_scale))
    torch.testing.assert_close(got, expected, **CLOSE)


@torch.no_grad()
def test_dit_of_a_flow(tmp_path):
    """As SiT and REPA train it: the same network of a velocity. diffusers' pipeline does not run
    on such a scheduler: the model and the scheduler's steps, between the trained timesteps.
    """
    folder = tiny_pipelines.dit(tmp_path, learned_sigma=True, tiny=False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.5)
    scheduler.save_pretrained(folder / "scheduler")
    model = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    pipelines = [Pipeline.from_pretrained(folder, fused=fused) for fused in (False, True)]
    for cfg_scale in (1.0, 3.0):
        scheduler.set_timesteps(STEPS)
        x = noise = noise_for(pipelines[0])
        for t in scheduler.timesteps:
            v, empty = (
                model(x, timestep=t.expand(4), class_labels=torch.tensor(ids)).sample[:, :4]
                for ids in (LABELS, [1000] * 4)
            )
            x = scheduler.step(empty + cfg_scale * (v - empty), t, x).prev_sample
        for pipeline in pipelines:
            torch.testing.assert_close(run(pipeline, noise, cfg_scale), x, **CLOSE)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp2m"])
@pytest.mark.parametrize("cfg_scale", [1.0, 5.0])
def test_stable_diffusion(cfg_scale, solver, stable_diffusion_folder):
    pipeline = Pipeline.from_pretrained(
        stable_diffusion_folder, class_names=NAMES, prompt_template=TEMPLATE
    )
    reference = quiet(diffusers.StableDiffusionPipeline.from_pretrained(stable_diffusion_folder))
    if solver == "ddim":
        kind, options = diffusers.DDIMScheduler, {"clip_sample": False}
    else:
        kind, options = diffusers.DPMSolverMultistepScheduler, {}
    reference.scheduler = kind.from_config(reference.scheduler.config, **options)
    noise, prompts = noise_for(pipeline), [TEMPLATE.format(NAMES[label]) for label in LABELS]
    arguments = {"num_inference_steps": STEPS, "guidance_scale": cfg_scale, "latents": noise}
    got = run(pipeline, noise, cfg_scale, solver=solver)
    torch.testing.assert_close(
        got, reference(prompts, output_type="latent", **arguments).images, **CLOSE
    )
    expected = reference(prompts, output_type="pt", **arguments).images
    torch.testing.assert_close(images_of(pipeline, got), expected, **CLOSE)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_stable_diffusion_2(prediction, tmp_path):
    """What differs from 1.x: linear projections, heads by level, an encoder with GELU, and
    v-prediction at 768 px.
    """
    betas = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    folder = tiny_pipelines.stable_diffusion(
        tmp_path,
        diffusers.DDIMScheduler(
            **betas, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction
        ),
        {"hidden_act": "gelu"},
        attention_head_dim=[1, 2],
        use_linear_projection=True,
        upcast_attention=True,
    )
    pipeline = Pipeline.from_pretrained(folder, class_names=NAMES, prompt_template=TEMPLATE)
    noise, prompts = noise_for(pipeline), [TEMPLATE.format(NAMES[label]) for label in LABELS]
    reference = quiet(diffusers.StableDiffusionPipeline.from_pretrained(folder))
    arguments = {
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "latents": noise,
        "output_type": "latent",
    }
    got = run(pipeline, noise, 3.0, solver="ddim")
    torch.testing.assert_close(got, reference(prompts, **arguments).images, **CLOSE)


@pytest.mark.parametrize(
    ("module", "kind", "options"),
    [
        (scheduling_lcm, diffusers.LCMScheduler, {}),
        (scheduling_tcd, diffusers.TCDScheduler, {"eta": 0.3}),
    ],
    ids=["lcm", "tcd"],
)
def test_distilled_stable_diffusion(module, kind, options, tmp_path, monkeypatch):
    """As a folder with fused LCM or TCD weights is saved: the sampler takes its solver, noise and
    four steps.
    """
    betas = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    folder = tiny_pipelines.stable_diffusion(tmp_path, scheduler=kind(**betas))
    pipeline = Pipeline.from_pretrained(folder, class_names=NAMES, prompt_template=TEMPLATE)
    sampler = GuidedSampler(pipeline, steps=4, cfg_scale=1.0, compile=False, **options)
    ids, streams, shape = (
        torch.tensor([5, 0, 2, 1 << 40]),
        iter(range(1, 9)),
        pipeline.denoiser.sample_shape,
    )
    monkeypatch.setattr(
        module, "randn_tensor", lambda *_, **__: normal(ids, shape, seed=0, stream=next(streams))
    )
    expected = quiet(diffusers.StableDiffusionPipeline.from_pretrained(folder))(
        [TEMPLATE.format(NAMES[label]) for label in LABELS],
        guidance_scale=1.0,
        num_inference_steps=4,
        latents=normal(ids, shape, seed=0, stream=0),
        output_type="latent",
        **options,
    ).images
    assert next(streams) == 4  # noise in all steps but the last
    torch.testing.assert_close(sampler.advance(sampler.begin(LABELS, ids)).x, expected, **CLOSE)


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
@pytest.mark.parametrize(
    ("t5", "scheduler"),
    [(True, {}), (False, {"use_dynamic_shifting": True, "base_shift": 0.7, "shift": 1.0})],
    ids=["t5", "clip-only-dynamic-shift"],
)
def test_stable_diffusion_3(t5, scheduler, cfg_scale, tmp_path):
    folder = tiny_pipelines.stable_diffusion_3(tmp_path, t5=t5, **scheduler)
    pipeline = Pipeline.from_pretrained(folder, class_names=NAMES, prompt_template=TEMPLATE)
    missing = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    reference = quiet(diffusers.StableDiffusion3Pipeline.from_pretrained(folder, **missing))
    noise, prompts = noise_for(pipeline), [TEMPLATE.format(NAMES[label]) for label in LABELS]
    arguments = {"num_inference_steps": STEPS, "guidance_scale": cfg_scale, "latents": noise}
    got = run(pipeline, noise, cfg_scale)
    torch.testing.assert_close(
        got, reference(prompts, output_type="latent", **arguments).images, **CLOSE
    )
    expected = reference(prompts, output_type="pt", **arguments).images
    torch.testing.assert_close(images_of(pipeline, got), expected, **CLOSE)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(),
        diffusers.DDPMScheduler(clip_sample_range=0.5, prediction_type="sample"),
        diffusers.PNDMScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_unconditional_pixels(scheduler, tmp_path):
    """DDIMPipeline takes whatever scheduler its folder has as a DDIMScheduler, and so does the
    table.
    """
    folder = tiny_pipelines.pixel(tmp_path, scheduler=scheduler, kind=diffusers.DDPMPipeline)
    pipeline = Pipeline.from_pretrained(folder)
    reference = quiet(diffusers.DDIMPipeline.from_pretrained(folder))
    expected = reference(
        len(LABELS), torch.Generator().manual_seed(3), num_inference_steps=STEPS, output_type="np"
    ).images
    got = images_of(pipeline, run(pipeline, noise_for(pipeline)))
    torch.testing.assert_close(got.permute(0, 2, 3, 1), torch.from_numpy(expected), **CLOSE)
    assert pipeline.class_names == ("unconditional",)
    assert pipeline.denoiser.null_label is None
    assert Pipeline.from_pretrained(folder, class_names=NAMES).denoiser.classes == 3


@torch.no_grad()
def test_class_conditional_pixels(tmp_path):
    """diffusers has no pipeline for it: the model and the scheduler's steps, with the last
    embedding as null class.
    """
    folder = tiny_pipelines.pixel(tmp_path, class_embeddings=4)
    pipeline = Pipeline.from_pretrained(folder, class_names=NAMES)
    assert pipeline.denoiser.null_label == 3
    model, scheduler = (
        diffusers.UNet2DModel.from_pretrained(folder / "unet").eval(),
        diffusers.DDIMScheduler(),
    )
    scheduler.set_timesteps(STEPS)
    x = noise = noise_for(pipeline)
    for t in scheduler.timesteps:
        conditional = model(x, t, torch.tensor(LABELS)).sample
        empty = model(x, t, torch.full((4,), 3)).sample
        x = scheduler.step(empty + 2.0 * (conditional - empty), t, x).prev_sample
    torch.testing.assert_close(run(pipeline, noise, 2.0), x, **CLOSE)
    without = Pipeline.from_pretrained(folder)
    assert (without.denoiser.classes, without.denoiser.null_label) == (4, None)


FOLDERS = [
    "pipeline_folder",
    "stable_diffusion_folder",
    "stable_diffusion_xl_folder",
    "stable_diffusion_3_folder",
    "pixart_folder",
    "pixel_folder",
]


@pytest.mark.parametrize("folder", FOLDERS)
def test_labels_are_read_row_by_row(folder, request):
    """The condition of row i is label i, and a text family's null row is not one of its classes."""
    pipeline = Pipeline.from_pretrained(request.getfixturevalue(folder), class_names=NAMES)
    denoiser, x = pipeline.denoiser, noise_for(pipeline)
    t = pipeline.table(STEPS).timesteps[1]
    together = denoiser(x, t, torch.tensor(LABELS))
    for row, label in enumerate(LABELS):
        alone = denoiser(x[row : row + 1], t, torch.tensor([label]))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    if denoiser.null_label is not None:
        assert denoiser.null_label >= denoiser.classes
        ids = [0, 1, 2, denoiser.null_label]
        rows = denoiser(x[:1].expand(4, -1, -1, -1), t, torch.tensor(ids)).flatten(1)
        assert float(torch.pdist(rows).min()) > 1e-3


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_step_with_its_gradient_is_one_graph(folder, request):
    is_one_graph(Pipeline.from_pretrained(request.getfixturevalue(folder), class_names=NAMES))


def is_one_graph(pipeline):
    """fullgraph=True raises at a graph break; one compilation serves every timestep and every
    label.
    """
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def step(x, t, labels):
        def image(x):
            prediction = pipeline.denoiser(x, t, labels)
            return pipeline.guidance_decoder(x - prediction), prediction

        images, backward, prediction = torch.func.vjp(image, x, has_aux=True)
        return backward(images.cos())[0], prediction

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    table, noise = pipeline.table(STEPS), noise_for(pipeline)
    with torch.no_grad():
        for index in (0, 3, 5):
            labels = torch.tensor([index % 3, 1, 2, 0])
            got = compiled(noise, table.timesteps[index], labels)
            expected = step(noise, table.timesteps[index], labels)
            for ours, plain in zip(got, expected, strict=True):
                torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    assert not {node.target for node in graphs[0].graph.nodes} & {
        "item",
        "tolist",
        "nonzero",
        "cpu",
        "numpy",
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_half_precision_keeps_images_and_solver_in_float32(folder, request):
    folder = request.getfixturevalue(folder)
    full = Pipeline.from_pretrained(folder, class_names=NAMES)
    half = Pipeline.from_pretrained(folder, class_names=NAMES, dtype="bfloat16")
    noise = noise_for(full)
    with torch.no_grad():
        prediction = half.denoiser(noise, half.table(STEPS).timesteps[1], torch.tensor(LABELS))
        assert prediction.dtype == torch.bfloat16
        latents = run(half, noise)
        assert (
            latents.dtype
            == half.decoder(latents).dtype
            == half.guidance_decoder(latents).dtype
            == torch.float32
        )
        error = (images_of(half, latents) - images_of(full, run(full, noise))).abs().mean()
    assert 0 < float(error) < 0.02  # bfloat16 has 8 bits


def test_latents_are_unscaled_by_all_four_values():
    """z std / scaling_factor + mean + shift_factor, per channel."""
    from dpfast.generate.models.decoder import VaeDecoder

    std, mean = [1.0, 2.0, 0.5, 1.5], [0.1, -0.2, 0.3, 0.0]
    vae = tiny_pipelines.vae(
        latents_mean=mean, latents_std=std, shift_factor=0.25, scaling_factor=0.4
    ).eval()
    latents = torch.randn(2, 4, 8, 8)
    column = torch.tensor(std).view(1, 4, 1, 1), torch.tensor(mean).view(1, 4, 1, 1)
    with torch.no_grad():
        expected = vae.decode(latents * column[0] / 0.4 + column[1] + 0.25).sample
        torch.testing.assert_close(VaeDecoder(vae)(latents), expected)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_guidance_gradient_is_that_of_plain_autograd(folder, request, monkeypatch):
    """Against PyTorch's own layers and ``torch.autograd.grad``, 1e-4 relative."""
    names = NAMES if folder.startswith(("stable", "pixart")) else None
    ours = Pipeline.from_pretrained(request.getfixturevalue(folder), class_names=names)
    monkeypatch.setattr("dpfast.generate.models.denoiser.freeze_linear", lambda model: model)
    plain = Pipeline.from_pretrained(request.getfixturevalue(folder), class_names=names)
    torch.manual_seed(0)
    weights = torch.randn(ours.image_channels * 4, 5)

    def learner(images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) @ weights

    x, labels = torch.randn(3, *ours.denoiser.sample_shape), torch.zeros(3, dtype=torch.int64)
    t, alpha, sigma = torch.tensor(300), torch.tensor(0.8), torch.tensor(0.6)
    path = GuidancePath(denoiser=ours.denoiser, decoder=ours.guidance_decoder, learner=learner)
    gradient, prediction, _ = path.gradient(x, t, labels, alpha, sigma)
    leaf = x.clone().requires_grad_()
    expected = plain.denoiser(leaf, t, labels)
    x0 = predict_x0(leaf, expected, alpha, sigma, plain.denoiser.prediction)
    log_p = learner(plain.guidance_decoder(x0)).log_softmax(1)
    (truth,) = torch.autograd.grad(-(log_p.exp() * log_p).sum(), leaf)
    torch.testing.assert_close(prediction, expected.detach(), rtol=1e-4, atol=1e-5)
    assert float((gradient - truth).norm() / truth.norm()) < 1e-4
