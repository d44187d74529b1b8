"""What a sampler finds out before it samples: is what is asked for right, and do its models fit
together?
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpfast.errors import InputError, first_line
from dpfast.generate import check, criteria
from dpfast.generate.feature_cache import FeatureCache
from dpfast.generate.guidance import GuidanceConfig, GuidancePath, LearnerPath
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.solvers import SolverTable
from dpfast.generate.step import StepParts


def step_parts(
    pipeline: Pipeline,
    learner: Callable[[Tensor], Tensor] | None,
    guidance: GuidanceConfig,
    table: SolverTable,
    *,
    image_size: tuple[int, int] | None,
    cached: bool,
) -> StepParts:
    """What the steps of a sampler are made of; cached: whether any reuses features.

    Raises ``InputError`` where the denoiser has no path around it or no features to reuse.
    """
    denoiser, path = pipeline.denoiser, None
    if learner is not None:
        if guidance.through == "latent" and denoiser.prediction == "sample":
            raise InputError(
                "through = 'latent': this denoiser predicts "
                "x0 itself, which leaves no path around it"
            )
        path = GuidancePath(
            denoiser=denoiser,
            decoder=pipeline.guidance_decoder,
            learner=learner,
            criterion=criteria.named(guidance.criterion),
            image_size=image_size,
            through=guidance.through,
        )
    return StepParts(
        denoiser=denoiser,
        decoder=pipeline.decoder,
        path=path,
        mode=guidance.mode,
        clip=table.clip,
        multistep=table.needs_x0_prev,
        noise=table.needs_noise,
        cache=FeatureCache(denoiser) if cached else None,
    )


class Request(NamedTuple):
    """Samples that are asked for, on the device. labels, sample_ids: (N,) int64; omega: (N,)
    float32, 0 without a learner; cfg_scale: of all; guided: whether any omega is not 0.
    """

    labels: Tensor
    sample_ids: Tensor
    omega: Tensor
    cfg_scale: float
    guided: bool

    def rows(self, part: slice) -> Request:
        """Returns the request for these samples alone, made with the steps of all."""
        return self._replace(
            labels=self.labels[part], sample_ids=self.sample_ids[part], omega=self.omega[part]
        )


def checked_request(
    labels: Tensor | Sequence[int],
    sample_ids: Tensor | Sequence[int] | None,
    first_id: int,
    omega: float | Tensor,
    cfg_scale: float,
    *,
    pipeline: Pipeline,
    path: GuidancePath | None,
) -> Request:
    """Checks what samples are asked for, and moves it to the device.

    sample_ids: None counts up from ``first_id``; path: None without a learner.

    Raises ``TypeError`` for values of another kind, ``InputError`` for other shapes and for what is
    not finite, and ``InputError`` for a label that the generator does not know.
    """
    labels = check.integers("labels", labels)
    if labels.dim() != 1:
        raise InputError(f"labels has shape {tuple(labels.shape)}, expected (B,)")
    check.integer("first_id", first_id)
    if sample_ids is None:
        sample_ids = torch.arange(first_id, first_id + len(labels))
    ids = check.integers("sample_ids", sample_ids)
    if ids.shape != labels.shape:
        raise InputError(
            f"sample_ids has shape {tuple(ids.shape)}, expected one per label: "
            f"{tuple(labels.shape)}"
        )
    classes = pipeline.denoiser.classes
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise InputError(
            f"labels = {int(wrong[0])}: the generator has {classes} classes, 0 to {classes - 1}"
        )
    omegas = check.numbers("omega", omega)
    if omegas.shape not in ((), labels.shape):
        raise InputError(
            f"omega has shape {tuple(omegas.shape)}, expected () or {tuple(labels.shape)}"
        )
    if not bool(omegas.isfinite().all()):
        raise InputError("omega must be finite")
    check.number("cfg_scale", cfg_scale)
    # Everything is looked at where it was given: what comes from the host costs no wait for the
    # device.
    guided = path is not None and bool(omegas.any())
    if path is not None and path.criterion is criteria.entropy and bool((omegas < 0).any()):
        _warn_of_easy_samples()
    if path is None:
        omegas = torch.zeros(())
    labels, ids, omegas = (
        tensor.to(pipeline.device, non_blocking=True) for tensor in (labels, ids, omegas)
    )
    return Request(labels, ids, omegas.expand(len(labels)).contiguous(), cfg_scale, guided)


def check_start(shape: tuple[int, ...], latents: Tensor | None, step: int, *, total: int) -> None:
    """Raises ``InputError`` where a batch of latents of ``shape`` (B, c, h, w) cannot begin at
    ``step`` of ``total``, from these latents or from noise; ``TypeError`` for what is no step and
    no latents.
    """
    if not shape[0]:
        raise InputError("labels is empty: expected at least one")
    check.integer("step", step)
    check.instance("latents", latents, Tensor | None, "a tensor (B, c, h, w)")
    if not 0 <= step < total:
        raise InputError(f"step = {step}: expected 0 to {total - 1}")
    if latents is None and step:
        raise InputError(f"step = {step}: a trajectory begins there only from latents")
    if latents is not None and latents.shape != shape:
        raise InputError(f"latents has shape {tuple(latents.shape)}, expected {shape}")


@functools.cache
def _warn_of_easy_samples() -> None:
    """Warns, once a process, that a negative omega makes easy samples."""
    warnings.warn(
        "omega is negative: guidance lowers the learner's entropy and makes easy samples",
        UserWarning,
        stacklevel=5,
    )


@torch.inference_mode(False)  # autograd could record nothing there
def try_criterion(criterion: criteria.Criterion, logits: Tensor) -> None:
    """Tries a criterion out on logits (B, K), or (B, M, K) of a committee.

    Raises ``InputError`` for one that is no function, fails on them, gives no (B,) values, or gives
    values without a gradient at the logits.
    """
    if not callable(criterion):
        raise InputError(f"criterion is a {type(criterion).__name__}: expected a function")
    logits = logits.detach().clone()
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    try:
        value, _ = criteria.value_and_gradient(criterion, logits, labels)
        connected = criterion is criteria.entropy or _has_gradient(criterion, logits, labels)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise InputError(
            f"criterion fails on logits of shape {tuple(logits.shape)}: {first_line(error)}"
        ) from error
    if value.shape != labels.shape:
        raise InputError(
            f"criterion gives values of shape {tuple(value.shape)} for {len(labels)} samples, "
            f"expected ({len(labels)},)"
        )
    if not connected:
        raise InputError(
            "criterion gives values without a gradient at its logits: it detaches them, or runs in "
            "no_grad"
        )


@torch.enable_grad()
def _has_gradient(criterion: criteria.Criterion, logits: Tensor, labels: Tensor) -> bool:
    """Whether autograd leads from the values back to the logits. The vjp of values that it does not
    lead back from is zero, like that of equal logits' entropy.
    """
    logits = logits.detach().requires_grad_()
    value = criterion(logits, labels)
    if not value.requires_grad:
        return False
    return torch.autograd.grad(value.sum(), logits, allow_unused=True)[0] is not None


@torch.no_grad()
def try_learner(
    path: LearnerPath, shape: tuple[int, ...], classes: int | None, device: torch.device
) -> None:
    """Runs the learner and the criterion on two black images, as latents of ``shape`` (c, h, w)
    decode to.

    Raises ``InputError`` when the learner fails on them, when its logits are not (2, classes)
    (None: any number) or have no gradient at the images, and as ``try_criterion`` does. A
    committee's are (2, M, classes).
    """
    decoded = path.decoder(torch.zeros(2, *shape, device=device))
    try:
        with torch.inference_mode(False), torch.enable_grad():
            images = torch.full(decoded.shape, -1.0, device=decoded.device, requires_grad=True)
            logits = path.logits(images)
    except (RuntimeError, ValueError, TypeError) as error:
        shape = (*images.shape[:2], *(path.image_size or images.shape[2:]))
        raise InputError(
            f"learner fails on images of shape {shape}: {first_line(error)}"
        ) from error
    found = logits.shape if isinstance(logits, Tensor) else ()
    if len(found) not in (2, 3) or found[0] != 2 or classes not in (None, found[-1]):
        got = tuple(found) if isinstance(logits, Tensor) else type(logits).__name__
        expected = "(2, classes)" if classes is None else f"(2, {classes}) for the pipeline"
        raise InputError(f"learner gives {got} for 2 images, expected logits of shape {expected}")
    if not logits.requires_grad or _gradient(logits, images) is None:
        raise InputError(
            "learner gives logits without a gradient at its images: "
            "it detaches them, or runs in no_grad"
        )
    try_criterion(path.criterion, logits)


def _gradient(logits: Tensor, images: Tensor) -> Tensor | None:
    with torch.inference_mode(False):
        return torch.autograd.grad(logits, images, torch.ones_like(logits), allow_unused=True)[0]
