"""Guidance that the generator's own label score anchors, from the configuration to the latents; and
the CFG scale of guided batches.
"""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dpfast.errors import InputError
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from dpfast.generate.step import Trajectory
from dpfast.ops import normal
from tests.generate.standin import StandInRecorder, Watch, force_reference
from tests.tiny_pipelines import NAMES

STEPS, CFG = 4, 2.0
LABELS = [0, 2, 1]
KAPPAS = torch.tensor([0.5, 0.0, 2.0])
FOLDERS = (
    "pipeline_folder",
    "stable_diffusion_folder",
    "stable_diffusion_xl_folder",
    "stable_diffusion_3_folder",
)


def load(folder, request):
    names = None if folder == "pipeline_folder" else NAMES
    return Pipeline.from_pretrained(request.getfixturevalue(folder), class_names=names)


def new_sampler(pipeline, learner, **options):
    guidance = options.pop("guidance", GuidanceConfig(omega=0.1, every=2, anchor=0.5))
    known = {"steps": STEPS, "cfg_scale": CFG, "compile": False, "guidance": guidance}
    return GuidedSampler(pipeline, learner, **known | options)


def entropy_of(logits):
    logs = logits.double().log_softmax(1)
    return -(logs.exp() * logs).sum(1)


def plain_loop(sampler, learner, x, labels, kappas):
    """The sampler's latents (B, c, h, w), a sample and a step at a time: the predictions by its
    denoiser, all else in float64.
    """
    pipeline, guidance, kind = sampler.pipeline, sampler.guidance, sampler.pipeline.denoiser
    null = torch.tensor([kind.null_label])
    rows, guided = sampler.table.rows.double(), guidance.steps(len(sampler.table))
    finals = []
    for start, label, kappa in zip(x.double(), labels, kappas.double(), strict=True):
        state, label = start[None], torch.tensor([label])
        for index, (alpha, sigma, a, b, *_) in enumerate(rows):
            t = sampler.table.timesteps[index]

            def x0_eps(state, pred, alpha=alpha, sigma=sigma):
                if kind.prediction == "flow":
                    return state - sigma * pred, state + alpha * pred
                return (state - sigma * pred) / alpha, pred

            leaf = state.clone().requires_grad_()
            cond = kind(leaf.float(), t, label).double()
            x0 = x0_eps(leaf, cond)[0]
            entropy_of(learner(pipeline.guidance_decoder(x0.float()))).sum().backward()
            cond, g = cond.detach(), leaf.grad
            with torch.no_grad():
                uncond = kind(state.float(), t, null).double()
            pred, c = uncond + sampler.cfg_scale * (cond - uncond), -(cond - uncond)
            d = g / g.norm() + kappa * c / c.norm()
            if index in guided and guidance.mode == "relative":
                state = state + guidance.omega * state.norm() * d / d.norm()
            x0, eps = x0_eps(state, pred)
            if index in guided and guidance.mode == "score":
                shift = guidance.omega * sigma * g.norm() * d
                x0, eps = x0 + sigma / alpha * shift, eps - shift
            state = a * x0 + b * eps
        finals.append(state)
    return torch.cat(finals).float()


@pytest.mark.parametrize("mode", ["relative", "score"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_anchored_latents_are_those_of_a_plain_loop(folder, mode, request, learner):
    """DiT, Stable Diffusion and Stable Diffusion 3 at tiny size, with an anchor a sample."""
    pipeline = load(folder, request)
    # a flow begins at alpha = 0, where score has no meaning
    start, omega = (0.25, 20.0) if mode == "score" else (0.0, 0.1)
    guidance = GuidanceConfig(omega=omega, every=2, mode=mode, start=start, anchor=0.5)
    options = {} if "3" in folder else {"solver": "ddim"}
    sampler = new_sampler(pipeline, learner, guidance=guidance, **options)
    noise = normal(torch.arange(3), pipeline.denoiser.sample_shape, seed=0, stream=0)
    begun = sampler.begin(LABELS, anchor=KAPPAS)
    begun = replace(begun, x=noise * sampler.table.initial_scale)
    got = sampler.advance(begun).x
    expected = plain_loop(sampler, learner, begun.x, LABELS, KAPPAS)
    paper = sampler.advance(replace(begun, anchor=None)).x
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(got[1], paper[1])  # kappa 0 beside others is today's step
    for row in (0, 2):
        assert float((got[row] - paper[row]).abs().max()) > 20 * float(
            (got[row] - expected[row]).abs().max()
        )


def test_the_configured_anchor_is_that_of_all_samples(pipeline, learner):
    sampler = new_sampler(pipeline, learner)
    own = sampler.begin(LABELS)
    assert own.anchor.tolist() == [0.5] * 3
    assert sampler.begin(LABELS, anchor=2).anchor.tolist() == [2.0] * 3
    given = sampler.begin(LABELS, anchor=torch.full((3,), 0.5))
    assert torch.equal(sampler.advance(own).x, sampler.advance(given).x)


@pytest.mark.parametrize("prepared", ["eager", "traced", "captured"])
def test_an_anchor_of_zero_is_the_papers_guidance_bit_for_bit(
    prepared, pipeline, learner, monkeypatch
):
    options = {"guidance": GuidanceConfig(omega=0.1, every=2)}
    if prepared == "captured":
        force_reference(monkeypatch)
        options |= {"cuda_graphs": StandInRecorder()}
    zero = options | {"guidance": replace(options["guidance"], anchor=0.0)}
    anchored = options | {"guidance": replace(options["guidance"], anchor=0.5)}
    samplers = [new_sampler(pipeline, learner, **each) for each in (options, zero, anchored)]
    if prepared == "traced":
        for sampler in samplers:
            sampler.runner.tuner.mode = True
            sampler.runner.backend = "eager"
    paper, none, other = samplers
    expected = paper.generate(LABELS).latents
    assert none.begin(LABELS).anchor is None
    assert torch.equal(none.generate(LABELS).latents, expected)
    assert torch.equal(other.generate(LABELS, anchor=0).latents, expected)
    assert torch.equal(other.generate(LABELS, anchor=torch.zeros(3)).latents, expected)
    assert not torch.equal(other.generate(LABELS).latents, expected)


def test_unguided_samples_have_no_anchor(pipeline, learner):
    sampler = new_sampler(pipeline, learner)
    assert sampler.begin(LABELS, omega=0.0).anchor is None
    assert new_sampler(pipeline, None).begin(LABELS).anchor is None


def test_a_step_outside_the_cfg_interval_is_the_papers(pipeline, learner):
    guidance = GuidanceConfig(omega=0.1, every=1, anchor=0.5)
    sampler = new_sampler(pipeline, learner, guidance=guidance, cfg_interval=(0.0, 0.5))
    both = sampler.advance(sampler.begin(LABELS), 2)
    assert torch.equal(
        sampler.advance(both).x, sampler.advance(replace(both, anchor=torch.zeros(3))).x
    )


def test_an_anchor_of_any_value_compiles_each_variant_once(pipeline, learner):
    sampler = new_sampler(pipeline, learner, compile=True)
    counter = sampler.runner.backend = CompileCounterWithBackend("eager")
    torch._dynamo.utils.counters.clear()
    for anchor in (None, 2.0, KAPPAS, 0.25 * KAPPAS):
        sampler.generate(LABELS, anchor=anchor)
    list(sampler.stream([0, 1, 2, 0, 1], batch_size=3))
    assert counter.frame_count == 3  # guided, plain, decoding
    assert not torch._dynamo.utils.counters["graph_break"]


def test_captured_steps_take_anchors_of_any_value_and_read_nothing(pipeline, learner, monkeypatch):
    force_reference(monkeypatch)
    recorder = StandInRecorder()
    eager = new_sampler(pipeline, learner)
    replayed = new_sampler(pipeline, learner, cuda_graphs=recorder)
    for anchor in (None, KAPPAS):
        expected = eager.generate(LABELS, anchor=anchor).latents
        got = replayed.generate(LABELS, anchor=anchor).latents
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)  # kept in fp16
    assert recorder.recorded == 3
    assert not replayed.runner.fallbacks
    start = eager.begin(LABELS)
    with torch.no_grad(), Watch() as watch:
        eager.advance(start)
    assert not watch.reads


@pytest.mark.parametrize("solver", ["ddim", "dpmpp2m"])
@pytest.mark.parametrize("through", ["denoiser", "latent"])
def test_an_anchored_sample_is_the_same_in_any_batch(solver, through, pipeline, learner):
    """Alone, in micro-batches, in chunks of a memory budget, taken out and joined again, and beside
    steps that reuse features.
    """
    guidance = GuidanceConfig(omega=0.1, every=4, anchor=0.5, through=through)
    options = {"guidance": guidance, "solver": solver, "steps": 8, "cache_interval": 2}
    sampler = new_sampler(pipeline, learner, **options)
    whole = sampler.generate(LABELS, anchor=KAPPAS).latents.float()
    near = {"rtol": 0, "atol": 4e-3}  # kept in fp16
    for row in range(3):
        alone = sampler.generate(LABELS[row : row + 1], [row], anchor=KAPPAS[row : row + 1])
        torch.testing.assert_close(alone.latents.float(), whole[row : row + 1], **near)
    parts = [b.latents.float() for b in sampler.stream(LABELS, batch_size=2, anchor=KAPPAS)]
    torch.testing.assert_close(torch.cat(parts), whole, **near)
    bounded = new_sampler(pipeline, learner, memory_budget=300_000, **options)
    latents = bounded.generate(LABELS, anchor=KAPPAS).latents.float()
    torch.testing.assert_close(latents, whole, **near)
    state = sampler.advance(sampler.begin(LABELS, anchor=KAPPAS), 1)
    rows = [state.take(torch.tensor(which)) for which in ([2], [0, 1])]
    joined = sampler.finish(sampler.advance(Trajectory.joined(rows)))
    torch.testing.assert_close(joined.latents.float(), whole[[2, 0, 1]], **near)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_part_without_an_anchor_joins_with_zeros(order, pipeline, learner):
    """In either order: both finish as they do alone."""
    sampler = new_sampler(pipeline, learner)
    kappas, ids = (0.0, 1.0), ([5], [7])
    parts = [sampler.begin([2], ids[i], anchor=kappas[i]) for i in order]
    assert [part.anchor is None for part in parts] == [i == 0 for i in order]
    joined = Trajectory.joined(parts)
    assert joined.anchor.tolist() == [kappas[i] for i in order]
    rest = joined.take(torch.tensor([1]))
    assert rest.anchor.tolist() == [kappas[order[1]]]
    together = sampler.finish(sampler.advance(joined)).latents
    alone = [sampler.finish(sampler.advance(part)).latents for part in parts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*alone, atol=1e-3)


def test_rows_that_fill_a_part_stay_known_when_it_is_taken_or_joined(pipeline, learner):
    sampler = new_sampler(pipeline, learner)
    filled = replace(sampler.begin(LABELS), valid=torch.tensor([True, True, False]))
    assert filled.take(torch.tensor([2, 0])).valid.tolist() == [False, True]
    whole = sampler.begin([1, 1], [8, 9])
    for parts, valid in (
        ([filled, whole], [True, True, False, True, True]),
        ([whole, filled], [True, True, True, True, False]),
    ):
        assert Trajectory.joined(parts).valid.tolist() == valid
    assert Trajectory.joined([whole, whole]).valid is None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_part_without_features_has_all_made_anew(order, pipeline, learner):
    sampler = new_sampler(pipeline, learner)
    begun = sampler.begin(LABELS)
    parts = [begun, replace(begun, features=torch.zeros(3, 2, 4))]
    assert Trajectory.joined([parts[i] for i in order]).features is None
    assert len(Trajectory.joined([parts[1], parts[1]]).features) == 6


def test_parts_before_other_steps_are_not_joined(pipeline, learner):
    sampler = new_sampler(pipeline, learner)
    begun = sampler.begin(LABELS)
    with pytest.raises(InputError, match=r"^parts: one is before step 1 of 4, the first before"):
        Trajectory.joined([begun, sampler.advance(begun, 1)])


def test_a_sample_with_a_score_that_is_not_finite_is_counted_once(pipeline, learner):
    """Also where its copies fill the batch up to the size that the steps take."""
    kind = type(pipeline.denoiser)

    class Broken(kind):
        def __call__(self, x, timestep, labels):
            null = (labels == self.null_label).view(-1, 1, 1, 1)
            return torch.where(null, torch.inf, kind.__call__(self, x, timestep, labels))

    broken = object.__new__(Broken)
    broken.__dict__.update(vars(pipeline.denoiser))
    guidance = GuidanceConfig(omega=0.1, anchor=0.5)
    sampler = new_sampler(replace(pipeline, denoiser=broken), learner, guidance=guidance)
    sampler.runner.prepare(4, compile=False)
    assert int(sampler.advance(sampler.begin([0]), 1).skipped) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"anchor": -0.5}, r"anchor = -0.5: expected at least 0"),
        ({"anchor": torch.tensor([0.5, -1.0, 0.0])}, r"anchor = -1: expected at least 0"),
        ({"anchor": float("nan")}, "anchor must be finite"),
        ({"anchor": torch.tensor([0.5, torch.inf, 0.0])}, "anchor must be finite"),
        ({"anchor": torch.ones(2)}, r"anchor has shape \(2,\), expected \(\) or \(3,\)"),
        ({"anchor": torch.ones(3, 1)}, r"anchor has shape \(3, 1\)"),
        ({"anchor": "0.5"}, "anchor must be a number or a tensor of numbers, got '0.5'"),
        ({"anchor": True}, "anchor must be a number or a tensor of numbers, got torch.bool"),
        ({"omega": True}, "omega must be a number or a tensor of numbers, got torch.bool"),
        ({"anchor": 1j}, "anchor must be a number or a tensor of numbers, got torch.complex64"),
        ({"omega": -0.1}, "anchor = 0.5: expected 0 where omega is negative"),
        ({"omega": torch.tensor([0.1, 0.1, -0.1])}, "anchor = 0.5: expected 0 where omega is"),
        ({"cfg_scale": 1.0}, "anchor = 0.5: needs .* guided samples have cfg_scale = 1, which is"),
    ],
)
def test_a_wrong_anchor_is_named_in_one_line(given, message, pipeline, learner):
    sampler = new_sampler(pipeline, learner)
    for call in (sampler.generate, sampler.begin, sampler.stream):
        with pytest.raises((InputError, TypeError), match=message) as caught:
            call(LABELS, **given)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["anchor", "omega", "labels", "sample_ids"])
def test_a_tensor_without_values_is_refused(name, pipeline, learner):
    sampler = new_sampler(pipeline, learner)
    kind = torch.float32 if name in ("anchor", "omega") else torch.int64
    given = {"labels": LABELS, name: torch.zeros(3, dtype=kind, device="meta")}
    with pytest.raises(InputError, match=f"^{name} is a tensor on the device meta, without values"):
        sampler.generate(**given)


def test_an_anchor_without_anything_to_be_made_of_is_refused(
    pipeline, learner, tiny_pipelines, tmp_path
):
    guided_early = GuidanceConfig(omega=0.1, every=4, until=0.5, anchor=0.5)
    late = new_sampler(pipeline, learner, guidance=guided_early, cfg_interval=(0.5, 1.0))
    with pytest.raises(InputError, match=r"none of the guided steps lies in cfg_interval = \(0.5,"):
        late.generate(LABELS)
    assert len(late.generate(LABELS, omega=0.0)) == 3
    early = GuidanceConfig(omega=0.1, every=2, anchor=0.5)
    early = new_sampler(pipeline, learner, guidance=early, cfg_interval=(0.0, 0.5))
    assert len(early.begin(LABELS)) == 3
    latents = torch.zeros(3, 4, 8, 8)
    assert len(early.begin(LABELS, latents=latents, step=0)) == 3
    with pytest.raises(InputError, match=r"none of the guided steps lies in cfg_interval"):
        early.begin(LABELS, latents=latents, step=1)
    with pytest.raises(InputError, match="step = 4: expected 0 to 3"):
        early.begin(LABELS, latents=latents, step=4)
    folder = tiny_pipelines.pixel(tmp_path, class_embeddings=3)
    pixels = Pipeline.from_pretrained(folder)
    small = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
    with pytest.raises(InputError, match=r"anchor = 0.5: needs .* has no null class; expected 0"):
        new_sampler(pixels, small).generate(LABELS)
    with pytest.raises(InputError, match=r"anchor = 0.5: guides only with a learner"):
        new_sampler(pipeline, None).generate(LABELS, anchor=0.5)


@pytest.mark.parametrize("other", [{"cfg_scale": 3.0}, {"seed": 5}], ids=str)
def test_parts_of_another_scale_or_seed_are_not_joined(other, pipeline, learner):
    one = new_sampler(pipeline, learner).begin(LABELS)
    part = new_sampler(pipeline, learner, **other).begin(LABELS)
    with pytest.raises(InputError, match=r"parts: one has \(cfg_scale, seed\) = .*the first \(2"):
        Trajectory.joined([one, part])
