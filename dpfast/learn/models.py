"""Learners from their names: any ``nn.Module`` that maps images (B, C, H, W) to logits (B, K)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dpfast.config import ASSETS, RECIPE_FILE, Recipe, read_recipe
from dpfast.errors import InputError
from dpfast.extras import EXTRAS, require
from dpfast.generate.pipelines import Pipeline
from dpfast.learn.precision import in_precision


class _Logits(nn.Module):
    """A model of the transformers library, returning its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def build_learner(spec: str, *, classes: int, channels: int, **options: Any) -> nn.Module:
    """Builds a randomly initialised classifier in channels-last memory.

    Args:
        spec: "transformers:RegNetForImageClassification" (any image classification class of
        transformers),
            "timm:resnet18" (any model of timm), or "package.module:factory", called with
            ``classes``, ``channels`` and the options.
        classes, channels: K and C.
        options: the model's own settings.

    Raises ``InputError`` when the library is not installed or does not know the name or an option.
    """
    library, _, name = spec.partition(":")
    if library in EXTRAS:
        require(library)
    try:
        module = importlib.import_module(library)
    except ImportError as error:
        raise InputError(f"model = {spec!r}: cannot import {library} ({error})") from None
    try:
        if library == "transformers":
            model: nn.Module = _transformers_model(module, name, classes, channels, options)
        elif library == "timm":
            model = module.create_model(name, num_classes=classes, in_chans=channels, **options)
        else:
            model = getattr(module, name)(classes=classes, channels=channels, **options)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"model = {spec!r}: {str(error).splitlines()[0]}") from error
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _transformers_model(
    module: Any, name: str, classes: int, channels: int, options: dict[str, Any]
) -> nn.Module:
    kind = getattr(module, name)
    unknown = set(options) - set(kind.config_class().to_dict())
    if unknown:
        raise InputError(
            f"options: {kind.config_class.__name__} has no {', '.join(sorted(unknown))}"
        )
    return _Logits(kind(kind.config_class(num_channels=channels, num_labels=classes, **options)))


def load_judge() -> nn.Module:
    """The embedded judge, a classifier of real Fashion-MNIST images: (B, 1, 32, 32) in [-1, 1] to
    logits (B, 10).

    A yardstick for samples (label agreement, Fréchet distance). No learner ever sees it or what it
    was trained on.
    """
    require("transformers")
    transformers, folder = importlib.import_module("transformers"), ASSETS / "fashion_judge"
    model = transformers.RegNetForImageClassification(
        transformers.RegNetConfig.from_pretrained(folder)
    )
    model.load_state_dict(
        load_file(folder / "model.safetensors")
    )  # float16 on disk, copied into float32
    return _Logits(model).eval().requires_grad_(False)


def new_learner(recipe: Recipe, pipeline: Pipeline) -> nn.Module:
    """The recipe's classifier on the pipeline's device, initialised from the recipe's seed on any
    device alike.
    """
    torch.manual_seed(recipe.seed)
    model = build_learner(
        recipe.learner.model,
        classes=pipeline.denoiser.classes,
        channels=pipeline.image_channels,
        **recipe.learner.options,
    )
    return model.to(pipeline.device)


def load_learner(folder: str | Path | None, pipeline: Pipeline, *, source: str = "dp") -> nn.Module:
    """The finished classifier of a run in eval mode and its precision; without a folder the
    embedded judge network.

    Raises ``InputError`` when the folder holds no learner, or one whose classes are not the
    pipeline's.
    """
    if folder is None:
        return load_judge().to(pipeline.device)
    weights = Path(folder) / f"learner_{source}.safetensors"
    recipe_file = Path(folder) / RECIPE_FILE
    if not weights.is_file() or not recipe_file.is_file():
        raise InputError(
            f"learner = {str(folder)!r}: not the folder of a finished run, it has no {weights.name}"
        )
    recipe = Recipe.from_dict(read_recipe(recipe_file))
    model = new_learner(recipe, pipeline)
    try:
        model.load_state_dict(load_file(weights))
    except RuntimeError as error:
        raise InputError(
            f"learner = {str(folder)!r}: does not fit the pipeline: "
            f"{str(error).splitlines()[1].strip()}"
        ) from error
    return in_precision(
        model.eval().requires_grad_(False), recipe.learner.precision, pipeline.device
    )


class Committee(nn.Module):
    """Several weights of one classifier as one learner, for criteria that compare predictions.

    Images (B, C, H, W) to logits (B, M, K), a row for each of M members, which are read live. The
    first member speaks for all where one prediction is asked for. A batch costs the forwards and
    backwards of all.
    """

    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images) for member in self.members], dim=1)


def guiding(criterion: str, guide: nn.Module, other: nn.Module) -> nn.Module:
    """Return what a sampler takes for its learner: ``guide``, or for the criterion "disagreement"
    it and ``other``.
    """
    return Committee(guide, other) if criterion == "disagreement" else guide
