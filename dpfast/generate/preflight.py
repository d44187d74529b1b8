"""What a sampler finds out about its models before it samples: do they fit together, and into
memory?
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.generate import criteria
from dpfast.generate.guidance import GuidancePath
from dpfast.generate.models.checkpointing import can_checkpoint, with_checkpointing
from dpfast.generate.runtime.execution import Execution
from dpfast.generate.solvers import SolverTable
from dpfast.generate.step import StepInputs, StepParts, Variant
from dpfast.hardware.live_bytes import bytes_per_sample
from dpfast.hardware.memory import available_bytes

log = logging.getLogger(__name__)
ENOUGH = 8  # samples of a chunk, about what keeps a device busy
SHARE = 0.5  # of the available memory that a batch may take


@torch.no_grad()
def try_learner(
    path: GuidancePath, shape: tuple[int, ...], classes: int | None, device: torch.device
) -> None:
    """Runs the learner and the criterion on two black images, as latents of ``shape`` (c, h, w)
    decode to.

    Raises ``InputError`` when the learner fails on them, when its logits are not (2, classes)
    (None: any number) or have no gradient at the images, and when the criterion's values are not
    (2,). A committee's are (2, M, classes).
    """
    decoded = path.decoder(torch.zeros(2, *shape, device=device))
    try:
        with torch.inference_mode(False), torch.enable_grad():
            images = torch.full(decoded.shape, -1.0, device=decoded.device, requires_grad=True)
            logits = path.logits(images)
    except (RuntimeError, ValueError, TypeError) as error:
        shape = (*images.shape[:2], *(path.image_size or images.shape[2:]))
        raise InputError(
            f"learner fails on images of shape {shape}: {str(error).splitlines()[0]}"
        ) from error
    found = logits.shape if isinstance(logits, Tensor) else ()
    if len(found) not in (2, 3) or found[0] != 2 or classes not in (None, found[-1]):
        got = tuple(found) if isinstance(logits, Tensor) else type(logits).__name__
        expected = "(2, classes)" if classes is None else f"(2, {classes}) for the pipeline"
        raise InputError(f"learner gives {got} for 2 images, expected logits of shape {expected}")
    if not logits.requires_grad or _gradient(logits, images) is None:
        raise InputError(
            "learner gives logits without a gradient at its images: it detaches them, or runs in "
            "no_grad"
        )
    logits = logits.detach()
    value, _ = criteria.value_and_gradient(
        path.criterion, logits, torch.zeros(2, dtype=torch.int64, device=device)
    )
    if value.shape != (2,):
        raise InputError(
            f"criterion gives values of shape {tuple(value.shape)} for 2 samples, expected (2,)"
        )


def _gradient(logits: Tensor, images: Tensor) -> Tensor | None:
    with torch.inference_mode(False):
        return torch.autograd.grad(logits, images, torch.ones_like(logits), allow_unused=True)[0]


def bounded(
    path: GuidancePath, table: SolverTable, budget: int, *, recompute: bool
) -> GuidancePath:
    """The path whose gradient holds at most ``budget`` bytes: in chunks, its denoiser's blocks
    recomputed if need be.

    Chunks cost nothing while one fills the device; recomputation costs another forward of the
    blocks, and allows more samples in a chunk. So blocks are recomputed only where a chunk would
    otherwise hold fewer than ``ENOUGH`` samples.
    ``recompute``: whether they may be; torch.compile (2.13) does not trace it in a whole step.

    Raises ``InputError`` when one sample holds more than the budget even so.
    """
    chunk, least = _chunk(path, table, budget)
    if (
        recompute
        and chunk < ENOUGH
        and path.through == "denoiser"
        and can_checkpoint(path.denoiser)
    ):
        twin = replace(path, denoiser=with_checkpointing(path.denoiser), taped=True)
        larger, smaller = _chunk(twin, table, budget)
        if larger > chunk or smaller < least:
            path, chunk, least = twin, larger, smaller
            log.info(
                "guidance recomputes the denoiser's blocks: chunks of %d fit the budget", chunk
            )
    if chunk < 1:
        more = (
            ""
            if recompute
            else "; with compile = False or compile_region = 'blocks' it may hold less"
        )
        raise InputError(
            f"memory_budget = {budget}: the gradient of one sample holds {least} bytes{more}"
        )
    log.info("guidance in chunks of %d, budget %.1f MB", chunk, budget / 1e6)
    return replace(path, chunk=chunk)


def _chunk(path: GuidancePath, table: SolverTable, budget: int) -> tuple[int, int]:
    """The samples whose gradient, taken at once, holds ``budget`` bytes, and the bytes of a single
    one.
    """
    device = table.rows.device
    alpha, sigma = table.rows[0, :2]

    def gradient(batch: int) -> object:
        x = torch.zeros(batch, *path.denoiser.sample_shape, device=device)
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        return path.gradient(x, table.timesteps[0], labels, alpha, sigma)

    fixed, each = bytes_per_sample(gradient)
    return max(0, (budget - fixed) // each), fixed + each


def largest_batch(parts: StepParts, table: SolverTable, variant: Variant) -> int:
    """The most samples whose step of this variant, and decoding, take half of the memory that is
    available.
    """
    execution, device = Execution(parts), table.rows.device

    def batch(size: int) -> None:
        x = torch.zeros(size, *parts.denoiser.sample_shape, device=device)
        integers = torch.zeros(size, dtype=torch.int64, device=device)
        inputs = StepInputs(
            x=x,
            x0_prev=torch.zeros_like(x) if parts.multistep else None,
            labels=integers,
            sample_ids=integers,
            valid=None,
            step=integers[0],
            rows=table.rows,
            timesteps=table.timesteps,
            omega=torch.zeros(size, device=device),
            cfg_scale=torch.ones((), device=device),
            seed=integers[0],
        )
        execution.step(variant, inputs)
        execution.finish(x)

    fixed, each = bytes_per_sample(batch)
    largest = int((available_bytes(device) * SHARE - fixed) // each)
    log.info(
        "a sample takes %.1f MB in its dearest step: at most %d in a batch", each / 1e6, largest
    )
    return max(1, largest)
