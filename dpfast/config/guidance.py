"""The section ``[guidance]`` of a recipe: how samples are made hard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpfast.config.kinds import ImportPath
from dpfast.config.option import option
from dpfast.config.section import Section, require, require_schedule


@dataclass(frozen=True, kw_only=True)
class Guidance(Section, name="guidance"):
    """The strength, the steps and the criterion by which the learner pulls on a sample."""

    omega: float = option(
        0.05,
        common=True,
        help="strength of guidance: with mode relative the displacement of a latent as a fraction "
        "of its norm; 0: unguided",
    )
    every: int = option(
        3, unit="steps", low=1, common=True, help="one step in so many is guided, from start on"
    )
    start: float = option(
        0.0,
        unit="fraction",
        low=0,
        below=1,
        help="up to this fraction of the steps the trajectory is unguided",
    )
    until: float = option(
        1.0,
        unit="fraction",
        above=0,
        high=1,
        help="from this fraction of the steps on the trajectory is unguided",
    )
    mode: Literal["relative", "score"] = option(
        "relative",
        common=True,
        help="relative: the gradient is rescaled to the latent's norm, the paper's practice; "
        "score: it is added to the score, the paper's Algorithm 1",
    )
    through: Literal["denoiser", "latent"] = option(
        "denoiser",
        help="what the gradient passes: latent leaves the denoiser's backward pass out, which is "
        "cheaper and approximate",
    )
    criterion: Literal["entropy", "loss", "margin", "disagreement"] | ImportPath = option(
        "entropy",
        common=True,
        help="what guidance raises: the entropy of the prediction, the loss of the label, the "
        "nearness of the border between two classes, the disagreement of the EMA and the raw "
        "weights, which runs both in every guided step, or a function of yours, of logits (B, K) "
        "and labels (B,) with values (B,)",
    )
    guide_with: Literal["ema", "raw"] = option(
        "ema", help="the learner's weights that guide; those whose accuracy counts: evaluate_with"
    )
    anchor: float = option(
        0.0,
        low=0,
        common=True,
        help="how strongly the generator's own label score, which classifier-free guidance has "
        "computed, joins the criterion's gradient, both of length 1, times anchor_schedule; 0: the "
        "paper's guidance",
    )
    omega_schedule: tuple[tuple[float, float], ...] = option(
        (),
        unit="fraction:factor",
        low=0,
        unset="1 in all steps",
        help="what omega is multiplied by along a trajectory: pairs of a fraction of the steps, "
        "rising, and a factor, straight lines between them, the ends' factors before and behind; "
        "a step of factor 0 is unguided",
    )
    anchor_schedule: tuple[tuple[float, float], ...] = option(
        (),
        unit="fraction:factor",
        low=0,
        unset="1 in all steps",
        help="what anchor is multiplied by along a trajectory: pairs as of omega_schedule; a step "
        "of factor 0 is guided as the paper does",
    )
    omega_classes: str = option(
        "",
        unit="file",
        unset="omega for all classes",
        help="omega of single classes in all rounds, in the place of omega and omega_rounds: a "
        "file with a class, by name or id, and its value a line",
    )
    anchor_classes: str = option(
        "",
        unit="file",
        unset="anchor for all classes",
        help="anchor of single classes, the same way",
    )

    def check(self) -> None:
        require_schedule("omega_schedule", self.omega_schedule)
        require_schedule("anchor_schedule", self.anchor_schedule)
        require(self.start < self.until, "until", self.until, f"above start ({self.start:g})")
        wanted = f"0 with omega = {self.omega:g}, which lowers the criterion"
        require(not self.anchor or self.omega >= 0, "anchor", self.anchor, wanted)
