"""The sampler against DiTPipeline, its exactness per sample, and the embedded generator's
promises.
"""

import warnings

import pytest
import torch
from diffusers import DiTPipeline
from diffusers.utils.torch_utils import randn_tensor

from dpfast.config import ASSETS
from dpfast.errors import InputError
from dpfast.evaluate.measures import predict
from dpfast.generate import preflight
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.sampler import GuidedSampler
from dpfast.learn.models import load_judge
from dpfast.ops import entropy
from tests.generate.standin import from_noise


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
@pytest.mark.parametrize("which", ["random", "embedded"])
def test_unguided_images_are_those_of_dit_pipeline(which, cfg_scale, pipeline_folder):
    folder = pipeline_folder if which == "random" else ASSETS / "fashion"
    reference = DiTPipeline.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    labels = [0, 1, 2, 2]
    # its null class is not 1000 trained rows away, but DiTPipeline asks for 1000
    if which == "random":
        assert reference.transformer.config.num_embeds_ada_norm == 1000
    generator = torch.Generator().manual_seed(3)
    expected = reference(
        labels,
        guidance_scale=cfg_scale,
        generator=generator,
        num_inference_steps=10,
        output_type="np",
    ).images

    sampler = GuidedSampler.from_pretrained(folder, steps=10, cfg_scale=cfg_scale)
    shape = (len(labels), *sampler.pipeline.denoiser.sample_shape)
    noise = randn_tensor(shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        latents = from_noise(sampler, noise, labels)
        images = sampler.pipeline.decoder(latents).mul(0.5).add(0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(images, torch.from_numpy(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_a_sample_does_not_depend_on_its_batch(pipeline, learner, eta):
    sampler = GuidedSampler(
        pipeline, learner, steps=6, guidance=GuidanceConfig(omega=0.1, every=2), eta=eta
    )
    labels, ids = torch.arange(64) % 3, torch.cat([torch.arange(4, 67), torch.tensor([2**40])])
    whole = sampler.generate(labels, ids)
    for size in (1, 3, 8):
        parts = [
            sampler.generate(a, b) for a, b in zip(labels.split(size), ids.split(size), strict=True)
        ]
        images = torch.cat([p.images for p in parts])
        # the noise is bit-identical; the models' sums may round differently in another batch
        assert int((images.int() - whole.images.int()).abs().max()) <= 1
        torch.testing.assert_close(
            torch.cat([p.entropy for p in parts]), whole.entropy, rtol=1e-3, atol=1e-4
        )


def test_other_ids_seeds_and_labels_give_other_images(pipeline):
    base = GuidedSampler(pipeline, steps=4).generate([0, 1])
    assert not torch.equal(
        base.images, GuidedSampler(pipeline, steps=4, seed=1).generate([0, 1]).images
    )
    assert not torch.equal(
        base.images, GuidedSampler(pipeline, steps=4).generate([0, 1], [7, 8]).images
    )
    assert not torch.equal(base.images, GuidedSampler(pipeline, steps=4).generate([1, 2]).images)
    assert torch.equal(base.images, GuidedSampler(pipeline, steps=4).generate([0, 1]).images)


def test_omega_zero_is_the_unguided_path_bitwise(pipeline, learner):
    guided = GuidedSampler(pipeline, learner, steps=5, guidance=GuidanceConfig(omega=0.0)).generate(
        [0, 1, 2]
    )
    assert torch.equal(guided.images, GuidedSampler(pipeline, steps=5).generate([0, 1, 2]).images)


def test_an_update_of_the_learner_in_place_changes_the_next_samples(pipeline, learner):
    sampler = GuidedSampler(pipeline, learner, steps=5, guidance=GuidanceConfig(omega=0.3, every=1))
    before = sampler.generate([0, 1, 2]).images
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.neg_()
    assert not torch.equal(before, sampler.generate([0, 1, 2]).images)


def test_stream_covers_all_labels_once(pipeline):
    batches = list(
        GuidedSampler(pipeline, steps=2).stream([0, 1, 2, 0, 1], first_id=10, batch_size=2)
    )
    assert [len(b) for b in batches] == [2, 2, 1]
    assert torch.cat([b.sample_ids for b in batches]).tolist() == [10, 11, 12, 13, 14]
    assert torch.cat([b.labels for b in batches]).tolist() == [0, 1, 2, 0, 1]


def test_omega_may_differ_by_sample(pipeline, learner):
    sampler = GuidedSampler(
        pipeline, learner, steps=4, guidance=GuidanceConfig(omega=0.0, every=1), compile=False
    )
    mixed = sampler.generate([0, 1, 2], omega=torch.tensor([0.0, 0.3, 0.1]))
    for i, omega in enumerate([0.0, 0.3, 0.1]):
        alone = sampler.generate([i], [i], omega=omega)
        assert int((alone.images[0].int() - mixed.images[i].int()).abs().max()) <= 1
    assert not torch.equal(mixed.images[1], sampler.generate([1], [1]).images[0])


def test_cfg_inside_an_interval_only_touches_its_steps(pipeline):
    def images(**options):
        return GuidedSampler(pipeline, steps=4, compile=False, **options).generate([0, 1, 2]).images

    assert torch.equal(images(cfg_interval=(0.0, 1.0)), images())
    assert torch.equal(images(cfg_scale=1.0), images(cfg_scale=1.0, cfg_interval=(0.25, 0.5)))
    assert not torch.equal(images(cfg_interval=(0.25, 0.5)), images())
    assert not torch.equal(images(cfg_interval=(0.25, 0.5)), images(cfg_scale=1.0))


def test_outside_its_interval_cfg_costs_nothing(pipeline, monkeypatch):
    sizes, call = [], type(pipeline.denoiser).__call__

    def counting(self, x, timestep, labels):
        sizes.append(len(x))
        return call(self, x, timestep, labels)

    monkeypatch.setattr(type(pipeline.denoiser), "__call__", counting)
    GuidedSampler(pipeline, steps=4, compile=False, cfg_interval=(0.25, 0.75)).generate([0, 1])
    assert sizes == [2, 4, 4, 2]


@pytest.mark.parametrize("through", ["denoiser", "latent"])
def test_guidance_takes_no_extra_forward_of_the_denoiser(through, pipeline, learner, monkeypatch):
    samples, call = [], type(pipeline.denoiser).__call__

    def counting(self, x, timestep, labels):
        samples.append(len(x))
        return call(self, x, timestep, labels)

    monkeypatch.setattr(type(pipeline.denoiser), "__call__", counting)
    guidance = GuidanceConfig(omega=0.1, every=1, through=through)
    GuidedSampler(pipeline, learner, steps=3, guidance=guidance, compile=False).generate([0, 1])
    assert sum(samples) == 3 * 2 * 2  # steps, halves, samples


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(pipeline):
    def learner(images):
        scale = torch.tensor([1.0, torch.inf, 1.0])[: len(images)]
        return images.flatten(1)[:, :3] * scale.view(-1, 1)

    guidance = GuidanceConfig(omega=0.1, every=2)
    batch = GuidedSampler(pipeline, learner, steps=4, guidance=guidance, compile=False).generate(
        [0, 1, 2]
    )
    assert batch.skipped == 2
    unguided = GuidedSampler(pipeline, steps=4, compile=False).generate([0, 1, 2])
    assert unguided.skipped == 0
    assert int((batch.images[1].int() - unguided.images[1].int()).abs().max()) <= 1
    assert not torch.equal(batch.images[0], unguided.images[0])


def test_negative_omega_warns_once_a_process(pipeline, learner):
    preflight._warn_of_easy_samples.cache_clear()
    sampler = GuidedSampler(
        pipeline, learner, steps=1, guidance=GuidanceConfig(omega=-0.1), compile=False
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler.generate([0])
        sampler.generate([0])
    assert ["easy samples" in str(warning.message) for warning in caught] == [True]


def test_bad_input_is_named_before_anything_is_sampled(pipeline, learner):
    sampler = GuidedSampler(pipeline, learner, steps=2)
    with pytest.raises(InputError, match=r"labels = 3: the generator has 3 classes, 0 to 2"):
        sampler.stream([0, 3])
    with pytest.raises(ValueError, match="sample_ids"):
        sampler.generate([0, 1], [5])
    with pytest.raises(ValueError, match="omega has shape"):
        sampler.generate([0, 1], omega=torch.zeros(3))
    with pytest.raises(ValueError, match="batch_size = 0"):
        sampler.stream([0], batch_size=0)
    with pytest.raises(ValueError, match="labels is empty"):
        sampler.generate([])
    with pytest.raises(ValueError, match="training mode"):
        GuidedSampler(pipeline, torch.nn.Sequential(learner).train(), steps=2).generate([0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"cfg_interval": (0.5, 0.2)}, r"cfg_interval = \(0.5, 0.2\)"),
        ({"memory_budget": 0}, "memory_budget = 0"),
        ({"compile": "yes"}, "compile = 'yes'"),
        ({"cuda_graphs": True}, "cuda_graphs = True: needs a pipeline on a GPU"),
        ({"cfg_scale": float("nan")}, "cfg_scale = nan"),
        ({"cfg_scale": "high"}, "cfg_scale must be a number, got 'high'"),
        ({"cfg_interval": 0.5}, r"cfg_interval must be \(start, stop\)"),
        ({"image_size": 28}, r"image_size must be \(height, width\) in pixels, got 28"),
        ({"memory_budget": "1GB"}, "memory_budget must be an integer, got '1GB'"),
        ({"cache_interval": 1.5}, "cache_interval must be an integer, got 1.5"),
        ({"guidance": 0.05}, "guidance must be a GuidanceConfig, got 0.05"),
        ({"cuda_graphs": "x"}, "cuda_graphs must be True, False, None or a recorder, got 'x'"),
        ({"image_size": (0, 3)}, "image_size = 0: expected sides of at least 1 pixel"),
        ({"seed": "x"}, "seed must be an integer"),
        ({"eta": "x"}, "eta must be a number, got 'x'"),
        ({"pipeline": object()}, "pipeline must be a Pipeline, .* got <object"),
        ({"pipeline": "fashion"}, "which GuidedSampler.from_pretrained loads.*, got 'fashion'"),
    ],
)
def test_a_wrong_option_is_named(options, message, pipeline):
    with pytest.raises((ValueError, TypeError), match=message):
        GuidedSampler(**{"pipeline": pipeline} | options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sampler: GuidanceConfig(omega="x"), "omega must be a number, got 'x'"),
        (lambda sampler: sampler.stream([0], first_id="x"), "first_id must be an integer"),
        (lambda sampler: sampler.stream([0], learner_step="x"), "learner_step must be an integer"),
        (
            lambda sampler: sampler.generate([0], learner_step="x"),
            "learner_step must be an integer",
        ),
        (lambda sampler: sampler.begin([0], latents=3), r"latents must be a tensor .*, got 3"),
        (lambda sampler: sampler.begin([0], step="x"), "step must be an integer, got 'x'"),
        (lambda sampler: sampler.advance(3), "trajectory must be a Trajectory, .* got 3"),
        (lambda sampler: sampler.finish(3), "trajectory must be a Trajectory, .* got 3"),
        (lambda sampler: sampler.advance(sampler.begin([0]), "x"), "stop must be an integer"),
    ],
)
def test_an_argument_of_another_kind_is_named_at_the_call(call, message, pipeline):
    with pytest.raises(TypeError, match=message):
        call(GuidedSampler(pipeline, steps=2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": [0.5]}, "labels must be integers, got torch.float32"),
        ({"labels": ["Bag"]}, r"labels must be integers, got \['Bag'\]"),
        ({"labels": torch.tensor([True])}, "labels must be integers, got torch.bool"),
        ({"labels": [0], "sample_ids": [0.5]}, "sample_ids must be integers, got torch.float32"),
        (
            {"labels": [0], "omega": "strong"},
            "omega must be a number or a tensor of numbers, got 'strong'",
        ),
    ],
)
def test_what_would_be_truncated_or_is_no_number_is_named(given, message, pipeline, learner):
    with pytest.raises(TypeError, match=message):
        GuidedSampler(pipeline, learner, steps=2).generate(**given)


@pytest.mark.parametrize(
    ("learner", "message"),
    [
        (torch.nn.Conv2d(3, 8, 3), r"learner fails on images of shape \(2, 1, 16, 16\)"),
        (
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 5)),
            r"\(2, 5\).*expected logits .* \(2, 3\)",
        ),
    ],
    ids=["channels", "classes"],
)
def test_a_learner_that_does_not_fit_is_named(learner, message, pipeline):
    with pytest.raises(ValueError, match=message):
        GuidedSampler(pipeline, learner.eval()).stream([0])


@pytest.mark.parametrize("way", ["detached", "no_grad"])
def test_a_learner_that_cuts_the_graph_is_refused(way, pipeline, learner):
    def cut(images):
        if way == "detached":
            return learner(images.detach())
        with torch.no_grad():
            return learner(images)

    with pytest.raises(ValueError, match="learner gives logits without a gradient at its images"):
        GuidedSampler(pipeline, cut, steps=2).generate([0])


def test_guidance_raises_the_learners_entropy_on_the_embedded_model(fashion):
    """The direction of Eq. 7: ascent. The judge stands in for a learner; same labels, ids and steps
    on both sides.
    """
    judge, labels = load_judge(), torch.arange(60) % 10
    means = {}
    for omega in (-0.03, 0.0, 0.03):
        batch = GuidedSampler(fashion, judge, guidance=GuidanceConfig(omega=omega)).generate(labels)
        means[omega] = float(batch.entropy.mean())
    assert means[-0.03] < means[0.0]
    assert means[0.03] > 1.5 * means[0.0]


def test_embedded_samples_carry_their_labels(fashion):
    labels = torch.arange(200) % 10
    images = GuidedSampler(fashion).generate(labels).images
    logits = predict(load_judge(), images)
    # 5,000 samples: see the model card
    assert float((logits.argmax(1) == labels).float().mean()) >= 0.85
    assert float(entropy(logits).mean()) < 0.6


def test_a_scale_of_one_call_is_that_of_a_sampler_and_stays_there(pipeline, learner):
    guidance = GuidanceConfig(omega=0.1, every=2)
    sampler, other = (
        GuidedSampler(pipeline, learner, steps=4, guidance=guidance, cfg_scale=scale, compile=False)
        for scale in (1.5, 3.0)
    )
    own = sampler.generate([0, 1, 2]).images
    wanted = other.generate([0, 1, 2]).images
    assert not torch.equal(own, wanted)
    assert torch.equal(sampler.generate([0, 1, 2], cfg_scale=3.0).images, wanted)
    streams = [sampler.stream([0, 1, 2], batch_size=3, cfg_scale=scale) for scale in (3.0, None)]
    at_three, at_own = (next(stream).images for stream in streams)
    assert torch.equal(at_three, wanted)
    assert torch.equal(at_own, own)
    with pytest.raises(ValueError, match="cfg_scale = nan"):
        sampler.begin([0], [0], cfg_scale=float("nan"))


def warnings_of(caplog, make):
    preflight.warn_of_idle_cfg.cache_clear()
    caplog.clear()
    for _ in range(2):
        make()
    return [record.getMessage() for record in caplog.records if record.name.startswith("dpfast")]


@pytest.mark.parametrize("rows", [None, 3], ids=["unconditional", "a row a class"])
def test_a_scale_without_a_null_class_is_said_to_have_no_effect(
    rows, tiny_pipelines, tmp_path, caplog
):
    folder = tiny_pipelines.pixel(tmp_path, class_embeddings=rows)
    made = GuidedSampler.from_pretrained(folder, steps=1, compile=False, cfg_scale=7.5)
    (line,) = warnings_of(caplog, lambda: made.generate([0]))
    assert line.startswith(f"cfg_scale = 7.5 has no effect: the generator of {folder} has no null")
    plain = GuidedSampler.from_pretrained(folder, steps=1, compile=False, cfg_scale=1.0)
    assert warnings_of(caplog, lambda: plain.generate([0])) == []
    (line,) = warnings_of(caplog, lambda: list(plain.stream([0], cfg_scale=3.0)))
    assert line.startswith("cfg_scale = 3 has no effect")


def test_an_interval_without_a_scale_is_said_to_have_no_effect(pipeline, caplog):
    options = {"steps": 2, "compile": False, "cfg_interval": (0.0, 0.5)}
    idle = GuidedSampler(pipeline, cfg_scale=1.0, **options)
    (line,) = warnings_of(caplog, lambda: idle.generate([0]))
    assert line.startswith("cfg_interval = (0, 0.5) has no effect: cfg_scale = 1")
    used = GuidedSampler(pipeline, cfg_scale=2.0, **options)
    assert warnings_of(caplog, lambda: used.generate([0])) == []
    # a round of a run may switch it off
    assert warnings_of(caplog, lambda: used.generate([0], cfg_scale=1.0)) == []


def test_what_could_never_take_effect_is_refused(pipeline, learner):
    with pytest.raises(InputError, match=r"cfg_interval = \(0.3, 0.4\): none of the 4 steps"):
        GuidedSampler(pipeline, steps=4, cfg_interval=(0.3, 0.4))
    late = GuidanceConfig(start=0.8)
    with pytest.raises(InputError, match=r"\(start, until\) = \(0.8, 1\): none of the 4 steps"):
        GuidedSampler(pipeline, learner, steps=4, guidance=late)
    assert GuidedSampler(pipeline, steps=4, guidance=late).variants(guided=False)
    unguided = GuidedSampler(pipeline, steps=2)
    for call in (unguided.generate, unguided.stream, unguided.begin):
        with pytest.raises(InputError, match=r"omega = 0.1: guides only with a learner"):
            call([0], omega=0.1)
    assert len(unguided.generate([0], omega=0.0)) == 1
