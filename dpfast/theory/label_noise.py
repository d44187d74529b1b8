"""The shares of wrong labels among selected samples, and of errors of the classifier that selects
them, in the model of three directions (``dpfast.theory.theorem``).

Along the selecting vector a sample's projection is t, along the part of the generator's vector
across it v, and along the rest of the truth's z, all N(0, 1) before selection:

    selector says  sign(t)      label  sign(rho_g t + sqrt(1 - rho_g^2) v)
    truth          sign(rho_s t + second v + third z)
    second = (rho - rho_g rho_s) / sqrt(1 - rho_g^2)      third = sqrt(1 - rho_s^2 - second^2)

The rule looks at |t| alone, so the shares below are integrals over t > 0 and over v; that over z is
a normal distribution function. Without selection two signs differ with the probability angle / pi.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from dpfast.errors import InputError
from dpfast.theory.cells import Array
from dpfast.theory.scalars import density, quadrature, special

_END = 9.0
_NODES, _PANELS = 12, 16  # of a Gauss rule, and of t, narrowing towards 0: 1e-6 of a share
_TINY = 1e-12
_HARDEST = 1e5  # a power: the selector is wrong in half of the samples but for 1e-2


class Directions(NamedTuple):
    """The cosines of ``test_error``: of labels and truth, selector and labels, selector and
    truth.
    """

    rho: float
    rho_g: float
    rho_s: float

    def improved(self, by: float) -> Directions:
        """Returns labels along the arc from the generator's vector towards the truth: ``by`` = 0
        leaves them, 1 makes them the truth, below 0 worse.
        """
        across = math.sqrt(max(0.0, 1 - self.rho**2))
        beside = (self.rho_g - self.rho * self.rho_s) / max(across, _TINY)
        angle = (1 - by) * math.acos(self.rho)
        rho_g = math.cos(angle) * self.rho_s + math.sin(angle) * beside
        return Directions(math.cos(angle), rho_g, self.rho_s)


class Shares(NamedTuple):
    """The shares of selected samples, in [0, 1]. label_wrong: the label is not the truth's;
    selector_wrong: the selector does not give the label; useful: the selector does not, and the
    truth does.
    """

    label_wrong: float
    selector_wrong: float
    useful: float


def directions(unselected: Shares) -> Directions:
    """Returns the directions with these shares without selection.

    Raises ``InputError`` for what are no shares, and where one contradicts the others.
    """
    label_wrong, selector_wrong, useful = unselected
    for name, share in zip(Shares._fields, unselected, strict=True):
        if not 0 <= share <= 1:
            raise InputError(f"{name} = {share:g}: expected a share, between 0 and 1")
    both_wrong = selector_wrong - useful
    if not 0 <= both_wrong <= label_wrong or label_wrong + useful > 1:
        raise InputError(
            f"useful = {useful:g}: impossible where label_wrong = {label_wrong:g} and "
            f"selector_wrong = {selector_wrong:g}"
        )
    # selector and truth differ where exactly one of the two differs from the label
    angles = (label_wrong, selector_wrong, label_wrong - both_wrong + useful)
    return Directions(*(math.cos(math.pi * angle) for angle in angles))


def shares(at: Directions, power: float = 0.0) -> Shares:
    """Returns the shares of the samples that the tilt q(t) = cosh(t / 2)^(-2 power) selects, which
    is the soft rule below its saturation: hard ones for power > 0, any for 0.
    """
    spread = math.sqrt(max(0.0, 1 - at.rho_g**2))
    second = (at.rho - at.rho_g * at.rho_s) / max(spread, _TINY)
    third = math.sqrt(max(0.0, 1 - at.rho_s**2 - second**2))
    t, t_weight = _nodes(np.concatenate([[0.0], _END * 0.5 ** np.arange(_PANELS)[::-1]]))
    t_weight = t_weight * density(t) * _tilt(t, power)
    # the label turns at one v, and the truth within a width around another
    turn, width = -at.rho_s * t / (second or _TINY), 4 * third / max(abs(second), _TINY)
    turns = [-at.rho_g * t / max(spread, _TINY), turn - width, turn, turn + width]
    inner = np.clip(np.sort(turns, axis=0), -_END, _END)
    v, v_weight = _nodes(np.stack([np.full_like(t, -_END), *inner, np.full_like(t, _END)], 1))
    weight = t_weight[:, None] / t_weight.sum() * v_weight * density(v)
    margin = (at.rho_s * t[:, None] + second * v) / max(third, _TINY)
    as_selector = special(torch.special.ndtr, margin)  # probability that the truth says so too
    wrong = at.rho_g * t[:, None] + spread * v < 0
    return Shares(
        float((weight * np.where(wrong, as_selector, 1 - as_selector)).sum()),
        float((weight * wrong).sum()),
        float((weight * wrong * (1 - as_selector)).sum()),
    )


def kept(power: float) -> float:
    """Returns the fraction that the tilt of ``shares`` keeps, in (0, 1]: ``keep`` of a soft
    rule.
    """
    return min(1.0, float(quadrature(lambda t: _tilt(t, power), 0.0).p))


def hardness(at: Directions, selector_wrong: float) -> float:
    """Returns the power of the tilt, at least 0, whose samples the selector gets wrong so often; 0
    where it does without selection, and a large one beyond what any tilt reaches.
    """
    return math.expm1(
        _bisect(
            lambda x: shares(at, math.expm1(x)).selector_wrong, selector_wrong, math.log1p(_HARDEST)
        )
    )


def matched(at: Directions, label_wrong: float, selector_wrong: float) -> tuple[float, float]:
    """Returns the power of a tilt, and the improvement of the labels (``Directions.improved``),
    with which selected samples have these two shares.
    """

    def improvement(power: float) -> float:
        return 1 - _bisect(
            lambda x: shares(at.improved(1 - x), power).label_wrong, label_wrong, 4.0
        )

    def wrong(x: float) -> float:
        power = math.expm1(x)
        return shares(at.improved(improvement(power)), power).selector_wrong

    power = math.expm1(_bisect(wrong, selector_wrong, math.log1p(_HARDEST)))
    return power, improvement(power)


def _bisect(rising: Callable[[float], float], value: float, high: float) -> float:
    """Returns the place where a rising function on [0, high] has a value; an end where it lies
    outside.
    """
    low = 0.0
    for _ in range(26):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2


def _tilt(t: Array, power: float) -> Array:
    return np.asarray(np.cosh(t / 2) ** (-2 * power))


def _nodes(edges: Array) -> tuple[Array, Array]:
    """Returns nodes and weights (..., panels * nodes) of a composite Gauss rule between edges (...,
    n).
    """
    x, w = np.polynomial.legendre.leggauss(_NODES)
    low, width = edges[..., :-1, None], np.diff(edges, axis=-1)[..., None]
    nodes, weights = low + width * (1 + x) / 2, width * w / 2
    return nodes.reshape(*edges.shape[:-1], -1), weights.reshape(*edges.shape[:-1], -1)
