"""Train a classifier of your own, then make samples that it finds hard.

    python examples/own_classifier.py

The classifier is any ``nn.Module`` from images (B, C, H, W) in [-1, 1] to logits (B, K). The
sampler reads its weights as they are, so that training it further changes the next samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import dpfast
from dpfast.data.real import load_real


def main(steps: int = 300, samples: int = 100) -> dict[str, tuple[float, float]]:
    """Returns mean entropy and accuracy of real images, unguided samples and guided ones."""
    torch.manual_seed(0)
    classifier = nn.Sequential(
        *(nn.Conv2d(1, 16, 5, 2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 36, 10)),
    )
    real = load_real("fashion")  # 5,000 images to train on, and as many others
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(real.validation), (64,))
        images = real.validation.images[rows].float() / 127.5 - 1
        loss = F.cross_entropy(classifier(images), real.validation.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    sampler = dpfast.GuidedSampler.from_pretrained(
        "fashion", classifier.eval(), guidance=dpfast.GuidanceConfig(every=2), steps=8
    )
    labels = torch.arange(samples) % 10
    unguided = sampler.generate(labels, omega=0.0).images  # the same noise in both
    guided = sampler.generate(labels, omega=0.08).images
    found = {}
    for name, images, truth in (
        ("real images", real.test.images, real.test.labels),
        ("unguided samples", unguided, labels),
        ("guided samples", guided, labels),
    ):
        with torch.no_grad():
            logits = classifier(images.float() / 127.5 - 1)
        accuracy = float((logits.argmax(1) == truth).float().mean())
        found[name] = (float(dpfast.entropy(logits).mean()), accuracy)
        print(f"{name}: entropy {found[name][0]:.2f} nats, accuracy {accuracy:.0%}")
    return found


if __name__ == "__main__":
    main()
