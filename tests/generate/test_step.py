"""The step as one graph: how often it is compiled, what it reads on the host, what it does to a
batch's filling.
"""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.sampler import GuidedSampler
from dpfast.generate.step import Variant, to_uint8
from tests.generate.standin import Watch, force_reference


def new_sampler(pipeline, learner, **options):
    guidance = options.pop("guidance", GuidanceConfig(omega=0.1, every=2))
    return GuidedSampler(pipeline, learner, **{"steps": 4, "guidance": guidance, **options})


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({}, 3),  # guided, plain, decoding
        ({"cfg_interval": (0.25, 0.75), "eta": 0.5}, 5),  # both with and without CFG
        (
            {"solver": "dpmpp2m", "guidance": GuidanceConfig(omega=0.1, every=2, through="latent")},
            3,
        ),
    ],
    ids=["ddim", "cfg interval", "multistep, latent"],
)
def test_each_variant_compiles_once_as_one_graph(options, graphs, pipeline, learner):
    """Over steps, omegas, CFG scales, labels, seeds, updates of the learner and a partial
    batch.
    """
    sampler = new_sampler(pipeline, learner, compile=True, **options)
    counter = sampler.runner.backend = CompileCounterWithBackend("eager")
    torch._dynamo.utils.counters.clear()
    first = sampler.generate([0, 1, 2])
    assert counter.frame_count == graphs
    sampler.seed = 7
    omegas = torch.tensor([0.3, 0.1, 0.0])
    sampler.generate([2, 1, 0], [9, 2**40, 3], omega=omegas, cfg_scale=2.5)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.mul_(-1)
    sampler.seed = 0
    updated = sampler.generate([0, 1, 2])
    list(sampler.stream([0, 1, 2, 0, 1], batch_size=3))
    assert counter.frame_count == graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not torch.equal(first.images, updated.images)  # the compiled steps read the live weights


@pytest.mark.slow
def test_inductor_makes_the_eager_guided_step(pipeline, learner):
    sampler = new_sampler(pipeline, learner, steps=1, compile=True)
    start = sampler.begin([0, 1, 2])
    sampler.close()
    expected = sampler.advance(start).x
    sampler.runner.prepare(4, compile=True)
    compiled = sampler.advance(start).x
    assert sampler.runner.compiled
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("through", ["denoiser", "latent"])
def test_a_trajectory_reads_nothing_on_the_host(through, pipeline, learner, monkeypatch):
    force_reference(monkeypatch)
    guidance = GuidanceConfig(omega=0.1, every=2, through=through)
    sampler = new_sampler(
        pipeline, learner, guidance=guidance, cfg_interval=(0.25, 0.75), eta=0.5, compile=False
    )
    start = sampler.begin([0, 1], [0, 1])
    with torch.no_grad(), Watch() as watch:
        latents = sampler.advance(start).x
        sampler.runner.finish(latents)
    assert not watch.reads
    assert len(watch.calls) > 100


def test_a_filling_row_is_not_counted_as_skipped(pipeline):
    """Five samples whose gradient is not finite, in batches filled up to four: ten skips in two
    guided steps.
    """

    factor = torch.ones(())

    def broken(images):
        return images.flatten(1)[:, :3] * factor

    sampler = new_sampler(pipeline, broken, compile=True)
    sampler.runner.backend = "eager"
    sampler.runner.check_learner()  # which would refuse it
    factor.fill_(torch.inf)
    batches = list(sampler.stream([0, 1, 2, 0, 1], batch_size=4))
    assert [b.skipped for b in batches] == [8, 2]
    unguided = GuidedSampler(pipeline, steps=4, compile=False).generate([0, 1, 2, 0])
    assert int((batches[0].images.int() - unguided.images.int()).abs().max()) <= 1


def test_the_solvers_memory_reaches_the_next_step(pipeline, learner):
    """DPM-Solver++ 2M: without x0 of the step before, a step falls back to the first order and
    differs.
    """
    sampler = new_sampler(pipeline, learner, solver="dpmpp2m", compile=False)
    state = sampler.begin([0])
    expected = sampler.advance(state).x
    for step in range(len(sampler.table)):
        state = sampler.advance(state, step + 1)
        state = dataclasses.replace(state, x0_prev=torch.zeros_like(state.x))
    forgotten = state.x
    assert sampler.table.needs_x0_prev
    assert float((expected - forgotten).abs().max()) > 1e-2


def test_variants_follow_both_intervals(pipeline, learner):
    guidance = GuidanceConfig(omega=0.1, every=2, start=0.25, until=0.8)
    sampler = new_sampler(pipeline, learner, steps=8, guidance=guidance, cfg_interval=(0.5, 1.0))
    variants = sampler.variants(guided=True)
    assert [i for i, v in enumerate(variants) if v.guided] == [2, 4, 6]
    assert [i for i, v in enumerate(variants) if v.cfg] == [4, 5, 6, 7]
    assert str(Variant(True, False)) == "guided step without CFG"


def test_to_uint8_rounds_to_the_nearest():
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])).tolist() == [
        0,
        0,
        128,
        255,
        255,
        255,
    ]
