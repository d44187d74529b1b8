"""A run's recipe fitted to the memory that its ranks find, before anything is made."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch

from dpfast.config import Recipe
from dpfast.errors import InputError, first_line
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.protocol import NoGenerator, OwnPipeline
from dpfast.hardware.device import is_gpu
from dpfast.hardware.memory import available_bytes, free_bytes
from dpfast.hardware.peaks import DEVICES, Peaks
from dpfast.parallel import Ranks
from dpfast.planning.fitting import Fit, fit

log = logging.getLogger(__name__)
# What a sample or an image in training holds at most, over its own bytes in fp32: less than this
# many times (counted: ViT-B in training 200, Stable Diffusion 1.5 in a guided step 800).
HELD = 1000


def fit_run(
    recipe: Recipe,
    pipeline: Pipeline | OwnPipeline,
    ranks: Ranks,
    *,
    together: bool = True,
    learner: object | None = None,
    memory: float | None = None,
) -> Fit | None:
    """Returns the recipe fitted to a rank's device.

    Args:
        recipe: as it was asked for.
        pipeline: what makes images, on the device.
        ranks: those of the run.
        together: all of ``ranks`` call it, and get what fits the one with the least memory.
        learner: one in place of the recipe's.
        memory: bytes of the device that may be used; None: what is free.

    Returns None where there is nothing to fit: on a CPU with far more memory than the batches can
    take, and for models that cannot be counted, where a warning says so.
    """
    device = pipeline.device
    memory = device_memory(device) if memory is None else memory
    memory = -ranks.most(-memory) if together else memory
    if not is_gpu(device) and memory > 2 * HELD * _batch_bytes(recipe, pipeline, ranks):
        return None
    own = [
        what
        for what, given in (
            ("pipeline", not isinstance(pipeline, Pipeline | NoGenerator)),
            ("learner", learner is not None),
        )
        if given
    ]
    if own:
        log.warning(
            "the memory of the %s is not known, an object of the caller's: nothing is fitted",
            " and the ".join(own),
        )
        return None
    known = replace(DEVICES["h100"] if is_gpu(device) else _CPU, name=str(device), memory=memory)
    known = replace(known, host=free_bytes() / ranks.local_size, disk=None)
    try:
        # the run's own check refuses a pool
        return replace(fit(recipe, known, count=ranks.size), proposals=())
    except (InputError, RuntimeError, NotImplementedError) as error:
        log.warning(
            "the memory of the models is not known, nothing is fitted: %s",
            first_line(error),
        )
        return None


_CPU = Peaks(name="cpu", half=1.0, full=1.0, bandwidth=1.0, memory=0.0, link=1.0, network=1.0)


def device_memory(device: torch.device) -> float:
    """Returns bytes of a rank's device that are free or this process's own."""
    own = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
    return float(available_bytes(device) + own)


def _batch_bytes(recipe: Recipe, pipeline: Pipeline | OwnPipeline, ranks: Ranks) -> int:
    image = decoded = 4 * math.prod(pipeline.image_shape)
    if recipe.generator.image_size and isinstance(pipeline, Pipeline):  # resized after decoding
        decoded = 4 * 3 * math.prod(8 * side for side in pipeline.denoiser.sample_shape[1:])
    share = math.ceil(recipe.learner.batch_size / ranks.size)
    return max(share * image, recipe.generator.at_once * decoded)
