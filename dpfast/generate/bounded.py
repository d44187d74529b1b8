"""Guidance that holds less memory: in chunks, with the denoiser's blocks run again for their
backward pass, and measured so that it fits a budget.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.generate import criteria
from dpfast.generate.guidance import GuidancePath, predict_x0
from dpfast.generate.models.checkpointing import can_checkpoint, with_checkpointing
from dpfast.generate.models.denoiser import Denoiser, predict
from dpfast.generate.solver_tables import SolverTable
from dpfast.hardware.live_bytes import bytes_per_sample

log = logging.getLogger(__name__)
# What keeps a device busy well enough, in samples or in tokens of the denoiser, whichever is less.
# Derived for an H200: a row alone costs half as much again as one of many at 5 rows of 256 tokens
# (DiT-XL/2) and at 2 of 4,096 (Stable Diffusion 1.5); a second forward of the blocks is as dear.
SAMPLES, TOKENS = 8, 8192


def enough(denoiser: Denoiser) -> int:
    """Returns the samples of a chunk that recomputation could not make cheaper by making it
    larger.
    """
    config = getattr(getattr(denoiser, "model", None), "config", None)
    patch = int(getattr(config, "patch_size", None) or 1)
    tokens = max(1, math.prod(denoiser.sample_shape[1:]) // patch**2)
    return min(SAMPLES, -(-TOKENS // tokens))


@dataclass(frozen=True, kw_only=True)
class BoundedPath(GuidancePath):
    """A guidance path that gives the same numbers and holds less.

    chunk: samples that are differentiated at a time; None: all. Samples do not mix, so any chunk
    gives the same result.
    taped: autograd records denoiser, decoder and learner, whose blocks may then be compiled or
    checkpointed; otherwise ``torch.func.vjp`` does, which torch.compile traces as a part of a whole
    step.
    """

    chunk: int | None = None
    taped: bool = False

    @classmethod
    def of(cls, path: GuidancePath, **changes: Any) -> BoundedPath:
        """Returns ``path`` with other fields, bounded or not."""
        fields = {field.name: getattr(path, field.name) for field in dataclasses.fields(path)}
        return cls(**fields | changes)

    def gradient(
        self,
        x: Tensor,
        timestep: Tensor,
        labels: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        prediction: Tensor | None = None,
        conditions: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what ``GuidancePath.gradient`` returns, chunk by chunk."""
        given = (x, timestep, labels, alpha, sigma, prediction, conditions, scale)
        return in_chunks(self._of_chunk, self.chunk, *given)

    def at(self, x0: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what ``LearnerPath.at`` returns."""
        if not self.taped:
            return super().at(x0, labels)
        x0 = _recordable(x0)
        with torch.inference_mode(False), torch.enable_grad():
            logits = self.logits(self.decoder(x0.requires_grad_()))
        value, dlogits = criteria.value_and_gradient(self.criterion, logits.detach(), labels)
        with torch.inference_mode(False):
            (gradient,) = torch.autograd.grad(logits, x0, dlogits)
        return value, gradient

    def _of_chunk(
        self,
        x: Tensor,
        timestep: Tensor,
        labels: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        prediction: Tensor | None,
        conditions: Tensor | None,
        scale: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.taped:
            return super().gradient(
                x, timestep, labels, alpha, sigma, prediction, conditions, scale
            )
        # Autograd records nothing in inference mode, not even what is recomputed, and saves no
        # tensor made there.
        x, timestep, labels, alpha, sigma = map(_recordable, (x, timestep, labels, alpha, sigma))
        scale = None if scale is None else _recordable(scale)
        with torch.inference_mode(False), torch.enable_grad():
            x.requires_grad_()
            asked = labels if conditions is None else _recordable(conditions)
            made = prediction
            if made is None:
                made = predict(self.denoiser, x, timestep, asked, scale)
            x0 = predict_x0(x, made, alpha, sigma, self.denoiser.prediction)
        value, gradient = self.at_recorded(x0, x, labels)
        return gradient, made.detach(), value


def in_chunks(
    function: Callable[..., tuple[Tensor, ...]], size: int | None, *tensors: Tensor | None
) -> Any:
    """Returns ``function`` of the tensors, at most ``size`` rows at a time; None: all at once.

    The first tensor has the rows. Tensors without dimensions, and None, belong to every chunk; the
    others are split along their first dimension, and so the results are joined.
    """
    first = tensors[0]
    assert first is not None
    if size is None or len(first) <= size:
        return function(*tensors)
    count = -(-len(first) // size)
    split = [
        [tensor] * count if tensor is None or tensor.dim() == 0 else tensor.split(size)
        for tensor in tensors
    ]
    parts = [function(*part) for part in zip(*split, strict=True)]
    return tuple(torch.cat(results) for results in zip(*parts, strict=True))


@torch.inference_mode(False)
def _recordable(tensor: Tensor) -> Tensor:
    """Returns a tensor that autograd can save, apart from what it recorded before."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def within_budget(
    path: GuidancePath, table: SolverTable, budget: int, *, recompute: bool
) -> GuidancePath:
    """Returns the path whose gradient holds at most ``budget`` bytes: in chunks, its denoiser's
    blocks recomputed if need be.

    Chunks cost nothing while one fills the device; recomputation costs another forward of the
    blocks, and allows more samples in a chunk. So blocks are recomputed only where a chunk would
    otherwise hold fewer samples than are ``enough``.
    ``recompute``: whether they may be; torch.compile (2.13) does not trace it in a whole step.

    Raises ``InputError`` when one sample holds more than the budget even so.
    """
    chunk, least = _chunk(path, table, budget)
    if (
        recompute
        and chunk < enough(path.denoiser)
        and path.through == "denoiser"
        and can_checkpoint(path.denoiser)
    ):
        twin = BoundedPath.of(path, denoiser=with_checkpointing(path.denoiser), taped=True)
        larger, smaller = _chunk(twin, table, budget)
        if larger > chunk or smaller < least:
            path = twin
            chunk, least = larger, smaller
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
    return BoundedPath.of(path, chunk=chunk)


def _chunk(path: GuidancePath, table: SolverTable, budget: int) -> tuple[int, int]:
    """Returns the samples whose gradient, taken at once, holds ``budget`` bytes, and the bytes of a
    single one.
    """
    device = table.rows.device
    alpha, sigma = table.rows[0, :2]

    def gradient(batch: int) -> object:
        x = torch.zeros(batch, *path.denoiser.sample_shape, device=device)
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        return path.gradient(x, table.timesteps[0], labels, alpha, sigma)

    fixed, each = bytes_per_sample(gradient)
    return max(0, (budget - fixed) // each), fixed + each
