"""Sample and guide a network of your own, here one with the preconditioning of EDM and EDM2.

    python examples/own_denoiser.py

D(y, s) finds x0 in y = x0 + s n; a denoiser is given x = alpha y, and s = sigma / alpha.
"""

from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from torch import Tensor

import dpfast
from dpfast.generate.models.decoder import IdentityDecoder

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
LOW, HIGH, LEVELS, STD = 0.002, 80.0, 1000, 0.5  # of s, of the data


def scheduler() -> diffusers.EulerDiscreteScheduler:
    """Levels even in log s, sampled on the grid of Karras et al. (arXiv 2206.00364, eq. 5)."""
    s = LOW * (HIGH / LOW) ** torch.linspace(0, 1, LEVELS, dtype=torch.float64)
    kept = 1 / (1 + s * s)  # alpha^2
    betas = (1 - kept / torch.cat([torch.ones(1), kept[:-1]])).tolist()
    grid = {"use_karras_sigmas": True, "sigma_min": LOW, "sigma_max": HIGH}
    grid["timestep_spacing"] = "trailing"  # by which solver = "auto" is Euler's
    return diffusers.EulerDiscreteScheduler(trained_betas=betas, **grid)


class Preconditioned:
    """A ``dpfast.generate.models.denoiser.Denoiser`` around ``network(y, noise, labels)``."""

    prediction = "sample"  # x0

    def __init__(self, network: Network, classes: int, sample_shape: tuple[int, int, int]):
        self.network, self.classes, self.sample_shape = network, classes, sample_shape
        self.null_label = classes  # the label of no class; None where there is none

    def __call__(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        s = LOW * (HIGH / LOW) ** (timestep / (LEVELS - 1))  # 0-d, and never read by the host
        y, size = x * (1 + s * s).sqrt(), (s * s + STD**2).sqrt()
        found = self.network(y / size, (s.log() / 4).expand(len(x)), labels)
        return y * (STD / size) ** 2 + found * s * STD / size  # table 1 of the same paper


def pipeline_of(network: Network, names: tuple[str, ...], side: int) -> dpfast.Pipeline:
    """A generator of images (3, side, side); with latents their decoder is in both places."""
    denoiser, images = Preconditioned(network, len(names), (3, side, side)), IdentityDecoder()
    cpu = torch.device("cpu")
    return dpfast.Pipeline(Path("mine"), denoiser, images, images, scheduler(), names, 3, cpu)


if __name__ == "__main__":  # a network that has learned nothing
    made = pipeline_of(lambda y, noise, labels: y, ("cat", "dog"), 16)
    images = dpfast.GuidedSampler(made, steps=8, cfg_scale=2.0).generate([0, 1]).images
    print(f"images {tuple(images.shape)}, {images.dtype}")
