"""Run the loop on a folder of images of your own, with a diffusion model trained on them.

    python examples/own_images.py FOLDER OUT

FOLDER has a sub-folder for each class. A small model learns from half of the images in a minute.
"""

import json
import sys
from pathlib import Path

import diffusers
import torch
from torch import nn

import dpfast
from dpfast.data.folders import open_folder


def train(images, labels, classes: int, steps: int) -> diffusers.DDIMPipeline:
    """A generator by class id, from images (N, 3, 16, 16) uint8 and labels (N,)."""
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    blocks |= {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    unet = diffusers.UNet2DModel(16, num_class_embeds=classes + 1, **blocks)  # the last: no class
    noise = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        seen = labels[rows].where(torch.rand(64) > 0.1, classes)  # classifier-free guidance
        x0, at = images[rows].float() / 127.5 - 1, torch.randint(1000, (64,))
        eps = torch.randn_like(x0)
        found = unet(noise.add_noise(x0, eps, at), at, class_labels=seen).sample
        optimizer.zero_grad()
        nn.functional.mse_loss(found, noise.get_velocity(x0, eps, at)).backward()
        optimizer.step()
    return diffusers.DDIMPipeline(unet, noise)


def main(folder: str, out: str, training: int = 500, **sizes: int) -> list[dpfast.Result]:
    """Returns the results of "dp" and "static"; sizes: fields of the recipe."""
    torch.manual_seed(0)
    names = sorted(each.name for each in Path(folder).iterdir() if each.is_dir())
    files, model = open_folder(Path(folder), names, (3, 16, 16), ids=None), Path(out) / "model"
    halves = dpfast.RealData.split(*map(torch.cat, zip(*files.batches(), strict=True)), names)
    train(halves.test.images, halves.test.labels, len(names), training).save_pretrained(model)
    (model / "class_names.json").write_text(json.dumps(names), encoding="utf-8")
    fields = {"initial_samples": 200, "round_samples": 100, "maximum_samples": 500} | sizes
    recipe = dpfast.Recipe.load("fashion", pipeline=str(model), **{"iterations": 300} | fields)
    layers = [nn.Conv2d(3, 32, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1152, len(names))]
    real = (halves.validation.images, halves.validation.labels)
    practice = dpfast.DeliberatePractice(recipe, learner=nn.Sequential(*layers), real=real)
    results = practice.run(Path(out) / "run", progress=False)
    for result in results:
        print(f"{result.source}: {len(result.pool)} samples, accuracy {result.test.top1:.1%}")
    return results


if __name__ == "__main__":
    main(*sys.argv[1:3])
