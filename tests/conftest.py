"""Fixtures: tiny random pipeline folders, the embedded pipeline, and a small learner."""

import os

import pytest
import torch
from torch import nn

# What is printed into a file is not folded. readline, which pytest loads, tells the processes that
# pytest starts of a terminal of 80 columns.
os.environ.pop("COLUMNS", None)
os.unsetenv("COLUMNS")


@pytest.fixture(scope="session")
def tiny_pipelines():
    """Makers of pipeline folders. Imported here: the operations are tested where diffusers is not
    installed, too.
    """
    pytest.importorskip("diffusers", reason="the pipeline folders are written by diffusers")
    from tests import tiny_pipelines

    return tiny_pipelines


@pytest.fixture(scope="session")
def pipeline_folder(tiny_pipelines, tmp_path_factory):
    """A randomly initialised DiTPipeline folder of three classes, epsilon-prediction, with a tiny
    decoder.
    """
    torch.manual_seed(0)
    return tiny_pipelines.dit(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def stable_diffusion_folder(tiny_pipelines, tmp_path_factory):
    """Stable Diffusion 1.x at tiny size, with a PNDM scheduler and no class names of its own."""
    torch.manual_seed(0)
    return tiny_pipelines.stable_diffusion(tmp_path_factory.mktemp("stable_diffusion"))


@pytest.fixture(scope="session")
def stable_diffusion_xl_folder(tiny_pipelines, tmp_path_factory):
    """Stable Diffusion XL at tiny size: two text encoders, sizes, a scheduler of Euler's."""
    torch.manual_seed(0)
    return tiny_pipelines.stable_diffusion_xl(tmp_path_factory.mktemp("stable_diffusion_xl"))


@pytest.fixture(scope="session")
def stable_diffusion_3_folder(tiny_pipelines, tmp_path_factory):
    """Stable Diffusion 3 at tiny size: three text encoders, a flow of shift 3, latents with a
    shift.
    """
    torch.manual_seed(0)
    return tiny_pipelines.stable_diffusion_3(tmp_path_factory.mktemp("stable_diffusion_3"))


@pytest.fixture(scope="session")
def pixart_folder(tiny_pipelines, tmp_path_factory):
    return tiny_pipelines.pixart(tmp_path_factory.mktemp("pixart"))


@pytest.fixture(scope="session")
def flux_folder(tiny_pipelines, tmp_path_factory):
    """FLUX.1 dev, whose images are 256 px unless another size is asked for."""
    return tiny_pipelines.flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def sana_folder(tiny_pipelines, tmp_path_factory):
    return tiny_pipelines.sana(tmp_path_factory.mktemp("sana"))


@pytest.fixture(scope="session")
def pixel_folder(tiny_pipelines, tmp_path_factory):
    """An unconditional DDIMPipeline of 8x8 images that bounds x0 to [-1, 1]."""
    torch.manual_seed(0)
    return tiny_pipelines.pixel(tmp_path_factory.mktemp("pixel"))


@pytest.fixture(scope="session")
def pipeline(pipeline_folder):
    from dpfast.generate.pipelines import Pipeline

    return Pipeline.from_pretrained(pipeline_folder)


@pytest.fixture(scope="session")
def fashion():
    """The embedded pipeline."""
    pytest.importorskip("diffusers", reason="the embedded generator is a diffusers pipeline")
    from dpfast.generate.pipelines import Pipeline

    return Pipeline.from_pretrained("fashion")


@pytest.fixture
def learner():
    """A small random classifier of 16x16 images into three classes."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 49, 3)
    ).eval()
