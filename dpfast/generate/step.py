"""A step of the sampler: the batch that it moves on, and one pure function of tensors in as many
variants as a trajectory has kinds of steps.

    p = p_null + cfg_scale (p_label - p_null)          classifier-free guidance, or what a model
                                                       that embeds cfg_scale makes at once
    x <- x + omega |x| g / |g|                         g: the criterion's gradient at x, or with an
                                                       anchor that and the label's score; omega,
                                                       anchor and cfg_scale - 1 times the step's
                                                       factors
    x <- a x0 + b eps + c x0_prev + d noise            x0, eps: of x and p; a to d: of the solver

A variant is plain or guided, with classifier-free guidance or without; a plain one may keep or
reuse features (``dpfast.generate.feature_cache``), and any may give its x0. All that changes
between two calls is an input tensor, and nothing is read on the host: one compilation, or one
capture as a CUDA graph, serves every step, batch and update of the learner's weights in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.generate.feature_cache import FeatureCache, Features
from dpfast.generate.guidance import GuidancePath
from dpfast.generate.models import denoiser as models
from dpfast.generate.models.decoder import Decoder
from dpfast.generate.models.denoiser import Denoiser
from dpfast.ops import DynamicThreshold, guided_step
from dpfast.ops.guided_step import Mode

ROWS = ("x", "x0_prev", "labels", "sample_ids", "omega", "anchor", "value", "features", "valid")


class Variant(NamedTuple):
    """The kind of a step. x0: it gives its x0 although the solver may have no use for it."""

    guided: bool
    cfg: bool
    features: Features = "compute"
    x0: bool = False

    def __str__(self) -> str:
        kind = "guided" if self.guided else "plain"
        name = f"{kind} step {'with' if self.cfg else 'without'} CFG"
        name += " and its x0" if self.x0 else ""
        return name if self.features == "compute" else f"{name} to {self.features} features"


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A batch before its step ``step``; row i of every column belongs to ``sample_ids[i]``.

    Attributes:
        x: (B, c, h, w) float32 latents.
        labels: (B,) int64 class ids.
        sample_ids: (B,) int64 keys of the noise.
        omega: (B,) float32.
        cfg_scale: 0-d scale of classifier-free guidance.
        seed: 0-d seed of the noise.
        skipped: 0-d int64, as in ``SampleBatch``, of all that ever belonged to the batch.
        variants: Variants of all its steps.
        settings: cfg_scale and seed as they were given, which the host knows.
        x0_prev: x0 of the step before, like x; None where the solver has no use for it and that
            step did not give it.
        anchor: (B,) float32, None where nothing is anchored.
        value: (B,) float32, the criterion at the x0 that the last guided step predicted; None
            before it.
        features: As in ``StepInputs``, where the next step reuses them.
        valid: (B,) bool, False where a row only fills the batch; None where it is not filled.
        step: Index of the next step.
    """

    x: Tensor
    labels: Tensor
    sample_ids: Tensor
    omega: Tensor
    cfg_scale: Tensor
    seed: Tensor
    skipped: Tensor
    variants: tuple[Variant, ...]
    settings: tuple[float, int] | None = None
    x0_prev: Tensor | None = None
    anchor: Tensor | None = None
    value: Tensor | None = None
    features: Tensor | None = None
    valid: Tensor | None = None
    step: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def guided(self) -> bool:
        """True if any of its steps is guided."""
        return any(variant.guided for variant in self.variants)

    @property
    def variant(self) -> Variant:
        """The variant of the next step. One without the features to reuse makes and keeps them."""
        planned = self.variants[self.step]
        if planned.features == "reuse" and self.features is None:
            return planned._replace(features="keep")
        return planned

    def after(self, out: StepOutputs) -> Trajectory:
        """Returns the batch behind its next step, which gave ``out``."""
        following = self.variants[self.step + 1 : self.step + 2]
        features = self.features if out.features is None else out.features
        return replace(
            self,
            step=self.step + 1,
            x=out.x,
            x0_prev=out.x0,
            value=self.value if out.value is None else out.value,
            features=features if any(v.features == "reuse" for v in following) else None,
            skipped=self.skipped if out.skipped is None else self.skipped + out.skipped,
        )

    def take(self, rows: Tensor) -> Trajectory:
        """Returns the samples of these rows, (n,) int64."""
        return self.mapped(lambda column: column[rows])

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Trajectory:
        """Returns the batch with ``function`` applied to each of its columns."""
        columns = {name: getattr(self, name) for name in ROWS}
        changed: dict[str, Any] = {
            name: None if column is None else function(column) for name, column in columns.items()
        }
        return replace(self, **changed)

    @staticmethod
    def joined(parts: Sequence[Trajectory]) -> Trajectory:
        """Returns batches with the same steps, before the same one, as one.

        Where some have no anchor, theirs is 0; where some have no features, the next step makes all
        anew. Raises ``InputError`` for parts of other steps, of another cfg_scale or seed.
        """
        first = parts[0]
        for part in parts:
            if (part.step, part.variants) != (first.step, first.variants):
                raise InputError(
                    f"parts: one is before step {part.step} of {len(part.variants)}, the first "
                    f"before step {first.step} of {len(first.variants)}; expected the same steps"
                )
            if part.settings != first.settings:
                raise InputError(
                    f"parts: one has (cfg_scale, seed) = {part.settings}, the first "
                    f"{first.settings}; expected the same"
                )
        joined = {name: _joined(name, parts) for name in ROWS}
        skipped = torch.stack([part.skipped for part in parts]).sum()
        return replace(first, **joined, skipped=skipped)  # type: ignore[arg-type]


def _joined(name: str, parts: Sequence[Trajectory]) -> Tensor | None:
    columns: list[Tensor | None] = [getattr(part, name) for part in parts]
    if all(column is None for column in columns):
        return None
    if name == "anchor":
        columns = [
            torch.zeros_like(part.omega) if column is None else column
            for part, column in zip(parts, columns, strict=True)
        ]
    elif name == "valid":
        columns = [
            torch.ones_like(part.labels, dtype=torch.bool) if column is None else column
            for part, column in zip(parts, columns, strict=True)
        ]
    known = [column for column in columns if column is not None]
    assert name == "features" or len(known) == len(columns)
    return torch.cat(known) if len(known) == len(columns) else None


class StepInputs(NamedTuple):
    """The inputs of a step: columns of a ``Trajectory``, the step's index (0-d int64) and the
    solver's whole table.

    features: (B, ways, ...) of an earlier step, ways being 2 with classifier-free guidance (row 0
    the conditional one). factors: (steps, 3) float32, those of omega, anchor and cfg_scale - 1.

    None where a variant has no use for it: x0_prev without a multistep solver, valid in a batch
    without filling, features unless it reuses them; anchor in a batch that has none; factors where
    all are 1.
    """

    x: Tensor
    x0_prev: Tensor | None
    labels: Tensor
    sample_ids: Tensor
    valid: Tensor | None
    step: Tensor
    rows: Tensor
    timesteps: Tensor
    omega: Tensor
    cfg_scale: Tensor
    seed: Tensor
    features: Tensor | None = None
    anchor: Tensor | None = None
    factors: Tensor | None = None


class StepOutputs(NamedTuple):
    """The outputs of a step.

    Attributes:
        x: Next state.
        x0: This step's x0, for a multistep solver or where the variant gives it.
        value: (B,) of the criterion at the old state; None in a plain step.
        skipped: 0-d int64, the samples whose gradient was not finite; None in a plain step.
        features: As in ``StepInputs``, None unless the step keeps them.
    """

    x: Tensor
    x0: Tensor | None
    value: Tensor | None
    skipped: Tensor | None
    features: Tensor | None


class Finished(NamedTuple):
    """A batch behind its last step.

    Attributes:
        images: (B, C, H, W) uint8.
        entropy: (B,) float32 under the learner, NaN without one.
        finite: (B, 2) bool, True where all of a sample's latents are finite, and all of its image
            before it was rounded: a NaN rounds to black.
    """

    images: Tensor
    entropy: Tensor
    finite: Tensor


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """The parts that the variants of a step share, fixed for the life of a sampler."""

    denoiser: Denoiser
    decoder: Decoder  # of the final images
    path: GuidancePath | None
    mode: Mode = "relative"
    clip: float | DynamicThreshold | None = None
    factors: Tensor | None = None  # (steps, 3), as in ``StepInputs``
    multistep: bool = False  # the solver uses the x0 of the step before
    noise: bool = False  # the solver adds noise
    cache: FeatureCache | None = None  # of variants that keep or reuse features


def step_function(parts: StepParts, variant: Variant) -> Callable[..., StepOutputs]:
    """Returns the step of this variant: ``StepInputs``, as positional arguments, to
    ``StepOutputs``.
    """
    denoiser, path = parts.denoiser, parts.path
    cache = parts.cache
    guided, cfg, features, gives_x0 = variant
    assert not (guided and features != "compute")
    prompts = getattr(denoiser, "rows", None)
    through_denoiser = guided and path is not None and path.through == "denoiser"

    def step(*given: Tensor | None) -> StepOutputs:
        inputs = StepInputs(*given)  # type: ignore[arg-type]
        x, labels = inputs.x, inputs.labels
        conditions = labels if prompts is None else prompts.of(labels, inputs.sample_ids)
        index = inputs.step.reshape(1)
        timestep = inputs.timesteps.index_select(0, index).reshape(())
        alpha, sigma = inputs.rows.index_select(0, index)[0, :2].unbind()
        omega, anchor, cfg_scale = inputs.omega, inputs.anchor, inputs.cfg_scale
        if inputs.factors is not None:
            of_omega, of_anchor, of_cfg = inputs.factors.index_select(0, index)[0].unbind()
            omega = omega * of_omega
            anchor = None if anchor is None else anchor * of_anchor
            cfg_scale = torch.lerp(torch.ones_like(cfg_scale), cfg_scale, of_cfg)
        null = gradient = value = unconditional = skipped = kept = None
        if cfg and denoiser.null_label is not None:
            null = torch.full_like(labels, denoiser.null_label)

        def predict(x: Tensor, labels: Tensor) -> Tensor:
            nonlocal kept
            if features == "compute":
                return models.predict(denoiser, x, timestep, labels, cfg_scale)
            assert cache is not None
            if features == "keep":
                prediction, kept = cache.keep(x, timestep, labels, cfg_scale)
                kept = kept.unflatten(0, (-1, len(inputs.x))).transpose(0, 1)
                return prediction
            assert inputs.features is not None
            held = inputs.features.transpose(0, 1).flatten(0, 1)
            return cache.reuse(x, timestep, labels, held, cfg_scale)

        if through_denoiser:
            assert path is not None
            gradient, conditional, value = path.gradient(
                x,
                timestep,
                labels,
                alpha,
                sigma,
                conditions=conditions,
                scale=cfg_scale,
            )
            if null is not None:
                unconditional = denoiser(x, timestep, null)
        elif null is not None:
            both = predict(torch.cat([x, x]), torch.cat([conditions, null]))
            conditional, unconditional = both.chunk(2)
        else:
            conditional = predict(x, conditions)
        if guided and not through_denoiser:
            assert path is not None
            gradient, _, value = path.gradient(x, timestep, labels, alpha, sigma, conditional)
        if gradient is None or unconditional is None:
            anchor = None
        if gradient is not None:
            # One of two: Inductor (torch 2.11) takes the seed of memory-efficient attention, a 0-d
            # int64 tensor on the CPU, for one on the GPU, and would put a lone counter into its
            # memory.
            skipped = torch.zeros(2, dtype=torch.int64, device=x.device)[0]
            if inputs.valid is not None:  # the copy of a sample must not be counted as skipped
                gradient = torch.where(inputs.valid.view(-1, 1, 1, 1), gradient, 0.0)
                anchor = None if anchor is None else torch.where(inputs.valid, anchor, 0.0)
        x0 = torch.empty_like(x) if parts.multistep or gives_x0 else None
        following = guided_step(
            x,
            conditional,
            unconditional,
            gradient,
            inputs.rows,
            inputs.step,
            cfg_scale=cfg_scale,
            omega=omega,
            anchor=anchor,
            mode=parts.mode,
            prediction=denoiser.prediction,
            clip=parts.clip,
            x0_prev=inputs.x0_prev,
            sample_ids=inputs.sample_ids if parts.noise else None,
            seed=inputs.seed,
            x0_out=x0,
            skipped=skipped,
        )
        return StepOutputs(following, x0, value, skipped, kept)

    return step


def to_uint8(images: Tensor) -> Tensor:
    """Returns images in [-1, 1] to uint8, rounded as diffusers' image processor does."""
    return images.mul(0.5).add(0.5).clamp(0, 1).mul(255).round().to(torch.uint8)


def finish_function(parts: StepParts) -> Callable[[Tensor], Finished]:
    """Returns the function behind the last step, from final latents (B, c, h, w) to
    ``Finished``.
    """

    def finish(latents: Tensor) -> Finished:
        decoded = parts.decoder(latents)
        images = to_uint8(decoded)
        finite = torch.stack([_all_finite(latents), _all_finite(decoded)], dim=1)
        if parts.path is None:
            unknown = torch.full((len(images),), float("nan"), device=images.device)
            return Finished(images, unknown, finite)
        return Finished(images, parts.path.entropy(images.float().div(127.5).sub(1)), finite)

    return finish


def _all_finite(rows: Tensor) -> Tensor:
    return rows.isfinite().flatten(1).all(1)
