"""Regional compilation: the same steps, guided and cached ones too, from code that all blocks of a
kind share.
"""

import pytest
import torch

from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from tests.tiny_pipelines import NAMES

GUIDANCE = GuidanceConfig(omega=0.3, every=4)


class Counting:
    """A backend that counts the graphs and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(params=["pipeline_folder", "stable_diffusion_3_folder"])
def transformer(request):
    names = None if request.param == "pipeline_folder" else NAMES
    return Pipeline.from_pretrained(request.getfixturevalue(request.param), class_names=names)


def pair(pipeline, learner, backend, **options):
    """Whole steps, eager, and the blocks compiled."""
    options = {"guidance": GUIDANCE, "steps": 5, **options}
    eager = GuidedSampler(pipeline, learner, compile=False, **options)
    regional = GuidedSampler(pipeline, learner, compile=True, compile_region="blocks", **options)
    regional.runner.backend = backend
    return eager, regional


def test_steps_are_the_same_guided_plain_and_cached(transformer):
    learner = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 3)).eval()
    eager, regional = pair(transformer, learner, Counting(), cache_interval=2)
    expected, got = (sampler.generate([0, 1, 2]) for sampler in (eager, regional))
    torch.testing.assert_close(got.latents, expected.latents, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-3, atol=1e-4)
    unguided = GuidedSampler(transformer, steps=5, cache_interval=2, compile=False).generate(
        [0, 1, 2]
    )
    assert float((got.latents - unguided.latents).abs().max()) > 0.05  # guidance did something


def test_depth_adds_no_graph(tiny_pipelines, tmp_path, learner):
    """A DiT of two blocks and one of five: as many compilations."""
    counts = []
    for layers in (2, 5):
        folder = tiny_pipelines.dit(tmp_path / str(layers), layers=layers)
        backend = Counting()
        _, regional = pair(Pipeline.from_pretrained(folder), learner, backend, cfg_scale=1.0)
        regional.generate([0, 1])
        counts.append(backend.graphs)
    assert counts == [2, 2]  # forward and backward


@pytest.mark.slow
def test_inductor_makes_the_same_steps(pipeline, learner):
    eager, regional = pair(pipeline, learner, "inductor", cfg_scale=1.0)
    latents = regional.generate([0, 1, 2]).latents
    torch.testing.assert_close(latents, eager.generate([0, 1, 2]).latents, rtol=2e-3, atol=2e-3)


def test_what_has_no_blocks_is_refused(pipeline, pixel_folder):
    with pytest.raises(ValueError, match="compile_region = 'layers': expected one of step, blocks"):
        GuidedSampler(pipeline, compile_region="layers")
    with pytest.raises(
        ValueError, match="compile_region = 'blocks': this denoiser has no transformer blocks"
    ):
        GuidedSampler.from_pretrained(pixel_folder, compile_region="blocks")
