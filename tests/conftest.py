"""Fixtures: a tiny random pipeline folder, the embedded pipeline, and a small learner."""

import diffusers
import pytest
import torch
from torch import nn

from dpfast.generate.pipeline import Pipeline


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """A randomly initialised DiTPipeline folder of three classes, epsilon-prediction, with a tiny decoder."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
    )
    for parameter in transformer.parameters():  # adaLN-zero would make the output independent of the input
        nn.init.normal_(parameter, std=0.1)
    vae = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
    )
    tiny = diffusers.AutoencoderTiny(
        in_channels=1,
        out_channels=1,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    names = {"0": "cat", "1": "dog", "2": "red bicycle"}
    pipeline = diffusers.DiTPipeline(transformer, vae, scheduler, id2label=names)
    pipeline.register_to_config(id2label=names)
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    tiny.save_pretrained(folder / "tiny_decoder")
    return folder


@pytest.fixture(scope="session")
def pipeline(pipeline_folder):
    return Pipeline.from_pretrained(pipeline_folder)


@pytest.fixture(scope="session")
def fashion():
    """The embedded pipeline."""
    return Pipeline.from_pretrained("fashion")


@pytest.fixture
def learner():
    """A small random classifier of 16x16 images into three classes."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 49, 3)).eval()
