"""Attention kernels, dtypes and memory format: what is chosen is what runs, and the images stay the
same.
"""

import importlib
import importlib.util
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpfast.config import Recipe
from dpfast.errors import InputError
from dpfast.generate import step as step_module
from dpfast.generate.from_recipe import load_pipeline
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.models.decoder import _repeat
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from dpfast.ops import guided_step
from tests.tiny_pipelines import NAMES

FOLDERS = {
    "pipeline_folder": None,
    "stable_diffusion_folder": NAMES,
    "stable_diffusion_3_folder": NAMES,
}


@pytest.fixture(params=[*FOLDERS, "pixel_folder"])
def family(request):
    """A folder and the options that it needs."""
    return request.getfixturevalue(request.param), {"class_names": FOLDERS.get(request.param)}


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def call(pipeline):
    torch.manual_seed(1)
    x, labels = torch.randn(2, *pipeline.denoiser.sample_shape), torch.zeros(2, dtype=torch.int64)
    return pipeline.denoiser(x, pipeline.table(4).timesteps[1], labels)


def test_sdpa_is_the_default_of_every_family(family):
    folder, options = family
    pipeline = Pipeline.from_pretrained(folder, **options)
    with Operations() as seen:
        call(pipeline)
    assert any("scaled_dot_product" in name for name in seen.names)
    assert not any("softmax" in name for name in seen.names)


def xformers(tmp_path, monkeypatch, *, failure):
    """A package of that name, whose kernels load or, beside another torch, do not."""
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").write_text('__version__ = "0.0.35"\n')
    (tmp_path / "xformers" / "_cpp_lib.py").write_text(f"_cpp_library_load_exception = {failure}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()


@pytest.fixture
def forgotten():
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        del sys.modules[name]


def test_xformers_that_is_missing_is_named(pipeline_folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "xformers" else find(name)
    )
    recipe = Recipe.load("fashion", pipeline=str(pipeline_folder), attention="xformers")
    with pytest.raises(
        InputError,
        match=r"'xformers': not installed; pip install 'dpfast\[xformers\]', or use 'sdpa'",
    ):
        load_pipeline(recipe.generator, device="cpu")


def test_xformers_for_another_torch_is_named(pipeline_folder, tmp_path, monkeypatch, forgotten):
    built = (
        "RuntimeError('It was built for:\\n PyTorch 2.10.0 (you have another)\\n Please "
        "reinstall xformers')"
    )
    xformers(tmp_path, monkeypatch, failure=built)
    message = (
        r"version 0\.0\.35 does not match torch 2.*\(It was built for: PyTorch 2\.10\.0 "
        r"\(you have another\)\)"
    )
    with pytest.raises(InputError, match=message):
        Pipeline.from_pretrained(pipeline_folder, attention="xformers")


def test_xformers_without_a_gpu_is_refused(pipeline_folder, tmp_path, monkeypatch, forgotten):
    xformers(tmp_path, monkeypatch, failure=None)
    with pytest.raises(InputError, match="runs on a GPU alone, and device = 'cpu'"):
        GuidedSampler.from_pretrained(pipeline_folder, attention="xformers")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_update_stays_in_fp32(dtype, pipeline_folder, learner, monkeypatch):
    """The network runs in its dtype on an input of that dtype; state, table and update are fp32,
    guided or not.
    """
    sampler = GuidedSampler.from_pretrained(
        pipeline_folder,
        learner,
        dtype=dtype,
        guidance=GuidanceConfig(omega=0.1, every=2),
        steps=4,
        compile=False,
    )
    wanted, inputs, updates = getattr(torch, dtype), [], []
    sampler.pipeline.denoiser.model.pos_embed.register_forward_pre_hook(
        lambda _, a: inputs.append(a[0].dtype)
    )

    def watched(x, conditional, unconditional, gradient, rows, step, **options):
        out = guided_step(x, conditional, unconditional, gradient, rows, step, **options)
        updates.append((x, conditional, unconditional, gradient, rows, step, options, out))
        return out

    monkeypatch.setattr(step_module, "guided_step", watched)
    latents = sampler.advance(sampler.begin([0, 1, 2], [0, 1, 2])).x
    assert latents.dtype == torch.float32
    assert set(inputs) == {wanted}
    for x, conditional, unconditional, gradient, rows, step, options, out in updates:
        assert (x.dtype, rows.dtype, out.dtype) == (torch.float32,) * 3
        assert conditional.dtype == unconditional.dtype == wanted
        options = {
            name: value for name, value in options.items() if name not in ("skipped", "x0_out")
        }
        exact = guided_step(
            x, conditional.float(), unconditional.float(), gradient, rows, step, **options
        )
        torch.testing.assert_close(out, exact, rtol=1e-6, atol=1e-6)
    assert [gradient is not None for _, _, _, gradient, *_ in updates] == [True, False, True, False]


def test_bf16_makes_nearly_the_images_of_fp32(family):
    folder, options = family
    predictions = [
        call(Pipeline.from_pretrained(folder, dtype=dtype, **options))
        for dtype in ("float32", "bfloat16")
    ]
    assert predictions[1].dtype == torch.bfloat16
    error = (predictions[1].float() - predictions[0]).norm() / predictions[0].norm()
    assert 1e-6 < float(error) < 0.05


@pytest.mark.parametrize("kind", ["stable_diffusion_folder", "pixel_folder"])
def test_channels_last_makes_the_same_images(kind, request, monkeypatch):
    """Guided and not; the weights and what the upsampling repeats are in that format."""
    folder, names = request.getfixturevalue(kind), list(NAMES)
    recipe = Recipe.load(
        "fashion", pipeline=str(folder), class_names=",".join(names), channels_last=True
    )
    pipelines = (
        load_pipeline(recipe.generator, device="cpu"),
        Pipeline.from_pretrained(folder, class_names=names),
    )
    weight = pipelines[0].denoiser.model.conv_in.weight
    assert pipelines[1].denoiser.model.conv_in.weight.is_contiguous()
    assert weight.is_contiguous(memory_format=torch.channels_last)
    learner = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 3)
    ).eval()
    guidance = GuidanceConfig(omega=0.1, every=2)
    made = [
        GuidedSampler(pipeline, learner, guidance=guidance, steps=4, compile=False).generate(
            [0, 1, 2]
        )
        for pipeline in pipelines
    ]
    assert int((made[0].images.int() - made[1].images.int()).abs().max()) <= 1
    torch.testing.assert_close(made[0].entropy, made[1].entropy, rtol=1e-3, atol=1e-4)


def test_repeating_keeps_the_memory_format():
    x = torch.randn(2, 3, 4, 5)
    plain, last = (
        _repeat(torch.nn.Identity(), (y,))[0] for y in (x, x.to(memory_format=torch.channels_last))
    )
    assert torch.equal(plain, torch.nn.functional.interpolate(x, scale_factor=2.0))
    assert torch.equal(plain, last)
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
