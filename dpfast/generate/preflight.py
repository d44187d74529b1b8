"""Checks before a sampler samples: is the request right, and do the models fit together?"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dpfast.errors import InputError, first_line
from dpfast.generate import check, criteria
from dpfast.generate.feature_cache import FeatureCache
from dpfast.generate.guidance import (
    GuidanceConfig,
    GuidancePath,
    LearnerPath,
    Schedule,
    factors,
)
from dpfast.generate.models.decoder import ResizedDecoder, VaeDecoder, times_a_tiny_one
from dpfast.generate.models.denoiser import embeds_scale
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.solver_tables import SolverTable
from dpfast.generate.step import StepParts, Variant
from dpfast.ops import normal

log = logging.getLogger(__name__)
_TOLD: set[Path] = set()  # pipelines of which was said that they have no tiny decoder


def step_parts(
    pipeline: Pipeline,
    learner: Callable[[Tensor], Tensor] | None,
    guidance: GuidanceConfig,
    table: SolverTable,
    *,
    cfg_schedule: Schedule,
    image_size: tuple[int, int] | None,
    cached: bool,
) -> StepParts:
    """Returns the parts of a sampler's steps. cached: True if any step reuses features.

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
        factors=_factors(guidance, cfg_schedule, table),
        multistep=table.needs_x0_prev,
        noise=table.needs_noise,
        cache=FeatureCache(denoiser) if cached else None,
    )


def _factors(guidance: GuidanceConfig, cfg_schedule: Schedule, table: SolverTable) -> Tensor | None:
    """Returns (steps, 3) float32 on the table's device, as in ``StepInputs``; None where all are 1,
    for which steps need no input.
    """
    schedules = (guidance.omega_schedule, guidance.anchor_schedule, cfg_schedule)
    columns = [factors(schedule, len(table)) for schedule in schedules]
    if all(factor == 1 for column in columns for factor in column):
        return None
    return torch.tensor(columns, dtype=torch.float32).T.contiguous().to(table.rows.device)


class Request(NamedTuple):
    """Samples that are asked for, on the device. labels, sample_ids: (N,) int64; omega: (N,)
    float32, 0 without a learner; anchor: the same, None where nothing is anchored; cfg_scale: of
    all; guided: whether their steps are, as they are unless one omega of 0 is that of all.
    """

    labels: Tensor
    sample_ids: Tensor
    omega: Tensor
    anchor: Tensor | None
    cfg_scale: float
    guided: bool

    def rows(self, part: slice) -> Request:
        """Returns the request for these samples alone, made with the steps of all."""
        return self._replace(
            labels=self.labels[part],
            sample_ids=self.sample_ids[part],
            omega=self.omega[part],
            anchor=None if self.anchor is None else self.anchor[part],
        )


def checked_request(
    labels: Tensor | Sequence[int],
    sample_ids: Tensor | Sequence[int] | None,
    first_id: int,
    omega: float | Tensor,
    anchor: float | Tensor,
    cfg_scale: float,
    *,
    pipeline: Pipeline,
    path: GuidancePath | None,
) -> Request:
    """Checks what samples are asked for, and moves it to the device.

    sample_ids: None counts up from ``first_id``; path: None without a learner.

    Raises ``TypeError`` for values of another kind, ``InputError`` for other shapes, for what is
    not finite, for a label that the generator does not know, and for an anchor that is negative or
    beside a negative omega.
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
    omegas, anchors = (
        _each(name, values, labels) for name, values in (("omega", omega), ("anchor", anchor))
    )
    if bool((anchors < 0).any()):
        raise InputError(f"anchor = {float(anchors.min()):g}: expected at least 0")
    check.number("cfg_scale", cfg_scale)
    # Everything is looked at where it was given: what comes from the host costs no wait for the
    # device.
    # a number for each: whether one sample takes guided steps must not depend on the others
    guided = path is not None and (omegas.dim() > 0 or bool(omegas.any()))
    anchored = guided and bool(anchors.any())
    if anchored and bool(((omegas < 0) & (anchors.to(omegas.device) > 0)).any()):
        raise InputError(
            f"anchor = {float(anchors.max()):g}: expected 0 where omega is negative, which lowers "
            "the criterion"
        )
    if path is not None and path.criterion is criteria.entropy and bool((omegas < 0).any()):
        _warn_of_easy_samples()
    if path is None:
        omegas = torch.zeros(())
    labels, ids, omegas, anchors = (
        tensor.to(pipeline.device, non_blocking=True) for tensor in (labels, ids, omegas, anchors)
    )
    return Request(
        labels,
        ids,
        omegas.expand(len(labels)).contiguous(),
        anchors.expand(len(labels)).contiguous() if anchored else None,
        cfg_scale,
        guided,
    )


def _each(name: str, values: float | Tensor, labels: Tensor) -> Tensor:
    """Returns () or (N,) float32, a finite number for all labels (N,) or for each."""
    given = check.numbers(name, values)
    if given.shape not in ((), labels.shape):
        raise InputError(
            f"{name} has shape {tuple(given.shape)}, expected () or {tuple(labels.shape)}"
        )
    if not bool(given.isfinite().all()):
        raise InputError(f"{name} must be finite")
    return given


def check_anchored(
    anchor: float | Tensor,
    pipeline: Pipeline,
    variants: Sequence[Variant],
    cfg_scale: float,
    interval: Sequence[float],
) -> None:
    """Raises ``InputError`` where no guided step has classifier-free guidance, whose two
    predictions an anchor is made of.

    variants: of the steps of a guided trajectory with this scale and interval.
    """
    if any(variant.guided and variant.cfg for variant in variants):
        return
    if embeds_scale(pipeline.denoiser):
        why = f"the generator of {pipeline.folder} embeds cfg_scale and makes one"
    elif pipeline.denoiser.null_label is None:
        why = f"the generator of {pipeline.folder} has no null class"
    elif cfg_scale == 1:
        why = "guided samples have cfg_scale = 1, which is none"
    else:
        why = f"none of the guided steps lies in cfg_interval = {tuple(interval)}"
    raise InputError(
        f"anchor = {float(check.numbers('anchor', anchor).max()):g}: needs the two predictions of "
        f"classifier-free guidance in a guided step, and {why}; expected 0"
    )


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


def warn_of_idle_anchor(schedule: Schedule, variants: Sequence[Variant], begin: int) -> None:
    """Warns, once a process and schedule, of an anchor whose schedule is 0 in all guided steps with
    classifier-free guidance from step ``begin`` on.

    variants: of all steps of a guided trajectory.
    """
    kinds = zip(variants, factors(schedule, len(variants)), strict=True)
    if not any(each.guided and each.cfg and factor for each, factor in [*kinds][begin:]):
        _warn_of_idle_anchor(tuple(map(tuple, schedule)))


@functools.cache
def _warn_of_idle_anchor(schedule: Schedule) -> None:
    points = ", ".join(f"{fraction:g}:{factor:g}" for fraction, factor in schedule)
    log.warning(
        "anchor has no effect: anchor_schedule = %s is 0 in all guided steps with classifier-free "
        "guidance, so they guide as the paper does",
        points,
    )


@functools.cache
def warn_of_idle_cfg(
    folder: Path, has_null: bool, embedded: bool, scale: float, interval: tuple[float, float]
) -> None:
    """Warns, once a process and pipeline, of classifier-free guidance that is asked for and has no
    effect.

    folder: of the pipeline; has_null: whether its denoiser has an unconditional prediction;
    embedded: whether the scale is an input of its model.
    """
    if embedded and interval != (0, 1):
        log.warning(
            "cfg_interval = (%g, %g) has no effect: the generator of %s takes cfg_scale as an "
            "input in every step",
            *interval,
            folder,
        )
    elif embedded:
        return
    elif scale != 1 and not has_null:
        log.warning(
            "cfg_scale = %g has no effect: the generator of %s has no null class; "
            "say cfg_scale = 1",
            scale,
            folder,
        )
    elif scale == 1 and interval != (0, 1):
        log.warning(
            "cfg_interval = (%g, %g) has no effect: cfg_scale = 1 is no classifier-free guidance",
            *interval,
        )


def tell_of_full_decoder(pipeline: Pipeline) -> None:
    """Says, once a process and pipeline, what guidance costs without a tiny decoder."""
    decoder = pipeline.guidance_decoder
    while isinstance(decoder, ResizedDecoder):
        decoder = decoder.decoder
    if not isinstance(decoder, VaeDecoder) or pipeline.folder in _TOLD:
        return
    _TOLD.add(pipeline.folder)
    log.info(
        "no tiny decoder in %s: guidance goes through the full one, %.0f times the FLOPs of a tiny "
        "one in each guided step (derived); --tiny-decoder names one",
        pipeline.folder,
        times_a_tiny_one(decoder, pipeline.denoiser.sample_shape),
    )


@functools.cache
def _warn_of_easy_samples() -> None:
    """Warns, once a process, that a negative omega makes easy samples."""
    warnings.warn(
        "omega is negative: guidance lowers the learner's entropy and makes easy samples",
        UserWarning,
        stacklevel=5,
    )


@torch.inference_mode(False)  # autograd could record nothing there
def try_criterion(criterion: criteria.Criterion, logits: Tensor, what: str = "criterion") -> None:
    """Tries a criterion out on noise of the shape of logits (B, K), or (B, M, K) of a committee.

    what: which criterion, for messages.

    Raises ``InputError`` for one that is no function, fails on them, gives no (B,) values, gives
    values without a gradient at the logits, is constant on single logits, or whose value or
    gradient for a sample changes with the other samples of its batch or by chance.
    """
    if not callable(criterion):
        raise InputError(f"{what} is a {type(criterion).__name__}: expected a function")
    named = criterion in criteria.CRITERIA.values()
    if named and logits.shape[-1] == 1:
        raise _single_logit(logits)
    rows = _noise(3, logits.shape[1:], logits.device).to(logits.dtype)
    labels = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
    labels[2] = logits.shape[-1] - 1

    def of(*batch: int) -> tuple[Tensor, Tensor]:
        chosen = list(batch)
        return criteria.value_and_gradient(criterion, rows[chosen], labels[chosen])

    try:
        value, gradient = of(0, 1)
        connected = criterion is criteria.entropy or _has_gradient(criterion, rows[:2], labels[:2])
    except Exception as error:  # whatever the caller's function raises
        raise InputError(
            f"{what} fails on logits of shape {tuple(logits.shape)}: {first_line(error)}"
        ) from error
    if value.shape != (2,):
        raise InputError(
            f"{what} gives values of shape {tuple(value.shape)} for 2 samples, expected (2,)"
        )
    if not connected:
        raise InputError(
            f"{what} gives values without a gradient at its logits: it detaches them, or runs in "
            "no_grad"
        )
    if named or logits.device.type == "meta":
        return
    if logits.shape[-1] == 1 and not bool(gradient.any()):
        raise _single_logit(logits)
    for same, batch, what in (
        ((0, 1), (0, 1), "from call to call"),
        ((0,), (0, 2), "with the other samples"),
        ((1,), (2, 1), "with the other samples"),
    ):
        other, other_gradient = of(*batch)
        if any(_apart(value[i], other[i]) or _apart(gradient[i], other_gradient[i]) for i in same):
            raise InputError(
                f"{what}: what it gives for a sample changes {what}; expected a function of the "
                "sample's logits and label alone"
            )


def _single_logit(logits: Tensor) -> InputError:
    return InputError(
        f"learner gives logits of shape {tuple(logits.shape)}: the softmax of a single logit is "
        "always 1, so nothing would guide; expected 2 or more, one a class"
    )


@torch.enable_grad()
def _has_gradient(criterion: criteria.Criterion, logits: Tensor, labels: Tensor) -> bool:
    """Returns True if autograd leads from the values back to the logits. The vjp of values that it
    does not lead back from is zero, like that of equal logits' entropy.
    """
    logits = logits.detach().requires_grad_()
    value = criterion(logits, labels)
    if not value.requires_grad:
        return False
    return torch.autograd.grad(value.sum(), logits, allow_unused=True)[0] is not None


def check_modules(learner: object) -> None:
    """Raises ``InputError`` for a learner with a module that lets samples of a batch mix, or chance
    decide: one in training mode, and a batch norm that keeps no running statistics and takes those
    of the batch in any mode.
    """
    if not isinstance(learner, nn.Module):
        return
    for name, module in learner.named_modules():
        which = f"learner: its module {name!r}, a {type(module).__name__}," if name else "learner"
        if getattr(module, "training", False):  # a frozen ScriptModule has no modes
            raise InputError(
                f"{which} is in training mode, where samples of a batch may mix; "
                "call learner.eval()"
            )
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise InputError(
                f"{which} keeps no running statistics and takes those of the batch, where its "
                "samples mix; expected track_running_stats = True, or a norm of each sample"
            )


@torch.no_grad()
def try_learner(
    path: LearnerPath, shape: tuple[int, ...], classes: int | None, device: torch.device
) -> int:
    """Runs the learner and the criterion on images of noise, two at a time, of the size that
    latents of ``shape`` (c, h, w) decode to. Returns the number of logits K.

    Raises ``InputError`` when the decoder gives images that are not finite, when the learner fails,
    when its logits are not (2, classes) (None: any number), have no gradient at the images, are NaN
    or infinite for all of them, or change for an image with the other one of its batch or by
    chance; and as ``check_modules`` and ``try_criterion`` do. A committee's logits are (2, M,
    classes).
    """
    check_modules(path.learner)
    decoded = path.decoder(torch.zeros(2, *shape, device=device))
    noise = _noise(3, decoded.shape[1:], device)
    # of other contrast and brightness, which a norm over the batch sees
    images = torch.stack([noise[0] * 0.5, noise[1] * 0.1 - 0.5, noise[2] + 0.2]).clamp(-1, 1)
    try:
        logits, leaf = _recorded(path, images[:2])
    except Exception as error:  # whatever the caller's model raises
        shape = (2, images.shape[1], *(path.image_size or images.shape[2:]))
        raise InputError(
            f"learner fails on images of shape {shape}: {first_line(error)}"
        ) from error
    found = logits.shape if isinstance(logits, Tensor) else ()
    if len(found) not in (2, 3) or found[0] != 2 or classes not in (None, found[-1]):
        got = tuple(found) if isinstance(logits, Tensor) else type(logits).__name__
        expected = "(2, classes)" if classes is None else f"(2, {classes}) for the pipeline"
        if classes == 1:
            expected += ", which has one class unless class_names say more"
        raise InputError(f"learner gives {got} for 2 images, expected logits of shape {expected}")
    try:
        gradient = _gradient(logits, leaf) if logits.requires_grad else None
    except Exception as error:  # whatever the caller's model raises
        raise InputError(
            f"learner fails on its way back from the logits to the images: {first_line(error)}"
        ) from error
    if gradient is None:
        raise InputError(
            "learner gives logits without a gradient at its images: "
            "it detaches them, or runs in no_grad"
        )
    logits = logits.detach()
    if device.type != "meta":
        _check_values(path, decoded, images, logits)
    try_criterion(path.criterion, logits)
    return found[-1]


def _check_values(path: LearnerPath, decoded: Tensor, images: Tensor, logits: Tensor) -> None:
    """Raises ``InputError`` for decoded images that are not finite, and for logits of the first two
    of three images that are all NaN or infinite, or that are others for one of these images when
    the learner is asked again, or beside the third image.
    """
    if not bool(decoded.isfinite().all()):
        dtype = getattr(path.decoder, "dtype", decoded.dtype)
        raise InputError(
            f"decoder: in {str(dtype).removeprefix('torch.')} it gives images that are not finite "
            "for latents of zeros; expected finite ones"
        )
    # minus infinity rules a class out
    if bool(logits.float().softmax(-1).isnan().flatten(1).any(1).all()):
        raise InputError("learner gives logits that are NaN or infinite for images of noise")
    chance = "changes from call to call (dropout that is always on?)"
    company = "changes with the other images of its batch (a norm over the batch?)"
    for rows, batch, what in (
        ((0, 1), images[:2], chance),
        ((0,), images[::2], company),
        ((1,), images[1:].flip(0), company),
    ):
        other = _recorded(path, batch)[0].detach()
        if any(_apart(logits[row], other[row]) for row in rows):
            module = _first_apart(path, images[:2], batch, rows[-1])
            raise InputError(
                f"learner: {module} {what}; expected a function of the image alone, as after "
                "learner.eval()"
            )


@torch.inference_mode(False)
@torch.enable_grad()
def _recorded(path: LearnerPath, images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the logits, with autograd's record, and the leaf that it leads to."""
    leaf = images.clone().requires_grad_()
    return path.logits(leaf), leaf


def _first_apart(path: LearnerPath, images: Tensor, others: Tensor, row: int) -> str:
    """Names the innermost module of a learner that gives other values for this row of two batches
    although it is given the same ones.
    """
    seen: list[tuple[str, Tensor, Tensor]] = []

    def note(name: str, module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(out, Tensor) and out.dim():
            which = f"what its module {name!r}, a {type(module).__name__}, gives for an image"
            seen.append((which, given[0].detach()[row], out.detach()[row]))

    modules = path.learner.named_modules() if isinstance(path.learner, nn.Module) else ()
    hooks = [
        module.register_forward_hook(functools.partial(note, name))
        for name, module in modules
        if name
    ]
    try:
        _recorded(path, images)
        first = seen.copy()
        seen.clear()
        _recorded(path, others)
    finally:
        for hook in hooks:
            hook.remove()
    for (which, given, out), (_, also_given, also_out) in zip(first, seen, strict=False):
        if not _apart(given, also_given) and _apart(out, also_out):
            return which
    return "its prediction for an image"


# Of the largest value, once the mean of the row is taken out. Batches of one shape run the same
# kernels, and a row came out the same to the bit for all learners of the tests; bf16 rounds to
# 0.004. A batch norm without running statistics moves logits by their own size.
STEADY = 0.01


def _apart(one: Tensor, other: Tensor) -> bool:
    """Returns True if two rows differ by more than rounding; NaN and infinities are equal to
    themselves.
    """
    one, other = one.float(), other.float()
    same = (one == other) | (one.isnan() & other.isnan())
    middle = one.mean(-1, keepdim=True) if one.dim() and one.shape[-1] > 1 else 0.0
    scale = (one - middle).abs().nan_to_num(0, 0, 0).amax()
    return not bool((same | ((one - other).abs() <= STEADY * scale)).all())


def _noise(rows: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Returns (rows, *shape) of unit normals, always the same ones; no generator of the caller's
    moves.
    """
    return normal(torch.arange(rows, device=device), tuple(shape), seed=0, stream=0)


def _gradient(logits: Tensor, images: Tensor) -> Tensor | None:
    with torch.inference_mode(False):
        return torch.autograd.grad(logits, images, torch.ones_like(logits), allow_unused=True)[0]
