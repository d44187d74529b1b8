"""The protocol of a loop's generator: a ``Pipeline``, or an object of anybody's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.pipelines import Pipeline
from dpfast.samples import SampleBatch


class Sampler(Protocol):
    """Makes samples, guided by the learner that it was made with; ``GuidedSampler`` is one."""

    def stream(
        self,
        labels: Tensor,
        *,
        sample_ids: Tensor,
        batch_size: int,
        omega: float | None = None,
        cfg_scale: float | None = None,
        learner_step: int = 0,
    ) -> Iterator[SampleBatch]:
        """Yields batches of at most ``batch_size`` samples, all in their order, each once.

        Args:
            labels: (N,) int64 class ids.
            sample_ids: (N,) int64. A sample is a function of its id, its label and, where it is
                guided, the learner: a run that goes on makes the same ones again.
            batch_size: Samples of a batch: the recipe's, or less.
            omega: Strength of guidance; None: as configured.
            cfg_scale: Scale of classifier-free guidance; None: as configured.
            learner_step: Optimiser steps of the learner, to be handed on in the batches.
        """
        ...

    def release(self) -> None:
        """Gives back memory that is of use to the next batch alone."""
        ...


class OwnPipeline(Protocol):
    """A generator of one's own, for a loop in place of a ``Pipeline``.

    ``examples/own_pipeline.py`` is one.

    Attributes:
        class_names: Names of the classes, whose indices are the labels.
        image_shape: (C, H, W) of the images, uint8.
        device: Device where the learner is trained, and where samples are handed over.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    device: torch.device

    def sampler(self, learner: Any, *, guidance: GuidanceConfig, seed: int) -> Sampler:
        """Returns a sampler; a run calls this several times.

        Args:
            learner: Function from images (B, C, H, W) in [-1, 1] to logits (B, K), read live; None:
                unguided.
            guidance: Configuration by the recipe's [guidance], with the criterion. Its anchor is
                the sampler's to take.
            seed: The recipe's seed.
        """
        ...


class NoGenerator:
    """An ``OwnPipeline`` that makes nothing: of a run whose samples all exist."""

    def __init__(
        self,
        class_names: Sequence[str],
        image_shape: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        self.class_names, self.image_shape = tuple(class_names), image_shape
        self.device = device

    def sampler(self, learner: Any, *, guidance: GuidanceConfig, seed: int) -> Sampler:
        """Returns a sampler that no source asks for a sample."""
        return _NoSampler()


class _NoSampler:
    def stream(self, labels: Tensor, **options: Any) -> Iterator[SampleBatch]:
        """Raises ``InputError``: nothing is there that could make a sample."""
        raise InputError("sources: the run has loaded no generator")

    def release(self) -> None:
        """Does nothing: there is no memory to give back."""


def check_pipeline(pipeline: object) -> None:
    """Raises ``InputError`` for an object that lacks a part of ``OwnPipeline``, or has one of
    another kind.
    """
    if isinstance(pipeline, Pipeline):
        return
    for name in ("class_names", "image_shape", "device", "sampler"):
        if not hasattr(pipeline, name):
            raise InputError(
                f"pipeline: a {type(pipeline).__name__} has no {name}; expected a dpfast.Pipeline, "
                "or an object with the protocol dpfast.OwnPipeline"
            )
    own = cast(OwnPipeline, pipeline)
    for name, right, expected in (
        ("class_names", _are_names(own.class_names), "a tuple of one or more names"),
        ("image_shape", _is_shape(own.image_shape), "(C, H, W), three integers of at least 1"),
        ("device", isinstance(own.device, torch.device), "a torch.device"),
        ("sampler", callable(own.sampler), "a method"),
    ):
        if not right:
            raise InputError(
                f"pipeline: {name} of a {type(pipeline).__name__} is {getattr(pipeline, name)!r}; "
                f"expected {expected}, as in the protocol dpfast.OwnPipeline"
            )


def _are_names(value: object) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) > 0
        and all(isinstance(name, str) for name in value)
    )


def _is_shape(value: object) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 3
        and all(isinstance(size, int) and size >= 1 for size in value)
    )
