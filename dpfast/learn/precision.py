"""The precision that a learner runs in: when it trains, when it is evaluated, and when it
guides.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from dpfast.hardware.device import is_gpu


def in_bf16(precision: str, device: torch.device) -> bool:
    """Returns True if ``precision`` means bf16 on ``device``: "auto" does on a GPU that has it."""
    return precision == "bf16" or (
        precision == "auto" and is_gpu(device) and torch.cuda.is_bf16_supported()
    )


def autocast(bf16: bool, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Returns a context within which matrix products and convolutions run in bf16, which has the
    exponents of fp32: no gradient is scaled.

    Casts of weights are not kept: a captured step has to make them anew from the weights of its
    moment.
    """
    return (
        torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
        if bf16
        else contextlib.nullcontext()
    )


def in_precision(classifier: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """Returns the classifier as a recipe's ``precision`` runs it on ``device``, its weights read
    live.
    """
    return Autocast(classifier) if in_bf16(precision, device) else classifier


class Autocast(nn.Module):
    """A classifier under ``autocast``: images (B, C, H, W) to its logits in float32. It trains
    where that one does.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    @property
    def training(self) -> bool:
        return self.classifier.training

    @training.setter
    def training(self, mode: bool) -> None:
        """Does nothing: ``train`` and ``eval`` reach the classifier."""

    def forward(self, images: Tensor) -> Tensor:
        with autocast(True, images.device):
            return self.classifier(images).float()
