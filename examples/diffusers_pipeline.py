"""Guide a diffusers pipeline that you have, by a callback that moves its latents between steps.

    python examples/diffusers_pipeline.py FOLDER "a photo of a dog"

FOLDER is what ``StableDiffusionPipeline.save_pretrained`` wrote. An untrained network stands for
the classifier; put yours in its place. A tiny decoder (``AutoencoderTiny``) makes guidance cheaper.
"""

from __future__ import annotations

import sys

import diffusers
import torch
from torch import nn

import dpfast


def main(folder: str, prompt: str = "a photo of a dog", steps: int = 20) -> tuple[float, float]:
    """Returns the entropy, in nats, of one image without guidance and with it."""
    torch.manual_seed(0)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    channels = pipe.vae.config.out_channels
    classifier = nn.Sequential(
        nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(64 * channels, 10)
    ).eval()
    guidance = dpfast.GuidanceConfig(omega=0.1, every=2)
    callback = dpfast.GuidanceCallback(pipe, classifier, guidance=guidance)

    entropies = []
    for name, each in (("unguided", None), ("guided", callback)):
        noise = torch.Generator().manual_seed(1)  # the same for both
        (image,) = pipe(
            prompt,
            num_inference_steps=steps,
            generator=noise,
            callback_on_step_end=each,
            output_type="pt",
        ).images
        with torch.no_grad():
            entropies.append(float(dpfast.entropy(classifier(2 * image[None] - 1))))
        print(f"{name}: image {tuple(image.shape)}, entropy {entropies[-1]:.4f} nats")
    print(f"{callback.skipped} steps were left unguided, because their gradient was not finite")
    return entropies[0], entropies[1]


if __name__ == "__main__":
    main(*sys.argv[1:3])
