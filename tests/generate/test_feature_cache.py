"""Feature caching: what reuses what, the same prediction from kept features, and guidance that
never sees them.
"""

import pytest
import torch

from dpfast.generate.feature_cache import FeatureCache, cached_steps
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from tests.generate.standin import StandInRecorder, force_reference
from tests.tiny_pipelines import NAMES

FOLDERS = {
    "pipeline_folder": None,
    "stable_diffusion_folder": NAMES,
    "stable_diffusion_3_folder": NAMES,
    "stable_diffusion_xl_folder": NAMES,
    "pixart_folder": NAMES,
    "sana_folder": NAMES,
    "flux_folder": NAMES,
}
LETTERS = {"compute": "c", "keep": "k", "reuse": "r"}


@pytest.fixture(params=[*FOLDERS, "pixel_folder"])
def family(request):
    size = {"height": 16, "width": 16} if request.param == "flux_folder" else {}
    return Pipeline.from_pretrained(
        request.getfixturevalue(request.param), class_names=FOLDERS.get(request.param), **size
    )


def new_sampler(pipeline, learner=None, *, every=4, **options):
    guidance = GuidanceConfig(omega=0.3, every=every)
    return GuidedSampler(
        pipeline, learner, guidance=guidance, **{"steps": 8, "compile": False} | options
    )


@pytest.mark.parametrize(
    ("guided", "cfg", "interval", "found"),
    [
        ("........", "++++++++", 1, "cccccccc"),
        ("........", "++++++++", 2, "krkrkrkr"),
        ("........", "++++++++", 3, "krrkrrkr"),
        ("g...g...", "++++++++", 2, "ckrcckrc"),
        ("g.g.g.g.", "++++++++", 2, "cccccccc"),
        ("gg....g.", "++++----", 2, "cckrkrcc"),
    ],
)
def test_nothing_is_reused_across_a_guided_step_or_a_change_of_cfg(guided, cfg, interval, found):
    steps = cached_steps([c == "g" for c in guided], [c == "+" for c in cfg], interval)
    assert "".join(LETTERS[step] for step in steps) == found


def test_at_the_same_input_kept_features_give_the_same_prediction(family):
    denoiser = family.denoiser
    cache = FeatureCache(denoiser)
    torch.manual_seed(1)
    x, labels = torch.randn(2, *denoiser.sample_shape), torch.zeros(2, dtype=torch.int64)
    t = family.table(4).timesteps
    whole = denoiser(x, t[0], labels)
    kept, features = cache.keep(x, t[0], labels)
    assert torch.equal(kept, whole)
    torch.testing.assert_close(cache.reuse(x, t[0], labels, features), whole, rtol=1e-4, atol=1e-4)
    later = denoiser(x + 0.1, t[1], labels)
    reused = cache.reuse(x + 0.1, t[1], labels, features)
    assert float((reused - later).abs().max()) > 1e-5
    # the outer blocks see the new input
    assert float((reused - whole).abs().max()) > 1e-5
    assert torch.equal(denoiser(x, t[0], labels), whole)


def test_guided_steps_run_the_whole_network(pipeline, learner):
    """A guided step from the same state is the same step, bit for bit, and so is all of a run
    without reuse.
    """
    cached, whole = (new_sampler(pipeline, learner, cache_interval=n) for n in (2, 1))
    state = cached.advance(cached.begin([0, 1, 2], [0, 1, 2]), 4)
    assert [LETTERS[v.features] for v in cached.variants(guided=True)] == list("ckrcckrc")
    assert torch.equal(cached.advance(state, 5).x, whole.advance(state, 5).x)
    assert torch.equal(cached.advance(state, 5).value, whole.advance(state, 5).value)
    assert not torch.equal(cached.generate([0, 1]).latents, whole.generate([0, 1]).latents)
    cached, whole = (new_sampler(pipeline, learner, every=2, cache_interval=n) for n in (2, 1))
    assert torch.equal(cached.generate([0, 1]).latents, whole.generate([0, 1]).latents)


def test_a_reusing_step_runs_the_outer_blocks_alone(pipeline):
    calls = []
    hooks = [
        block.ff.register_forward_hook(lambda *_, index=index: calls.append(index))
        for index, block in enumerate(pipeline.denoiser.model.transformer_blocks)
    ]
    new_sampler(pipeline, cache_interval=2, steps=4).generate([0, 1])
    for hook in hooks:
        hook.remove()
    assert calls == [0, 1, 0] * 2


@pytest.mark.parametrize("stops", [(3,), (1, 2, 6)])
def test_a_trajectory_that_stops_thins_out_and_joins_keeps_its_features(pipeline, learner, stops):
    sampler = new_sampler(pipeline, learner, cache_interval=3, steps=8, every=5)
    ids = [3, 4, 5, 6]
    whole = sampler.advance(sampler.begin([0, 1, 2, 0], ids)).x
    state = sampler.begin([0, 1, 2, 0], ids)
    for stop in stops:
        state = sampler.advance(state, stop)
    halves = [state.take(torch.tensor(rows)) for rows in ([3, 1], [0, 2])]
    joined = type(state).joined([sampler.advance(half, stops[-1] + 1) for half in halves])
    torch.testing.assert_close(sampler.advance(joined).x, whole[[3, 1, 0, 2]], rtol=1e-4, atol=1e-4)


def test_a_trajectory_that_begins_where_features_are_reused_keeps_its_own(pipeline):
    cached, whole = (new_sampler(pipeline, cache_interval=n) for n in (2, 1))
    clean = torch.randn(2, *pipeline.denoiser.sample_shape)
    begun = [sampler.begin([0, 1], [0, 1], latents=clean, step=1) for sampler in (cached, whole)]
    first, second = (
        sampler.advance(state, 2) for sampler, state in zip((cached, whole), begun, strict=True)
    )
    assert torch.equal(first.x, second.x)


def test_each_variant_is_one_full_graph(pipeline):
    """Traced without a break, and recaptured for nothing."""
    eager, traced = (new_sampler(pipeline, cache_interval=2, steps=4) for _ in range(2))
    traced.runner.backend = "eager"
    traced.runner.prepare(4, compile=True)
    latents = traced.generate([0, 1, 2]).latents
    torch.testing.assert_close(latents, eager.generate([0, 1, 2]).latents, rtol=1e-3, atol=1e-3)


def test_a_capture_holds_the_features_as_an_input(pipeline, monkeypatch):
    force_reference(monkeypatch)
    recorder = StandInRecorder()
    eager, captured = (
        new_sampler(pipeline, cache_interval=2, steps=6, cuda_graphs=graphs)
        for graphs in (False, recorder)
    )
    for labels in ([0, 1, 2], [2, 1, 0]):
        latents = captured.generate(labels).latents
        torch.testing.assert_close(latents, eager.generate(labels).latents, rtol=1e-3, atol=1e-3)
    assert recorder.recorded == 3  # keep, reuse, decoding
    assert not captured.runner.fallbacks


def test_what_cannot_be_cached_is_refused(pipeline):
    with pytest.raises(ValueError, match="cache_interval = 0: expected at least 1"):
        GuidedSampler(pipeline, cache_interval=0)
    with pytest.raises(ValueError, match="cache_interval: a Linear has no inner blocks"):
        FeatureCache(torch.nn.Linear(1, 1))
