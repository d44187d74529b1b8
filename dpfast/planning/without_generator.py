"""A stand-in for the generator of a run whose samples all exist."""

from __future__ import annotations

from dataclasses import replace

import torch

from dpfast.config import Recipe
from dpfast.errors import InputError, RecipeError
from dpfast.generate.from_recipe import check_generator, class_names
from dpfast.generate.protocol import NoGenerator
from dpfast.planning.architectures import META, pipeline_of
from dpfast.pool.stored import Stored
from dpfast.sources.other_pool import shape_of


def without_generator(recipe: Recipe, stored: Stored | None, device: torch.device) -> NoGenerator:
    """Returns the classes and the shape of a run's images: those of the pool that it reads, else
    those that the recipe's generator would make, whose weights need not be there.

    The recipe's ``class_names`` and ``image_size`` go before both. stored: the pool.

    Raises ``InputError`` where neither says them.
    """
    generator = recipe.generator
    names = class_names(generator)
    shape = None if stored is None else shape_of(stored)
    if names is None and stored is not None and stored.classes:
        names = tuple(stored.classes)
    try:
        if names is None:
            names = check_generator(generator) or None
        if shape is None:
            shape = replace(pipeline_of(generator), device=META).image_shape
    except InputError as error:
        raise RecipeError(
            f"{error}; its classes and the shape of its images are needed, if not its weights"
        ) from None
    if names is None:
        raise RecipeError("class_names: neither generator nor pool names the classes; say them")
    channels, height, width = shape
    if generator.image_size:
        height = width = generator.image_size
    return NoGenerator(names, (channels, height, width), device)
