"""The pool of a run: how many samples a rank may hold, of which shape, and where they lie."""

from __future__ import annotations

from pathlib import Path

from dpfast.config import Recipe
from dpfast.data.real import RealData
from dpfast.generate.from_recipe import latent_shape
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.protocol import OwnPipeline
from dpfast.parallel import Ranks
from dpfast.pool.placement import Placement
from dpfast.pool.pool import SamplePool
from dpfast.pool.protocol import Pool
from dpfast.pool.sharded import ShardLayout, pool_of_ranks


def most_samples(recipe: Recipe, ranks: Ranks, most: int | None = None) -> int:
    """Returns the most samples that one rank holds of those that a run can have.

    most: of a run that has all of them at the start; None: the recipe's, and its rounds.
    """
    practice = recipe.practice
    batch = recipe.generator.batch_size
    total = practice.maximum_samples if most is None else most
    if ranks.alone:
        return total
    rounds = 1
    if most is None:
        rounds += -(-(total - practice.initial_samples) // practice.round_samples)
    batches = total // batch + rounds  # the last one of a round may be smaller
    return min(-(-batches // ranks.size) * batch, total)


def stored_shape(
    recipe: Recipe, pipeline: Pipeline | OwnPipeline, real: RealData
) -> tuple[int, ...]:
    """Returns (C, H, W) of what a run's pool stores of a sample: latents, or pixels as those of the
    real images.
    """
    if recipe.pool.codec == "latents":
        return latent_shape(pipeline)
    return tuple(real.validation.images.shape[1:])


def placement(
    recipe: Recipe,
    pipeline: Pipeline | OwnPipeline,
    shape: tuple[int, ...],
    ranks: Ranks,
    out: Path | None,
    *,
    most: int | None = None,
) -> Placement:
    """Plans where a rank's samples will lie. Raises ``RecipeError`` where they have no place.

    shape: (C, H, W) of what is stored. out: the run's folder, on whose disk mapped files lie; it
    need not be there yet. most: as of ``most_samples``.
    """
    places = () if out is None else (out, *out.absolute().parents)
    return Placement.from_recipe(
        recipe.pool,
        most_samples(recipe, ranks, most),
        shape,
        device=pipeline.device,
        folder=next((place for place in places if place.is_dir()), None),
        processes=ranks.local_size,
    )


def new_pool(
    recipe: Recipe,
    pipeline: Pipeline | OwnPipeline,
    shape: tuple[int, ...],
    ranks: Ranks,
    out: Path | None,
    *,
    most: int | None = None,
) -> Pool:
    """Returns an empty pool of all ranks, for samples of ``shape`` (C, H, W). out: the run's
    folder; most: as of ``most_samples``.
    """
    local = SamplePool.from_recipe(
        recipe.pool,
        most_samples(recipe, ranks, most),
        shape,
        device=pipeline.device,
        folder=out,
        decode=pipeline.guidance_decoder if isinstance(pipeline, Pipeline) else None,
        processes=ranks.local_size,
    )
    return pool_of_ranks(local, ShardLayout(ranks, recipe.generator.batch_size))
