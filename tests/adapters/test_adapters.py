"""Guidance inside diffusers' own samplers: it raises entropy, samples do not mix, and unguided
nothing changes.
"""

import gc
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.modular_pipeline import BlockState
from diffusers.modular_pipelines.stable_diffusion_3.denoise import StableDiffusion3LoopDenoiser
from diffusers.utils.torch_utils import randn_tensor

from dpfast import (
    GuidanceCallback,
    GuidanceConfig,
    GuidedDDIMScheduler,
    GuidedSampler,
    LearnerGuidance,
    make_cond_fn,
)
from dpfast.adapters import live_pipeline
from dpfast.adapters.gradient import LearnerGradient
from dpfast.errors import InputError
from dpfast.generate.guidance import label_score
from dpfast.generate.pipelines import Pipeline
from dpfast.ops import entropy, guided_step
from tests.generate.standin import Watch, from_noise
from tests.tiny_pipelines import NAMES

STEPS = 6
LABELS = [0, 2, 1]
PROMPTS = [f"a photo of a {NAMES[label]}" for label in LABELS]
STRONG = GuidanceConfig(omega=0.05, every=1)
ALONE = {"rtol": 1e-4, "atol": 5e-4}


def noise(count=3):
    return randn_tensor((count, 4, 8, 8), generator=torch.Generator().manual_seed(3))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def mean_entropy(learner, pipe, latents):
    shift = pipe.vae.config.shift_factor or 0.0
    return float(
        entropy(
            learner(pipe.vae.decode(latents / pipe.vae.config.scaling_factor + shift).sample)
        ).mean()
    )


@pytest.fixture
def dit(pipeline_folder):
    pipe = quiet(diffusers.DiTPipeline.from_pretrained(pipeline_folder))
    pipe.scheduler = GuidedDDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


@pytest.fixture
def sd(stable_diffusion_folder):
    pipe = quiet(diffusers.StableDiffusionPipeline.from_pretrained(stable_diffusion_folder))
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe


@pytest.fixture
def sd3(stable_diffusion_3_folder):
    return quiet(diffusers.StableDiffusion3Pipeline.from_pretrained(stable_diffusion_3_folder))


def run(pipe, prompts=PROMPTS, latents=None, **options):
    latents = noise() if latents is None else latents
    options = {
        "num_inference_steps": STEPS,
        "guidance_scale": 2.0,
        "output_type": "latent",
        **options,
    }
    return pipe(prompts, latents=latents, **options).images


def run_dit(pipe, cfg_scale=2.0):
    generator = torch.Generator().manual_seed(3)
    return pipe(LABELS, cfg_scale, generator, num_inference_steps=STEPS, output_type="pt").images


@pytest.mark.parametrize("name", ["sd", "sd3"])
@pytest.mark.parametrize("through", ["denoiser", "latent"])
def test_callback_raises_entropy_and_samples_do_not_mix(name, through, request, learner):
    pipe = request.getfixturevalue(name)
    callback = GuidanceCallback(
        pipe, learner, guidance=GuidanceConfig(omega=0.05, every=1, through=through)
    )
    plain, guided = run(pipe), run(pipe, callback_on_step_end=callback)
    assert mean_entropy(learner, pipe, guided) > mean_entropy(learner, pipe, plain)
    for row in range(3):
        alone = run(
            pipe, PROMPTS[row : row + 1], noise()[row : row + 1], callback_on_step_end=callback
        )
        torch.testing.assert_close(alone, guided[row : row + 1], **ALONE)
    assert callback.skipped == 0


@pytest.mark.parametrize(
    "scheduler", [diffusers.DPMSolverMultistepScheduler, diffusers.DDPMScheduler]
)
def test_callback_moves_the_guided_steps_only_by_the_norm(scheduler, sd, learner):
    """The displacement of a step is omega of the latent's norm, at the steps of the schedule, never
    before step 0.
    """
    sd.scheduler = scheduler.from_config(sd.scheduler.config)
    callback = GuidanceCallback(
        sd, learner, guidance=GuidanceConfig(omega=0.03, every=3, until=0.9)
    )
    moved = {}

    class Spy(GuidanceCallback):
        def callback_fn(self, pipe, step, timestep, given):
            before, out = given["latents"], callback.callback_fn(pipe, step, timestep, given)
            moved[step + 1] = (out["latents"] - before).flatten(1).norm(dim=1) / before.flatten(
                1
            ).norm(dim=1)
            return out

    run(sd, callback_on_step_end=Spy(sd, learner))
    for step, size in moved.items():
        torch.testing.assert_close(
            size, torch.full((3,), 0.03 if step == 3 else 0.0), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("name", ["sd", "sd3"])
@pytest.mark.parametrize("through", ["denoiser", "latent"])
def test_an_anchored_callback_moves_along_both_directions(name, through, request, learner):
    """d = g / |g| + kappa c / |c| of float64, c from the two predictions at the step's input; one
    unconditional forward more than without an anchor.
    """
    pipe, forwards, moves = request.getfixturevalue(name), [], []
    model = pipe.unet if name == "sd" else pipe.transformer
    model.register_forward_hook(lambda *_: forwards.append(1))
    options = {"omega": 0.05, "every": 2, "through": through}
    callback, paper = (
        GuidanceCallback(pipe, learner, guidance=GuidanceConfig(anchor=anchor, **options))
        for anchor in (0.5, 0.0)
    )

    class Spy(GuidanceCallback):
        def callback_fn(self, pipe, step, timestep, given):
            began = len(forwards)
            out = callback.callback_fn(pipe, step, timestep, given)
            taken = len(forwards) - began
            moved = paper.callback_fn(pipe, step, timestep, given)["latents"]
            if taken:
                moves.append((step + 1, given, out["latents"], moved, taken))
            return out

    run(pipe, callback_on_step_end=Spy(pipe, learner))
    assert [step for step, *_ in moves] == [2, 4]
    for step, given, anchored, moved, taken in moves:
        assert taken == 2
        x = given["latents"]
        t, rows = pipe.scheduler.timesteps[step], {}
        names = {"prompt_embeds": "encoder_hidden_states", "latents": "sample"}
        if name == "sd3":
            names |= {"pooled_prompt_embeds": "pooled_projections", "latents": "hidden_states"}
        for key, argument in names.items():
            rows[argument] = torch.cat([x, x]) if key == "latents" else given[key]
        with torch.no_grad():
            uncond, cond = model(timestep=t.expand(6), **rows).sample.double().chunk(2)
        flat = [part.flatten(1) for part in (moved.double() - x.double(), uncond - cond)]
        g, c = (part / part.norm(dim=1, keepdim=True) for part in flat)
        d = g + 0.5 * c
        size = 0.05 * x.double().flatten(1).norm(dim=1, keepdim=True)
        expected = x.flatten(1) + size * d / d.norm(dim=1, keepdim=True)
        torch.testing.assert_close(
            anchored.flatten(1), expected.float(), rtol=1e-4, atol=1e-4 * float(x.abs().max())
        )
    assert callback.skipped == 0


def test_a_late_anchor_costs_a_forward_where_it_acts_alone(sd, learner):
    forwards, taken = [], {}
    sd.unet.register_forward_hook(lambda *_: forwards.append(1))
    late = GuidanceConfig(omega=0.05, every=2, anchor=0.5, anchor_schedule=((0.5, 0), (0.6, 1)))
    callback = GuidanceCallback(sd, learner, guidance=late)

    class Spy(GuidanceCallback):
        def callback_fn(self, pipe, step, timestep, given):
            began = len(forwards)
            out = callback.callback_fn(pipe, step, timestep, given)
            taken[step + 1] = len(forwards) - began
            return out

    run(sd, callback_on_step_end=Spy(sd, learner))
    assert {step: count for step, count in taken.items() if count} == {2: 1, 4: 2}


@pytest.mark.parametrize("kind", ["epsilon", "v", "sample", "flow"])
def test_what_an_adapter_ascends_is_what_the_step_does(kind, learner):
    """In float64, of each kind of prediction: the move and the score's gradient; what is not finite
    is counted.
    """
    guidance = GuidanceConfig(omega=0.1, every=1, anchor=0.5)
    ours = LearnerGradient(learner=learner, guidance=guidance)
    torch.manual_seed(4)
    x, g, cond, uncond = torch.randn(4, 3, 2, 4, 4)
    score = label_score(cond, uncond, kind)
    c = (cond - uncond).double() * (1 if kind == "sample" else -1)
    size = [part.double().flatten(1).norm(dim=1).view(-1, 1, 1, 1) for part in (x, g, c)]
    d = g / size[1] + 0.5 * c / size[2]
    length = d.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    moved = ours.displaced(x, g, score)
    expected = x + 0.1 * size[0] * d / length
    torch.testing.assert_close(moved.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.ascended(g, score).double(), size[1] * d, rtol=1e-5, atol=1e-5)
    assert ours.ascended(g, None) is g
    assert ours.skipped == 0
    score[1] = torch.inf
    others = ours.displaced(x, g, score)
    assert torch.equal(others[0], moved[0])
    assert torch.equal(others[2], moved[2])
    assert ours.skipped == 1


def test_a_sample_without_a_finite_gradient_goes_unguided(sd, learner):
    def broken(images):
        logits = learner(images)
        return torch.cat([logits[:1] * torch.nan, logits[1:]]) if len(logits) == 3 else logits

    callback = GuidanceCallback(sd, broken, guidance=STRONG)
    plain, guided = run(sd), run(sd, callback_on_step_end=callback)
    torch.testing.assert_close(guided[0], plain[0])
    assert not torch.allclose(guided[1], plain[1])
    assert callback.skipped == STEPS - 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize(
    "bound", [{}, {"clip_sample": True}, {"thresholding": True, "sample_max_value": 2.0}]
)
def test_an_unguided_scheduler_is_ddim(prediction, eta, bound, tmp_path):
    plain = diffusers.DDIMScheduler(
        **{"clip_sample": False, "prediction_type": prediction, "steps_offset": 1, **bound}
    )
    GuidedDDIMScheduler.from_config(plain.config).save_pretrained(tmp_path)
    ours = GuidedDDIMScheduler.from_pretrained(tmp_path)
    assert {k: v for k, v in ours.config.items() if k[0] != "_"} == {
        k: v for k, v in plain.config.items() if k[0] != "_"
    }
    plain.set_timesteps(STEPS)
    ours.set_timesteps(STEPS)
    for t in (plain.timesteps[0], plain.timesteps[3], int(plain.timesteps[-1])):
        output = torch.randn(3, 4, 8, 8)
        arguments = (output, t, noise())
        expected = plain.step(*arguments, eta=eta, generator=torch.Generator().manual_seed(1))
        got = ours.step(*arguments, eta=eta, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(got.prev_sample, expected.prev_sample, rtol=1e-5, atol=4e-5)
        torch.testing.assert_close(
            got.pred_original_sample, expected.pred_original_sample, rtol=1e-5, atol=4e-5
        )


@pytest.mark.parametrize("mode", ["relative", "score"])
@pytest.mark.parametrize(("cfg_scale", "anchor"), [(1.0, 0.0), (2.0, 0.0), (2.0, 0.5), (3.0, 2.0)])
def test_a_guided_dit_pipeline_is_the_guided_sampler(
    cfg_scale, anchor, mode, dit, pipeline, learner
):
    omega = 0.05 if mode == "relative" else 200.0
    guidance = GuidanceConfig(omega=omega, every=2, mode=mode, anchor=anchor)
    sampler = GuidedSampler(
        pipeline, learner, guidance=guidance, steps=STEPS, cfg_scale=cfg_scale, compile=False
    )
    with torch.no_grad():
        latents = from_noise(sampler, noise(), LABELS)
        expected = pipeline.decoder(latents).div(2).add(0.5).clamp(0, 1)
    plain = run_dit(dit, cfg_scale)
    dit.scheduler.attach(
        dit, learner, guidance=guidance, decoder=pipeline.guidance_decoder, labels=LABELS
    )
    torch.testing.assert_close(run_dit(dit, cfg_scale), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-3)
    dit.scheduler.detach()
    assert torch.equal(run_dit(dit, cfg_scale), plain)


def test_a_guided_scheduler_in_stable_diffusion(sd, learner):
    sd.scheduler = GuidedDDIMScheduler.from_config(sd.scheduler.config)
    plain = run(sd)
    sd.scheduler.attach(sd, learner, guidance=STRONG, prompts=PROMPTS, chunk=2)
    guided = run(sd)
    assert mean_entropy(learner, sd, guided) > mean_entropy(learner, sd, plain)
    for row in range(3):
        sd.scheduler.attach(sd, learner, guidance=STRONG, prompts=PROMPTS[row : row + 1])
        alone = run(sd, PROMPTS[row : row + 1], noise()[row : row + 1])
        torch.testing.assert_close(alone, guided[row : row + 1], **ALONE)
    with pytest.raises(ValueError, match="steps 3 samples, attached is the condition of 1"):
        run(sd)


@pytest.mark.parametrize("anchor", [0.0, 0.5])
def test_the_noise_of_a_scheduler_belongs_to_the_samples(
    anchor, sd, stable_diffusion_folder, learner
):
    """With eta > 0 and sample ids a Stable Diffusion pipeline makes the latents of
    ``GuidedSampler``, in any batch.
    """
    pipeline = Pipeline.from_pretrained(stable_diffusion_folder, class_names=NAMES)
    guidance, ids = GuidanceConfig(omega=0.05, every=2, anchor=anchor), [7, 1 << 40, 3]
    sampler = GuidedSampler(
        pipeline,
        learner,
        guidance=guidance,
        steps=STEPS,
        eta=0.7,
        cfg_scale=2.0,
        seed=5,
        compile=False,
    )
    expected = from_noise(sampler, noise(), LABELS, ids)
    sd.scheduler = GuidedDDIMScheduler.from_config(sd.scheduler.config)
    options = {"guidance": guidance, "decoder": pipeline.guidance_decoder, "seed": 5}
    sd.scheduler.attach(sd, learner, prompts=PROMPTS, sample_ids=ids, **options)
    torch.testing.assert_close(run(sd, eta=0.7), expected, rtol=1e-3, atol=1e-3)
    sd.scheduler.attach(sd, learner, prompts=PROMPTS[1:2], sample_ids=ids[1:2], **options)
    alone = run(sd, PROMPTS[1:2], noise()[1:2], eta=0.7)
    torch.testing.assert_close(alone, expected[1:2], rtol=1e-3, atol=1e-3)


def test_the_position_of_a_timestep_is_found_without_waiting():
    """Views of the grid by their address, numbers in a copy on the host that follows a new grid."""
    scheduler = diffusers.DDIMScheduler()
    for steps in (6, 4):
        scheduler.set_timesteps(steps)
        with Watch() as watch:
            assert [live_pipeline.position(scheduler, t) for t in scheduler.timesteps] == list(
                range(steps)
            )
        assert watch.reads == []
        numbers = scheduler.timesteps.tolist()
        live_pipeline.position(scheduler, numbers[0])
        with Watch() as watch:
            assert [live_pipeline.position(scheduler, t) for t in numbers] == list(range(steps))
        assert watch.reads == []


@torch.no_grad()
def run_guider(pipe, guider, latents, condition, empty):
    """The protocol of a modular pipeline's denoising loop, with its own block for the
    prediction.
    """
    pipe.scheduler.set_timesteps(STEPS)
    components = SimpleNamespace(
        guider=guider, transformer=pipe.transformer, scheduler=pipe.scheduler
    )
    state = BlockState(
        latents=latents,
        num_inference_steps=STEPS,
        joint_attention_kwargs=None,
        prompt_embeds=condition[0],
        pooled_prompt_embeds=condition[1],
        negative_prompt_embeds=empty[0],
        negative_pooled_prompt_embeds=empty[1],
    )
    block = StableDiffusion3LoopDenoiser()
    for i, t in enumerate(pipe.scheduler.timesteps):
        _, state = block(components, state, i, t)
        state.latents = pipe.scheduler.step(state.noise_pred, t, state.latents, return_dict=False)[
            0
        ]
    return state.latents


@pytest.mark.parametrize(
    ("through", "mode", "anchor"),
    [
        ("denoiser", "relative", 0.0),
        ("latent", "relative", 0.0),
        ("denoiser", "relative", 0.5),
        ("denoiser", "score", 0.0),
        ("latent", "score", 0.5),
    ],
)
def test_a_guider_in_a_modular_denoising_block_is_the_guided_sampler(
    through, mode, anchor, sd3, stable_diffusion_3_folder, learner
):
    """The block of the modular Stable Diffusion 3 pipeline; the sampler's forward is shared in
    both.
    """
    pipeline = Pipeline.from_pretrained(stable_diffusion_3_folder, class_names=NAMES)
    # a flow begins at alpha = 0, where score has no meaning
    omega, start = (0.03, 0.0) if mode == "relative" else (5.0, 0.3)
    guidance = GuidanceConfig(
        omega=omega, every=2, start=start, mode=mode, through=through, anchor=anchor
    )
    sampler = GuidedSampler(
        pipeline, learner, guidance=guidance, steps=STEPS, cfg_scale=2.0, compile=False
    )
    expected = from_noise(sampler, noise(), LABELS)
    denoiser = pipeline.denoiser
    rows = [
        (denoiser.embeddings[ids], denoiser.pooled[ids])
        for ids in (torch.tensor(LABELS), torch.full((3,), 3))
    ]
    guider = LearnerGuidance(guidance_scale=2.0)
    plain = run_guider(sd3, guider, noise(), *rows)
    forwards = []
    handle = sd3.transformer.register_forward_hook(lambda *_: forwards.append(1))
    trainable = [p.requires_grad for p in sd3.transformer.parameters()]
    guider.attach(learner, sd3.scheduler, pipeline.guidance_decoder, guidance=guidance)
    guided = run_guider(sd3, guider, noise(), *rows)
    handle.remove()
    torch.testing.assert_close(guided, expected, rtol=1e-3, atol=1e-3)
    assert mean_entropy(learner, sd3, guided) > mean_entropy(learner, sd3, plain)
    assert len(forwards) == 2 * STEPS
    assert [p.requires_grad for p in sd3.transformer.parameters()] == trainable
    assert not guided.requires_grad
    for row in range(3):
        at = slice(row, row + 1)
        alone = run_guider(
            sd3, guider, noise()[at], *[tuple(part[at] for part in pair) for pair in rows]
        )
        torch.testing.assert_close(alone, guided[at], **ALONE)


def test_a_guider_keeps_its_attachment_in_a_copy_and_saves_its_configuration(
    sd3, learner, tmp_path
):
    guider = LearnerGuidance(guidance_scale=3.0).attach(learner, sd3.scheduler, sd3.vae)
    assert guider.new(guidance_scale=1.0)._gradient is guider._gradient
    guider.save_pretrained(tmp_path)
    loaded = LearnerGuidance.from_pretrained(tmp_path)
    assert loaded.guidance_scale == 3.0
    assert loaded._gradient is None


def test_cond_fn_has_the_convention_of_guided_diffusion(pipeline, learner):
    """eps - sigma cond_fn is the score mode of guided_step, it ascends, and rows do not mix."""
    denoiser, labels, x, table = (
        pipeline.denoiser,
        torch.tensor(LABELS),
        noise(),
        pipeline.table(STEPS),
    )
    t = table.timesteps[2].expand(3)
    cond_fn = make_cond_fn(
        lambda x, t, y: denoiser.model(x, timestep=t, class_labels=y).sample,
        learner,
        pipeline.scheduler.alphas_cumprod,
        guidance=GuidanceConfig(omega=2.0, every=1, mode="score"),
        decoder=pipeline.guidance_decoder,
    )
    sigma = table.rows[2, 1]
    with torch.no_grad():
        eps = denoiser(x, table.timesteps[2], labels)
    gradient = cond_fn(x, t, y=labels)
    options = {"cfg_scale": 1.0, "omega": 2.0, "mode": "score"}
    expected = guided_step(x, eps, None, gradient / 2.0, table.rows, 2, **options)
    got = guided_step(x, eps - sigma * gradient, None, None, table.rows, 2, **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert bool(
        (
            entropy_at(pipeline, learner, x + 0.5 * gradient, labels)
            > entropy_at(pipeline, learner, x, labels)
        ).all()
    )
    for row in range(3):
        at = slice(row, row + 1)
        torch.testing.assert_close(
            cond_fn(x[at], t[at], y=labels[at]), gradient[at], rtol=1e-3, atol=1e-6
        )
    mixed = torch.stack([t[0], t[1], pipeline.table(STEPS).timesteps[4]])
    torch.testing.assert_close(cond_fn(x, mixed, y=labels)[:2], gradient[:2], rtol=1e-3, atol=1e-6)


def test_cond_fn_raises_entropy_of_a_whole_trajectory(pipeline, learner):
    denoiser, labels, table = pipeline.denoiser, torch.tensor(LABELS), pipeline.table(STEPS)
    cond_fn = make_cond_fn(
        lambda x, t, y: denoiser.model(x, timestep=t, class_labels=y).sample,
        learner,
        pipeline.scheduler.alphas_cumprod,
        guidance=GuidanceConfig(omega=20.0, every=1, mode="score"),
        decoder=pipeline.guidance_decoder,
    )
    found = []
    for strength in (0.0, 1.0):
        x = noise()
        for step, t in enumerate(table.timesteps):
            with torch.no_grad():
                eps = denoiser(x, t, labels) - strength * table.rows[step, 1] * cond_fn(
                    x, t.expand(3), y=labels
                )
            x = guided_step(x, eps, None, None, table.rows, step, cfg_scale=1.0, omega=0.0)
        with torch.no_grad():
            found.append(float(entropy(learner(pipeline.guidance_decoder(x))).mean()))
    assert found[1] > found[0]


@torch.no_grad()
def entropy_at(pipeline, learner, x, labels):
    alpha, sigma = pipeline.table(STEPS).rows[2, :2]
    eps = pipeline.denoiser(x, pipeline.table(STEPS).timesteps[2], labels)
    return entropy(learner(pipeline.guidance_decoder((x - sigma * eps) / alpha)))


def test_what_cannot_work_is_named(dit, sd, sd3, learner):
    with pytest.raises(TypeError, match=r"pipe is a DiTPipeline.*GuidedDDIMScheduler"):
        GuidanceCallback(dit, learner)
    with pytest.raises(ValueError, match="mode = 'score'"):
        GuidanceCallback(sd, learner, guidance=GuidanceConfig(mode="score"))
    with pytest.raises(ValueError, match="training mode"):
        GuidanceCallback(sd, learner.train())
    learner.eval()
    with pytest.raises(TypeError, match="learner is a int"):
        GuidanceCallback(sd, 3)
    with pytest.raises(ValueError, match="lacks 'latents'"):
        GuidanceCallback(sd, learner)(sd, 0, 1, {})
    with pytest.raises(ValueError, match="labels is None"):
        run(
            sd,
            callback_on_step_end=GuidanceCallback(
                sd, learner, guidance=GuidanceConfig(criterion="loss")
            ),
        )
    with pytest.raises(ValueError, match="expected logits of shape"):
        run(sd, callback_on_step_end=GuidanceCallback(sd, lambda images: images, guidance=STRONG))
    sd.scheduler = diffusers.EulerDiscreteScheduler.from_config(sd.scheduler.config)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler, whose latents cannot be moved"):
        GuidanceCallback(sd, learner)
    scheduler = GuidedDDIMScheduler()
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(noise(), 1, noise())
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match="timestep = 7: not on the scheduler's grid"):
        scheduler.step(noise(), 7, noise())
    with pytest.raises(ValueError, match="use_clipped_model_output"):
        scheduler.step(noise(), scheduler.timesteps[0], noise(), use_clipped_model_output=True)
    with pytest.raises(ValueError, match="labels is None"):
        scheduler.attach(dit, learner)
    for labels in ([2.7], [True], [-1]):
        with pytest.raises(ValueError, match="labels: label"):
            scheduler.attach(dit, learner, labels=labels)
    with pytest.raises(ValueError, match="labels = 1000: the model has 1000 classes"):
        scheduler.attach(dit, learner, labels=[1000])
    with pytest.raises(ValueError, match="prompts = None"):
        scheduler.attach(sd, learner)
    with pytest.raises(TypeError, match="pipe is a StableDiffusion3Pipeline"):
        scheduler.attach(sd3, learner)
    with pytest.raises(ValueError, match="clip_sample = True"):
        LearnerGuidance().attach(learner, diffusers.DDIMScheduler(), sd.vae)
    with pytest.raises(ValueError, match=r"mode = 'relative', every = 3"):
        make_cond_fn(lambda x, t: x, learner, [0.9, 0.5], guidance=GuidanceConfig())
    with pytest.raises(ValueError, match="prediction = 'flow'"):
        make_cond_fn(lambda x, t: x, learner, [0.9, 0.5], prediction="flow")
    with pytest.raises(ValueError, match="t has shape"):
        make_cond_fn(lambda x, t: x, learner, [0.9, 0.5])(noise(), torch.tensor(1))


def test_an_anchor_that_nothing_can_be_made_of_is_refused(dit, sd, sd3, learner, pixel_folder):
    anchored = GuidanceConfig(omega=0.05, every=1, anchor=0.5)

    def refused(why, call, *given, **options):
        message = f"guidance has anchor = 0.5: .*{why}.*; expected anchor = 0"
        with pytest.raises(InputError, match=message) as caught:
            call(*given, **options)
        assert "\n" not in str(caught.value)

    score = GuidanceConfig(omega=1.0, every=1, mode="score", anchor=0.5)
    refused("prediction alone", make_cond_fn, lambda x, t: x, learner, [0.9, 0.5], guidance=score)
    callback = GuidanceCallback(sd, learner, guidance=anchored)
    alone = {"guidance_scale": 1.0}
    refused("without classifier", run, sd, callback_on_step_end=callback, **alone)
    sd.scheduler = GuidedDDIMScheduler.from_config(sd.scheduler.config)
    sd.scheduler.attach(sd, learner, guidance=anchored, prompts=PROMPTS)
    refused("without classifier", run, sd, **alone)
    refused("or rescales it", run, sd, guidance_rescale=0.7)
    latent = GuidanceConfig(omega=0.05, every=1, anchor=0.5, through="latent")
    refused("'latent'", sd.scheduler.attach, sd, learner, guidance=latent, prompts=PROMPTS)
    dit.scheduler.attach(dit, learner, labels=LABELS, guidance=anchored)
    refused("without classifier", run_dit, dit, 1.0)
    pixels = diffusers.DDIMPipeline.from_pretrained(pixel_folder)
    scheduler = GuidedDDIMScheduler.from_config(pixels.scheduler.config)
    refused("DDIMPipeline", scheduler.attach, pixels, learner, guidance=anchored)
    for alone in ({"guidance_scale": 1.0}, {"guidance_scale": 0.0, "use_original_formulation": 1}):
        guider = LearnerGuidance(**alone)
        guider.attach(learner, sd3.scheduler, sd3.vae, guidance=anchored)
        sd3.scheduler.set_timesteps(2)
        guider.set_state(step=0, num_inference_steps=2, timestep=sd3.scheduler.timesteps[0])
        guider._x = noise().requires_grad_()
        refused("the guider has no", guider.forward, 0.5 * guider._x)


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("anchor", [0.0, 0.5])
def test_an_anchor_in_a_loop_of_ones_own_is_refused(anchor, gone, stable_diffusion_folder, learner):
    """Nothing tells how the prediction was made; without an anchor the loop runs."""
    pipe = quiet(diffusers.StableDiffusionPipeline.from_pretrained(stable_diffusion_folder))
    scheduler = GuidedDDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    guidance = GuidanceConfig(omega=0.05, every=1, anchor=anchor)
    scheduler.attach(pipe, learner, guidance=guidance, prompts=PROMPTS)
    scheduler.set_timesteps(STEPS)
    if gone:
        del pipe
        gc.collect()
    given = (noise(), scheduler.timesteps[0], noise())
    if not anchor:
        assert scheduler.step(*given).prev_sample.isfinite().all()
        return
    with pytest.raises(InputError, match=r"^guidance has anchor = 0.5: no call of the pipe.*$"):
        scheduler.step(*given)


def test_an_anchor_in_a_loop_of_ones_own_follows_a_doubled_batch(dit, learner):
    guidance = GuidanceConfig(omega=0.05, every=1, anchor=0.5)
    scheduler = GuidedDDIMScheduler.from_config(dit.scheduler.config)
    scheduler.attach(dit, learner, guidance=guidance, labels=LABELS)
    scheduler.set_timesteps(STEPS)
    first, x = scheduler.timesteps[0], noise()
    assert len(scheduler.step(torch.cat([x, x]), first, torch.cat([x, x])).prev_sample) == 6
    with pytest.raises(InputError, match=r"anchor = 0.5: .* without classifier-free guidance"):
        scheduler.step(x, first, x)


def attached(where, learner, dit, sd, sd3):
    """What an adapter does at its first guided step, with this learner."""
    x, t = noise(), torch.tensor([500, 500, 500])
    if where == "cond_fn":
        levels = dit.scheduler.alphas_cumprod
        options = {"guidance": GuidanceConfig(omega=1.0, every=1, mode="score")}
        return lambda: make_cond_fn(lambda x, t, y=None: 0.5 * x, learner, levels, **options)(x, t)
    if where == "callback":
        callback = GuidanceCallback(sd, learner, guidance=STRONG)
        return lambda: sd(PROMPTS, num_inference_steps=3, callback_on_step_end=callback)
    if where == "scheduler":
        dit.scheduler = GuidedDDIMScheduler.from_config(dit.scheduler.config)
        dit.scheduler.attach(dit, learner, labels=LABELS, guidance=STRONG)
        return lambda: dit(LABELS, num_inference_steps=2, guidance_scale=1.0)
    guider = LearnerGuidance(guidance_scale=1.0).attach(
        learner, sd3.scheduler, sd3.vae, guidance=STRONG
    )
    sd3.scheduler.set_timesteps(2)
    guider.set_state(step=0, num_inference_steps=2, timestep=sd3.scheduler.timesteps[0])
    guider._x = x.requires_grad_()
    return lambda: guider.forward(0.5 * guider._x)


def single(channels):
    return torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(16 * channels, 1)
    ).eval()


def mixing(channels):
    return torch.nn.Sequential(
        torch.nn.BatchNorm2d(channels, track_running_stats=False),
        torch.nn.AdaptiveAvgPool2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(16 * channels, 3),
    ).eval()


@pytest.mark.parametrize("where", ["cond_fn", "callback", "scheduler", "guider"])
@pytest.mark.parametrize(
    ("make", "message"),
    [(single, "softmax of a single logit"), (mixing, "module '0', a BatchNorm2d, keeps no")],
    ids=["one logit", "batch norm"],
)
def test_every_adapter_refuses_a_learner_that_cannot_guide(make, message, where, dit, sd, sd3):
    learner = make(4 if where == "cond_fn" else 1)  # of latents, of images
    with pytest.raises(InputError, match=message):
        attached(where, learner, dit, sd, sd3)()


def test_a_label_that_the_learner_does_not_know_is_named(dit, learner):
    guidance = GuidanceConfig(omega=1.0, every=1, mode="score", criterion="loss")
    levels = dit.scheduler.alphas_cumprod
    few = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 3)).eval()
    function = make_cond_fn(lambda x, t, y=None: 0.5 * x, few, levels, guidance=guidance)
    x, t = noise(2), torch.tensor([500, 500])
    with pytest.raises(InputError, match="labels = 3: learner has 3 classes, 0 to 2"):
        function(x, t, y=torch.tensor([0, 3]))
    assert function(x, t, y=torch.tensor([0, 2])).shape == x.shape


def test_an_adapter_that_would_guide_no_step_says_so(dit, sd, learner):
    first = GuidanceCallback(sd, learner, guidance=GuidanceConfig(every=9))
    with pytest.raises(InputError, match="none of the steps 1 to 2 is guided"):
        sd(PROMPTS, num_inference_steps=3, callback_on_step_end=first)
    dit.scheduler = GuidedDDIMScheduler.from_config(dit.scheduler.config)
    dit.scheduler.attach(dit, learner, labels=LABELS, guidance=GuidanceConfig(start=0.9))
    with pytest.raises(InputError, match="none of the 3 steps begins there"):
        dit(LABELS, num_inference_steps=3, guidance_scale=1.0)
