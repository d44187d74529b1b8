"""Readings of the adapters from a live diffusers pipeline and its scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import diffusers
import torch
from torch import Tensor

from dpfast.adapters.gradient import Network
from dpfast.errors import InputError
from dpfast.generate.solvers import FLOW_SOLVERS, PREDICTIONS, is_flow
from dpfast.ops.guided_step import Prediction

# Schedulers whose state is alpha x0 + sigma eps, and which go on from the latents that they are
# given. PNDM, UniPC and the single-step DPM solver restart from latents of their own, so that a
# displacement would be lost; Euler, Heun and LMS schedulers scale their state.
STATELESS = ("DDIMScheduler", "DDPMScheduler", "GuidedDDIMScheduler")
MULTISTEP = ("DPMSolverMultistepScheduler", "DEISMultistepScheduler")
# scheduler -> its grid, on the host too
_GRIDS: WeakKeyDictionary[Any, tuple[Tensor, list[Any]]] = WeakKeyDictionary()


def check_scheduler(scheduler: Any) -> Prediction:
    """Returns the kind of the scheduler's prediction. Raises ``InputError`` for a scheduler that
    the adapters cannot follow.
    """
    name, known = type(scheduler).__name__, (*STATELESS, *MULTISTEP, *FLOW_SOLVERS["euler"].folders)
    if name not in known:
        raise InputError(
            f"scheduler is a {name}, whose latents cannot be moved; expected one of "
            f"{', '.join(known)}"
        )
    if scheduler.config.get("use_flow_sigmas"):
        raise InputError("scheduler option use_flow_sigmas = True: expected False")
    if is_flow(scheduler):
        return "flow"
    kind = scheduler.config.prediction_type
    if kind not in PREDICTIONS:
        raise InputError(
            f"scheduler option prediction_type = {kind!r}: expected one of {', '.join(PREDICTIONS)}"
        )
    return PREDICTIONS[kind]


def position(scheduler: Any, timestep: Any) -> int:
    """Returns the index of a timestep on the scheduler's grid.

    Pipelines iterate over ``scheduler.timesteps``, so a timestep is mostly a view of it, and its
    address tells the index without waiting for the device. A number is looked up in a copy of the
    grid on the host, made once a grid; only a tensor on a device that is no view of the grid is
    read each time. Raises ``InputError`` for a timestep that is not on the grid.
    """
    grid = scheduler.timesteps
    if isinstance(timestep, Tensor):
        if (
            timestep.dim() == 0
            and timestep.untyped_storage().data_ptr() == grid.untyped_storage().data_ptr()
        ):
            return int(timestep.storage_offset() - grid.storage_offset())
        timestep = timestep.item()
    known, steps = _GRIDS.get(scheduler, (None, []))
    if known is not grid:
        steps = grid.tolist()
        _GRIDS[scheduler] = grid, steps
    if timestep not in steps:
        raise InputError(f"timestep = {timestep}: not on the scheduler's grid of {len(grid)} steps")
    return steps.index(timestep)


def levels(scheduler: Any, index: int) -> tuple[Tensor, Tensor]:
    """Returns alpha and sigma of the state at the input of step ``index``, 0-d float32 on the
    device of the timesteps.
    """
    device = scheduler.timesteps.device
    if type(scheduler).__name__ in STATELESS:
        cumulative = scheduler.alphas_cumprod.to(device)[scheduler.timesteps[index]]
        return cumulative.sqrt(), (1 - cumulative).sqrt()
    ratio = scheduler.sigmas[index].to(device, torch.float32)
    if is_flow(scheduler):
        return 1 - ratio, ratio
    alpha = (1 + ratio.square()).rsqrt()
    return alpha, ratio * alpha


def network_of(pipe: Any) -> Network:
    """Returns ``(x, timestep, **condition)`` to the prediction of a pipeline's network, whose dtype
    the arguments take.
    """
    model = getattr(pipe, "unet", None) or pipe.transformer

    def network(x: Tensor, timestep: Tensor, **condition: Tensor) -> Tensor:
        x, timesteps = x.to(model.dtype), timestep.expand(len(x))
        if isinstance(model, diffusers.SD3Transformer2DModel):
            result = model(hidden_states=x, timestep=timesteps, **condition).sample
        elif isinstance(model, diffusers.DiTTransformer2DModel):
            result = model(x, timestep=timesteps, **condition).sample
        else:
            result = model(x, timesteps, **condition).sample
        return result

    return network


def conditional_half(tensor: Tensor, batch: int) -> Tensor:
    """Returns the conditional rows of what a pipeline batches for classifier-free guidance:
    unconditional rows come first.
    """
    return tensor[-batch:] if len(tensor) == 2 * batch else tensor


def unconditional_half(tensor: Tensor, batch: int) -> Tensor | None:
    """Returns the unconditional rows of the same; None where a pipeline runs without
    classifier-free guidance.
    """
    return tensor[:batch] if len(tensor) == 2 * batch else None


def has_cfg(pipe: Any) -> bool | None:
    """Returns True if the call that a ``StableDiffusionPipeline`` is in combines two predictions,
    and nothing else, into what its scheduler is given; None where the pipeline was never called or
    is gone.
    """
    if getattr(pipe, "guidance_scale", None) is None:  # a call sets it
        return None
    return bool(pipe.do_classifier_free_guidance) and not pipe.guidance_rescale


def encoded(pipe: Any, prompts: list[str]) -> Mapping[str, Tensor]:
    """Returns the condition of a ``StableDiffusionPipeline`` for one prompt a sample."""
    with torch.no_grad():
        embeddings, _ = pipe.encode_prompt(prompts, pipe._execution_device, 1, False)
    return {"encoder_hidden_states": embeddings}
