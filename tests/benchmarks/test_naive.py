"""The baselines make the images that they claim to make."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.systems.naive import Batched, Models, Predecessor
from dpfast import GuidanceConfig, GuidedSampler
from dpfast.ops import normal
from tests.generate.standin import from_noise

LABELS, IDS = torch.tensor([0, 2, 1]), torch.tensor([5, 11, 2])
STEPS, EVERY, OMEGA, CFG = 4, 2, 0.3, 1.7
SETTINGS = {"steps": STEPS, "every": EVERY, "omega": OMEGA, "cfg_scale": CFG}
close = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def models(pipeline_folder, learner):
    return Models.load(pipeline_folder, learner.requires_grad_(False))


def predecessor_by_formula(models, label, sample_id, omega):
    """The published steps for one image, from alpha-bar alone: no scheduler, no helper of the
    baseline.
    """
    betas = torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
    cumulative = torch.cumprod(1 - betas, 0)
    z = normal(sample_id[None], (4, 8, 8), seed=0, stream=0)
    stride = 1000 // STEPS
    for index, t in enumerate(range((STEPS - 1) * stride, -1, -stride)):
        abar, before = float(cumulative[t]), float(cumulative[t - stride]) if t else 1.0
        time = torch.tensor([t])

        def eps(z, c, time=time):
            return models.transformer(z, timestep=time, class_labels=torch.tensor([c])).sample

        unconditional = eps(z, 1000)
        guess = unconditional + CFG * (eps(z, int(label)) - unconditional)
        if index % EVERY == 0:
            z = z.clone().requires_grad_()
            x0 = (z - (1 - abar) ** 0.5 * eps(z, int(label))) / abar**0.5
            fac = (1 - abar) ** 0.5
            picture = models.vae.decode((fac * x0 + (1 - fac) * z) / 0.5).sample * 0.5 + 0.5
            low = picture.min().item()
            picture = picture - low
            p = F.softmax(models.learner(2 * picture / picture.max().item() - 1), dim=1)
            (-(p * p.log()).sum()).backward()
            z = (z + omega * z.norm() * z.grad / (z.grad.norm() + 1e-8)).detach()
        x0 = (z - (1 - abar) ** 0.5 * guess) / abar**0.5
        z = before**0.5 * x0 + (1 - before) ** 0.5 * guess
    return z


@pytest.mark.parametrize("omega", [OMEGA, 0.0])
def test_predecessor_follows_its_published_steps(models, tmp_path, omega):
    baseline = Predecessor(models, tmp_path, **SETTINGS | {"omega": omega})
    latents = baseline.latents(LABELS[1:2], IDS[1:2])
    torch.testing.assert_close(
        latents, predecessor_by_formula(models, LABELS[1], IDS[1], omega), **close
    )


def test_predecessor_goes_through_files(models, tmp_path):
    baseline = Predecessor(models, tmp_path, **SETTINGS)
    labels = torch.tensor([1, 0, 1])
    first = baseline.generate(labels, IDS)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")) == [
        "0000/000000.png",
        "0001/000000.png",
        "0001/000001.png",
    ]
    expected = (models.decode(baseline.latents(labels[:1], IDS[:1])) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(first[0] / 255.0, expected[0], rtol=0, atol=0.5001 / 255)
    # other files, the same images in the labels' order
    assert torch.equal(first, baseline.generate(labels, IDS))
    assert len(list(tmp_path.rglob("*.png"))) == 6


@pytest.mark.parametrize("share", [False, True])
def test_batching_and_sharing_leave_the_predecessors_images_as_they_are(models, tmp_path, share):
    alone = Predecessor(models, tmp_path, **SETTINGS)
    batch = Batched(models=models, blend=True, decoder="full", share=share, **SETTINGS)
    expected = torch.cat([alone.latents(LABELS[i : i + 1], IDS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(batch.latents(LABELS, IDS), expected, **close)


@pytest.mark.parametrize(
    ("plain", "ours"),
    [
        ({}, {}),
        ({"omega": 0.0}, {"omega": 0.0}),
        ({"share": False}, {}),
        ({"cfg_until": 0.5}, {"cfg_interval": (0.0, 0.5)}),
        ({"solver": "dpmpp2m"}, {"solver": "dpmpp2m"}),
    ],
)
def test_batched_makes_the_images_of_the_sampler(models, pipeline, learner, plain, ours):
    guidance = GuidanceConfig(omega=ours.pop("omega", OMEGA), every=EVERY)
    sampler = GuidedSampler(
        pipeline, learner, guidance=guidance, compile=False, steps=STEPS, cfg_scale=CFG, **ours
    )
    latents = from_noise(sampler, normal(IDS, (4, 8, 8), seed=0, stream=0), LABELS, IDS)
    torch.testing.assert_close(
        Batched(models=models, **SETTINGS | plain).latents(LABELS, IDS), latents, **close
    )


def test_guidance_of_the_baselines_changes_latents(models, tmp_path):
    for baseline in (Batched(models=models, **SETTINGS), Predecessor(models, tmp_path, **SETTINGS)):
        guided = baseline.latents(LABELS[:1], IDS[:1])
        baseline.omega = 0.0
        assert (guided - baseline.latents(LABELS[:1], IDS[:1])).abs().max() > 0.01


@pytest.mark.slow
def test_compiled_baseline_makes_the_same_latents(models):
    eager, compiled = (
        Batched(models=models, compile=compile, **SETTINGS | {"steps": 2}).latents(LABELS, IDS)
        for compile in (False, True)
    )
    torch.testing.assert_close(compiled, eager, **close)
