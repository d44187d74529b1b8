"""The way from a recipe to a pipeline and a sampler, where [generator] and [guidance] take
effect.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from dpfast import imagenet
from dpfast.config import RECIPE_FILE, Generator, Recipe, read_recipe
from dpfast.errors import InputError
from dpfast.files import there
from dpfast.generate.criteria import Criterion
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.models.decoder import ResizedDecoder
from dpfast.generate.pipelines import Pipeline, families, hub
from dpfast.generate.pipelines.folder import PipelineFolder
from dpfast.generate.pipelines.lora import model_id
from dpfast.generate.pipelines.prompts import Prompts
from dpfast.generate.protocol import OwnPipeline, Sampler
from dpfast.generate.sampler import GuidedSampler, Learner


def load_pipeline(generator: Generator, *, device: torch.device | str) -> Pipeline:
    """Returns the pipeline of a recipe's [generator] on ``device``. Raises what
    ``Pipeline.from_pretrained`` raises.
    """
    pipeline = Pipeline.from_pretrained(
        generator.pipeline,
        revision=generator.revision,
        variant=generator.variant,
        tiny_decoder=generator.tiny_decoder,
        lora=generator.lora,
        device=device,
        dtype=generator.dtype,
        attention=generator.attention,
        channels_last=generator.channels_last,
        fused=generator.fused,
        class_names=class_names(generator),
        prompt_template=generator.prompt_template,
        prompts=generator.prompts,
        negative_prompt=generator.negative_prompt,
        height=generator.height,
        width=generator.width,
    )
    return resized(pipeline, generator.image_size)


def check_generator(generator: Generator) -> tuple[str, ...]:
    """Returns the class names of a recipe's generator, () where it has none, after a look at its
    folder that reads no weights.

    Raises ``InputError`` as ``dpfast.generate.pipelines.families.check`` does.
    """
    folder = folder_of(generator)
    families.check(folder)
    families.check_size(folder, generator.height, generator.width)
    names = folder.class_names(class_names(generator)) or ()
    families.check_prompts(folder, prompts_of(generator), names)
    return names


def prompts_of(generator: Generator) -> Prompts:
    """Returns the prompts of a recipe's generator, if it is asked by text."""
    return Prompts(generator.prompt_template, generator.prompts, generator.negative_prompt)


def folder_of(generator: Generator) -> PipelineFolder:
    """Returns the folder of a recipe's generator. Raises ``InputError`` as ``PipelineFolder``
    does.
    """
    return PipelineFolder(
        generator.pipeline,
        revision=generator.revision,
        variant=generator.variant,
        tiny_decoder=generator.tiny_decoder,
        lora=generator.lora,
    )


def fetched(generator: Generator, *, beat: Callable[[], None] = lambda: None) -> Generator:
    """Returns a recipe's [generator] with all that it names on the Hub in its cache, where that may
    be downloaded, and the commits that are there: ``revision``, and behind the names of tiny
    decoder and LoRA.

    beat: called while a download grows. Raises ``InputError`` as ``PipelineFolder`` and
    ``dpfast.generate.pipelines.hub.fetch`` do.
    """
    fetch = functools.partial(hub.fetch, beat=beat)

    def pinned(field: str, text: str, model: str) -> str:
        """Returns what a field names, with the commit behind its model."""
        name, revision = hub.parted(model)
        if not hub.is_model_id(name):
            return text
        try:
            found = hub.located(model, field=field)
        except hub.IncompleteError:
            if hub.offline():
                raise
            fetch(name, revision, field=field)
            found = hub.located(model, field=field)
        commit = hub.commit_of(found)
        return text if commit is None else text.replace(model, f"{name}@{commit}", 1)

    tiny = generator.tiny_decoder
    generator = replace(
        generator,
        tiny_decoder=pinned("tiny_decoder", tiny, tiny),
        lora=tuple(pinned("lora", text, model_id(text)) for text in generator.lora),
    )
    if not hub.is_model_id(generator.pipeline):
        return generator
    try:
        families.check(folder_of(generator))
    except hub.IncompleteError:
        if hub.offline():
            raise
        fetch(generator.pipeline, generator.revision, generator.variant)
    commit = hub.commit_of(hub.located(generator.pipeline, generator.revision))
    return generator if commit is None else replace(generator, revision=commit)


def class_names(generator: Generator) -> tuple[str, ...] | None:
    """Returns the classes that a recipe names, those of ImageNet spelled out; None where it leaves
    them to the folder.
    """
    names = generator.class_names
    return (
        imagenet.named(names[0]) if len(names) == 1 and names[0] in imagenet.SETS else names or None
    )


def resized(pipeline: Pipeline, size: int) -> Pipeline:
    """Returns the pipeline with images of ``size`` x ``size`` pixels, final ones and those that
    guide; 0: as they are.
    """
    if not size:
        return pipeline
    return replace(
        pipeline,
        decoder=ResizedDecoder(pipeline.decoder, size),
        guidance_decoder=ResizedDecoder(pipeline.guidance_decoder, size),
    )


def latent_shape(pipeline: Pipeline | OwnPipeline) -> tuple[int, ...]:
    """Returns (c, h, w) of a pipeline's latents. Raises ``InputError`` for one that has none."""
    if not isinstance(pipeline, Pipeline):
        raise InputError(
            f"codec = 'latents': a {type(pipeline).__name__} is no dpfast.Pipeline and decodes none"
        )
    return pipeline.denoiser.sample_shape


def guidance_config(recipe: Recipe, criterion: Criterion | None = None) -> GuidanceConfig:
    """Returns the configuration of a recipe's [guidance], with ``criterion`` in place of its
    own.
    """
    guidance = recipe.guidance
    return GuidanceConfig(
        omega=guidance.omega,
        every=guidance.every,
        start=guidance.start,
        until=guidance.until,
        mode=guidance.mode,
        through=guidance.through,
        criterion=criterion or guidance.criterion,
        anchor=guidance.anchor,
        omega_schedule=guidance.omega_schedule,
        anchor_schedule=guidance.anchor_schedule,
    )


@overload
def new_sampler(
    recipe: Recipe,
    pipeline: Pipeline,
    learner: Learner | None,
    *,
    criterion: Criterion | None = None,
    **options: Any,
) -> GuidedSampler: ...
@overload
def new_sampler(
    recipe: Recipe,
    pipeline: Pipeline | OwnPipeline,
    learner: Learner | None,
    *,
    criterion: Criterion | None = None,
    **options: Any,
) -> Sampler: ...
def new_sampler(
    recipe: Recipe,
    pipeline: Pipeline | OwnPipeline,
    learner: Learner | None,
    *,
    criterion: Criterion | None = None,
    **options: Any,
) -> Sampler:
    """Returns the sampler that a recipe describes; unguided without a learner.

    Args:
        recipe: of [generator] and [guidance].
        pipeline: a pipeline of one's own makes its sampler itself, and takes no ``options``.
        learner: images (B, C, H, W) in [-1, 1] to logits (B, K), or None.
        criterion: in place of the recipe's.
        options: of ``GuidedSampler``, in place of what the recipe says. ``compile`` is never "auto"
            by itself: that follows the clock, and so would the bits of a run.

    Raises ``InputError`` where pipeline, learner and recipe do not fit.
    """
    generator, config = recipe.generator, guidance_config(recipe, criterion)
    if not isinstance(pipeline, Pipeline):
        return pipeline.sampler(learner, guidance=config, seed=recipe.seed)
    described: dict[str, Any] = {
        "guidance": config,
        "steps": generator.steps,
        "solver": generator.solver,
        "eta": generator.eta,
        "cfg_scale": generator.cfg_scale,
        "cfg_interval": generator.cfg_interval,
        "cfg_schedule": generator.cfg_schedule,
        "cache_interval": generator.cache_interval,
        "seed": recipe.seed,
        "micro_batch": generator.at_once,
        "compile": generator.compile,
        "compile_region": generator.compile_region,
    }
    return GuidedSampler(pipeline, learner, **described | options)


def decoder_of_run(run: Path, device: torch.device | str) -> Callable[[Tensor], Tensor] | None:
    """Returns the decoder of the latents that the run in the folder ``run`` has saved, on
    ``device``.

    It takes (B, c, h, w) to images (B, C, H, W) in [-1, 1]. Its pipeline is loaded with the first
    latents. It is None where the folder is no run's.
    """
    if not there(run / RECIPE_FILE):
        return None

    @functools.cache
    def decoder() -> Callable[[Tensor], Tensor]:
        recipe = Recipe.from_dict(read_recipe(run / RECIPE_FILE))
        return load_pipeline(recipe.generator, device=device).guidance_decoder

    return lambda latents: decoder()(latents).to(latents.device)
