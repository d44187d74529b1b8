"""Measures of a classifier and of samples on real images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpfast.ops import entropy


@dataclass(frozen=True)
class Evaluation:
    """top1: fraction in [0, 1]; loss: nats; entropy: mean prediction entropy, nats; per_class: (K,) fractions."""

    top1: float
    loss: float
    entropy: float
    per_class: Tensor


@torch.no_grad()
def predict(model: Callable[[Tensor], Tensor], images: Tensor, *, batch_size: int = 500) -> Tensor:
    """Logits (N, K) of uint8 images (N, C, H, W), scaled to [-1, 1]; a module is run in eval mode and put back."""
    was_training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    logits = torch.cat([model(part.float().div(127.5).sub(1.0)) for part in images.split(batch_size)])
    if isinstance(model, nn.Module):
        model.train(was_training)
    return logits


def evaluate(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Evaluation:
    """Evaluates on uint8 images (N, C, H, W) with labels (N,)."""
    logits = predict(model, images)
    hits = (logits.argmax(1) == labels).float()
    classes = logits.shape[1]
    count = torch.bincount(labels, minlength=classes).clamp(min=1)
    return Evaluation(
        top1=float(hits.mean()),
        loss=float(F.cross_entropy(logits, labels)),
        entropy=float(entropy(logits).mean()),
        per_class=torch.zeros(classes).index_add_(0, labels, hits) / count,
    )


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of features (N, D) and (M, D) (Heusel et al. 2017, eq. 6), in float64.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)); the trace of the root is that of the root of B^(1/2) A B^(1/2).
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_b)
    root_b = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_b @ cov_a @ root_b).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
