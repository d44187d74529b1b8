"""The learner's gradient for code that owns its own denoiser and its own loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.errors import InputError
from dpfast.generate import criteria, preflight
from dpfast.generate.bounded import in_chunks
from dpfast.generate.guidance import GuidanceConfig, GuidancePath, LearnerPath
from dpfast.generate.models.decoder import AutoencoderDecoder, Decoder, IdentityDecoder
from dpfast.labels import class_ids
from dpfast.ops import guided_step
from dpfast.ops.guided_step import Mode, Prediction

Network = Callable[..., Tensor]
# solver rows: one that only moves x along the gradient, and one that gives eps, of sigma 1
_IN_PLACE = ((1.0, 0.0, 1.0, 0.0, 0.0, 0.0),)
_EPSILON = ((1.0, 1.0, 0.0, 1.0, 0.0, 0.0),)


def decoder_of(decoder: Any) -> Decoder:
    """Returns a decoder from an autoencoder of diffusers, a function of latents, or None for
    pixels. Raises ``TypeError`` for anything else.
    """
    if decoder is None:
        return IdentityDecoder()
    if isinstance(decoder, nn.Module) and hasattr(decoder, "decode"):
        return AutoencoderDecoder(decoder)
    if not callable(decoder):
        raise TypeError(
            f"decoder is a {type(decoder).__name__}, expected an autoencoder or a function from "
            "latents to images"
        )
    return decoder


def no_anchor(anchor: float, why: str) -> InputError:
    """Returns the error for where a pipeline has nothing that an anchor could be made of."""
    return InputError(f"guidance has anchor = {anchor:g}: {why}; expected anchor = 0")


@dataclass
class _Bound:
    """A network with its condition, as the denoiser of a ``GuidancePath``."""

    network: Network
    condition: Mapping[str, Tensor]
    prediction: Prediction
    classes: int = 0
    null_label: int | None = None
    sample_shape: tuple[int, int, int] = (0, 0, 0)

    def __call__(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        return self.network(x, timestep, **self.condition)[:, : x.shape[1]]


@dataclass(kw_only=True)
class LearnerGradient:
    """The gradient of a learner's criterion at noisy latents, whoever runs the denoiser.

    Args:
        learner: Function from images (B, C, H, W) in [-1, 1] to logits (B, K), in ``eval()`` mode.
        guidance: Strength, steps and criterion of guidance.
        decoder: Decoder of the guidance path: an autoencoder of diffusers (an ``AutoencoderTiny``
            is the cheap one), a function from latents of unit variance to images in [-1, 1], or
            None for pixels.
        labels: (B,) class ids, for a criterion that reads them.
        image_size: (H, W) that the learner takes; None: as decoded.
        chunk: Samples that are differentiated at a time; None: all.

    Raises:
        InputError: Here or at the first gradient, for arguments that cannot work.
        TypeError: For arguments of another type.
    """

    learner: Callable[[Tensor], Tensor]
    guidance: GuidanceConfig
    decoder: Any = None
    labels: Tensor | Sequence[int] | None = None
    image_size: tuple[int, int] | None = None
    chunk: int | None = None
    _skipped: Tensor | None = field(default=None, repr=False)
    _tried: set[tuple[int, ...]] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.learner):
            raise TypeError(
                f"learner is a {type(self.learner).__name__}, "
                "expected a function from images to logits"
            )
        if not isinstance(self.guidance, GuidanceConfig):
            raise TypeError(
                f"guidance is a {type(self.guidance).__name__}, expected a GuidanceConfig"
            )
        if self.chunk is not None and self.chunk < 1:
            raise InputError(f"chunk = {self.chunk}: expected at least 1, or None")
        self.decoder = decoder_of(self.decoder)
        self.criterion = criteria.named(self.guidance.criterion)
        if self.labels is not None:
            labels = torch.as_tensor(self.labels)
            if labels.dim() != 1 or not len(labels):
                raise InputError(f"labels = {labels.tolist()}: expected class ids (B,), 0 or more")
            self.labels = class_ids(labels, len(labels), "labels")
        self.check_mode()

    @property
    def _reads_labels(self) -> bool:
        return self.criterion not in (criteria.entropy, criteria.margin, criteria.disagreement)

    @property
    def skipped(self) -> int:
        """The number of samples whose gradient was not finite, which went unguided for that step.

        Reading it waits for the device.
        """
        return 0 if self._skipped is None else int(self._skipped)

    def counter(self, device: torch.device) -> Tensor:
        """Returns the count of skipped samples, 0-d int64."""
        if self._skipped is None or self._skipped.device != device:
            self._skipped = torch.tensor(self.skipped, device=device)
        return self._skipped

    def check_mode(self) -> None:
        preflight.check_modules(self.learner)

    def path(self, x: Tensor, labels: Tensor) -> LearnerPath:
        """Returns the path for denoised latents like x, its learner tried out at this size."""
        self.check_mode()
        path = LearnerPath(
            decoder=self.decoder,
            learner=self.learner,
            criterion=self.criterion,
            image_size=self.image_size,
        )
        shape = tuple(x.shape[1:])
        if shape not in self._tried:
            classes = preflight.try_learner(path, shape, None, x.device)
            if self._reads_labels and int(labels.max()) >= classes:
                raise InputError(
                    f"labels = {int(labels.max())}: learner has {classes} classes, "
                    f"0 to {classes - 1}"
                )
            self._tried.add(shape)
        return path

    def labels_for(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns (B,) class ids, those given or those of the constructor; zeros for a criterion
        that reads none.
        """
        labels = self.labels if labels is None else labels  # type: ignore[assignment]
        if labels is None:
            if self._reads_labels:
                raise InputError(
                    "labels is None: expected one class id a sample, which this criterion reads"
                )
            return torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if len(labels) != len(x):
            raise InputError(
                f"labels has {len(labels)} class ids, expected one for each of the {len(x)} samples"
            )
        return labels.to(x.device)

    def __call__(
        self,
        x: Tensor,
        timestep: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        *,
        network: Network,
        prediction: Prediction,
        condition: Mapping[str, Tensor],
        labels: Tensor | None = None,
        held: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the gradient (B, c, h, w) in float32 at latents x, through one forward of the
        network, and the prediction (B, c, h, w) that it was taken through.

        Args:
            timestep, alpha, sigma: 0-d; or (B,) and (B, 1, 1, 1).
            network: ``(x, timestep, **condition)`` to its conditional prediction, at least x's
                channels.
            prediction: what the network predicts.
            condition: tensors of B rows.
            labels: (B,) class ids; None: those of the constructor.
            held: with through="latent", the prediction to hold fixed; None: the network makes it,
                undifferentiated.
        """
        x, labels = x.float(), self.labels_for(x, labels)
        for name, rows in condition.items():
            if len(rows) != len(x):
                raise InputError(
                    f"{name} has {len(rows)} rows, expected one for each of the {len(x)} samples"
                )
        path, latent = self.path(x, labels), self.guidance.through == "latent"

        def gradient(
            x: Tensor,
            timestep: Tensor,
            labels: Tensor,
            alpha: Tensor,
            sigma: Tensor,
            held: Tensor | None,
            *rows: Tensor,
        ) -> tuple[Tensor, Tensor]:
            denoiser = _Bound(network, dict(zip(condition, rows, strict=True)), prediction)
            if latent and held is None:
                with torch.no_grad():
                    held = denoiser(x, timestep, labels)
            whole = GuidancePath(denoiser=denoiser, **vars(path))
            return whole.gradient(x, timestep, labels, alpha, sigma, held)[:2]

        given = (x, timestep, labels, alpha, sigma, held if latent else None)
        found: tuple[Tensor, Tensor] = in_chunks(gradient, self.chunk, *given, *condition.values())
        return found

    def displaced(
        self,
        x: Tensor,
        gradient: Tensor,
        score: Tensor | None = None,
        *,
        at: tuple[int, int] | None = None,
    ) -> Tensor:
        """Returns x + omega |x| / |g| g with the norms of one sample; a sample whose gradient is
        not finite stays.

        score: as ``label_score`` gives it, which the configured anchor joins to g. at: the step and
        of how many, which a schedule of ``guidance`` asks for.

        Raises ``InputError`` for a schedule without ``at``.
        """
        omega, anchor = self._strengths(at)
        return self._stepped(_IN_PLACE, x, gradient, score, omega=omega, anchor=anchor)

    def ascended(
        self, gradient: Tensor, score: Tensor | None, *, at: tuple[int, int] | None = None
    ) -> Tensor:
        """Returns the gradient that mode "score" takes: with a score (``label_score``) turned
        towards it by the configured anchor. at: as in ``displaced``.
        """
        anchor = self._strengths(at)[1]
        if score is None or not anchor:
            return gradient
        x = torch.zeros_like(gradient)
        return -self._stepped(_EPSILON, x, gradient, score, omega=1.0, anchor=anchor, mode="score")

    def _strengths(self, at: tuple[int, int] | None) -> tuple[float, float]:
        """Returns omega and anchor in a step."""
        guidance = self.guidance
        if at is not None:
            return guidance.at(*at)
        for name in ("omega_schedule", "anchor_schedule"):
            if getattr(guidance, name):
                raise InputError(
                    f"guidance has {name} = {getattr(guidance, name)!r}: say the step, "
                    "at = (index, how many)"
                )
        return guidance.omega, guidance.anchor

    def _stepped(
        self,
        row: tuple[tuple[float, ...], ...],
        x: Tensor,
        gradient: Tensor,
        score: Tensor | None,
        *,
        omega: float,
        anchor: float,
        mode: Mode = "relative",
    ) -> Tensor:
        """Returns what a solver row makes of x, gradient and score. The step reads a score off its
        two predictions: of zero and it, where eps is predicted, and with a scale of 1 zero is left.
        """
        return guided_step(
            x,
            x if score is None else torch.zeros_like(score),
            score,
            gradient,
            torch.tensor(row, device=x.device),
            0,
            cfg_scale=1.0,
            omega=omega,
            anchor=anchor if score is not None else None,
            mode=mode,
            skipped=self.counter(x.device),
        )

    def finite(self, gradient: Tensor) -> Tensor:
        """Returns the gradient, with zeros for the samples where it is not finite."""
        finite = gradient.flatten(1).square().sum(dim=1).isfinite()
        self.counter(gradient.device).add_((~finite).sum())
        return torch.where(finite.view(-1, 1, 1, 1), gradient, 0.0)
