"""Regional compilation: the same steps, guided and cached ones too, from code that all blocks of a
kind share.
"""

import diffusers
import pytest
import torch

from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.models.regional import Regions
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.runner import _with_own_code
from dpfast.generate.sampler import GuidedSampler
from dpfast.learn.models import build_learner
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
    # forward and backward of the denoiser's block; the rest are the decoders'
    assert counts[0] == counts[1]


def vit(layers=2, **options):
    """A ViT of several layers, of which the weights want gradients, as those of a learner do."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    return build_learner(
        "transformers:ViTForImageClassification",
        classes=3,
        channels=1,
        image_size=16,
        patch_size=8,
        num_hidden_layers=layers,
        **sizes,
        **options,
    ).eval()


def twin(part, backend="aot_eager"):
    """The twin, and the functions that its blocks share."""

    def compile(function):
        own = _with_own_code(function)
        return torch.compile(own, fullgraph=True, dynamic=False, backend=backend)

    regions = Regions(compile)
    return regions.twin(part), regions.functions


def gradient(model, x):
    x = x.clone().requires_grad_()
    out = model(x)
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]


def unet():
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )


MODELS = {  # a model, a call, what it is called with, and its kinds of blocks
    # 8 and 16 channels; the middle has the 16 at 4 pixels, as the levels around it
    "unet": (unet, lambda m, x: m(x, 3, torch.ones(2, 5, 8)).sample, (2, 4, 8, 8), 2),
    # 16 channels twice in the middle and once in its level, then 16 to 8, and 8 twice
    "decoder": (
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        ),
        lambda m, x: m.decode(x).sample,
        (2, 4, 4, 4),
        4,
    ),
    # one kind at each of three sizes, the last of them one block
    "tiny decoder": (
        lambda: diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 2, 2),
            num_decoder_blocks=(2, 2, 1),
        ).to(memory_format=torch.channels_last),
        lambda m, x: m.decode(x).sample,
        (2, 4, 4, 4),
        3,
    ),
    "learner": (lambda: vit(3), lambda m, x: m(x), (2, 1, 16, 16), 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_a_kind_share_one_compilation(name):
    """Predictions and gradients are those of the model, taped and not."""
    make, call, shape, kinds = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    compiled, functions = twin(model)
    x = torch.randn(shape)
    expected, got = (gradient(lambda x, m=m: call(m, x), x) for m in (model, compiled))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert len(functions) == kinds
    with torch.no_grad():
        torch.testing.assert_close(call(compiled, x), expected[0], rtol=1e-4, atol=1e-5)
    assert len(functions) == kinds


def test_the_weights_of_a_learner_are_constants_and_may_change():
    learner, x = vit(), torch.randn(2, 1, 16, 16)
    compiled, _ = twin(learner)
    gradient(compiled, x)
    assert all(weight.grad is None for weight in learner.parameters())
    with torch.no_grad():
        for weight in learner.parameters():
            weight.mul_(1.5)
    replaced = next(m for m in learner.modules() if isinstance(m, torch.nn.Linear))
    replaced.weight = torch.nn.Parameter(torch.randn_like(replaced.weight))
    torch.testing.assert_close(gradient(compiled, x), gradient(learner, x), rtol=1e-4, atol=1e-5)


def test_what_stands_alone_or_is_fused_runs_as_it_is(pipeline_folder):
    one = vit(1)
    assert twin(one)[0] is one
    fused = Pipeline.from_pretrained(pipeline_folder, fused=True)
    assert twin(fused.denoiser)[0].model is fused.denoiser.model


@pytest.mark.parametrize(
    ("folder", "fused"),
    [
        ("pipeline_folder", True),
        ("stable_diffusion_folder", True),
        ("stable_diffusion_folder", False),
    ],
)
def test_every_model_of_a_guided_sampler_has_its_region(folder, fused, request):
    """Guided and plain steps, with a ViT of two layers."""
    names = None if folder == "pipeline_folder" else NAMES
    pipeline = Pipeline.from_pretrained(
        request.getfixturevalue(folder), class_names=names, fused=fused
    )
    torch.manual_seed(0)
    channels = int(pipeline.decoder.model.config.out_channels)
    learner = vit() if channels == 1 else torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), vit())
    eager, regional = pair(pipeline, learner.eval(), Counting(), steps=2)
    expected, got = (sampler.generate([0, 1, 2]) for sampler in (eager, regional))
    torch.testing.assert_close(got.latents, expected.latents, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-3, atol=1e-4)
    assert all(weight.grad is None for weight in learner.parameters())


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
