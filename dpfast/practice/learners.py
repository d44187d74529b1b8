"""A recipe's classifier: new, or from the folder of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from dpfast.config import Recipe
from dpfast.errors import RecipeError
from dpfast.generate.pipelines import Pipeline
from dpfast.learn.models import build_learner, load_judge
from dpfast.learn.precision import in_precision
from dpfast.practice.run_folder import RECIPE


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

    Raises ``RecipeError`` when the folder holds no learner, or one whose classes are not the
    pipeline's.
    """
    if folder is None:
        return load_judge().to(pipeline.device)
    weights, recipe_file = Path(folder) / f"learner_{source}.safetensors", Path(folder) / RECIPE
    if not weights.is_file() or not recipe_file.is_file():
        raise RecipeError(
            f"learner = {str(folder)!r}: not the folder of a finished run, it has no {weights.name}"
        )
    recipe = Recipe.from_dict(json.loads(recipe_file.read_text()))
    model = new_learner(recipe, pipeline)
    try:
        model.load_state_dict(load_file(weights))
    except RuntimeError as error:
        raise RecipeError(
            f"learner = {str(folder)!r}: does not fit the pipeline: "
            f"{str(error).splitlines()[1].strip()}"
        ) from error
    return in_precision(
        model.eval().requires_grad_(False), recipe.learner.precision, pipeline.device
    )
