"""The four numbers through which a selection rule enters the theory.

A rule keeps a sample with probability q(t), q even, where t ~ N(0, 1) is the sample's projection on
the unit vector w_s that selects. Labels are the signs of the projection on a vector at cosine rho
from w_s. With tau = rho / sqrt(1 - rho^2), G ~ N(0, 1), its density phi and distribution Phi
(section "Scalars" of the paper's theory):

    p = E q(G)    gamma = E q(G) G^2    beta = 2 E q(G) phi(tau G)    beta~ = 2 E q(G) Phi(tau G) G

Rules: "hard" keeps |t| <= a, "easy" keeps |t| > a, "soft" keeps with probability min(1, e^c
(sigma(t) sigma(-t))^power) up to a constant in c, hard for power > 0 and easy for power < 0
(Kolossov et al. 2024). `keep` = p fixes a, and c. All functions broadcast and return float64; a
keep outside (0, 1], |rho| > 1 or a power that is not finite raises InputError, naming it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from dpfast.errors import InputError
from dpfast.theory.cells import STRATEGIES, Array, choose, domain

_PEAK = 1 / np.sqrt(2 * np.pi)  # phi(0)
_END = 9.0  # a normal lies outside of +-9 with probability 2e-19
_FAR = 1e3  # stands for an infinite threshold, which would make 0 x infinity
_SMALL = 0.02  # the closed forms of "hard" lose 1e-16 / a^2 by cancellation
_TINY = 1e-300


class Scalars(NamedTuple):
    """The scalars p, gamma, beta and beta~ of a rule, float64 arrays of one shape."""

    p: Array
    gamma: Array
    beta: Array
    beta_tilde: Array


def scalars(strategy: str, keep: ArrayLike, rho: ArrayLike, *, power: ArrayLike = 1.0) -> Scalars:
    """Returns the scalars of a selection rule.

    Args:
        strategy: "hard" or "easy", closed forms, or "soft", a quadrature.
        keep: Fraction kept, in (0, 1].
        rho: Cosine of the selecting vector and the labels' one.
        power: Power of the soft rule.
    """
    choose("strategy", strategy, STRATEGIES)
    if strategy == "soft":
        return soft(keep, rho, power)
    return {"hard": hard, "easy": easy}[strategy](keep, rho)


def hard(keep: ArrayLike, rho: ArrayLike) -> Scalars:
    """Returns the scalars of keeping the samples nearest to the selecting hyperplane.

    The rule is abs(t) <= a with P(abs(t) <= a) = keep, in closed form.
    """
    keep, rho = domain(keep=keep, rho=rho).values()
    return _inside(_threshold("hard", keep), rho)._replace(p=keep)


def easy(keep: ArrayLike, rho: ArrayLike) -> Scalars:
    """Returns the scalars of keeping the samples farthest from the selecting hyperplane.

    The rule is abs(t) > a with P(abs(t) > a) = keep, in closed form.
    """
    keep, rho = domain(keep=keep, rho=rho).values()
    return _outside(_threshold("easy", keep), rho)._replace(p=keep)


def soft(keep: ArrayLike, rho: ArrayLike, power: ArrayLike) -> Scalars:
    """Returns the scalars of keeping with a probability that falls away from the hyperplane.

    The probability is min(1, e^c (sigma(t) sigma(-t))^power / sigma(0)^(2 power)), c such that
    E q = keep. The part where q = 1 is a closed form, the rest a composite Gauss rule. power = 0
    keeps at random; towards +-infinity the rule becomes "hard" and "easy".
    """
    keep, rho, power = np.broadcast_arrays(*domain(keep=keep, rho=rho, power=power).values())
    out = np.empty((4, keep.size))
    flat = keep.ravel(), rho.ravel(), power.ravel()
    # The rule is dear and knows neither directions nor sizes: once for all cells that share it.
    rules, rule_of = np.unique(np.stack(flat[::2]), axis=1, return_inverse=True)
    solved = [
        np.stack(soft_rule(*rules[:, s : s + _BLOCK])) for s in range(0, rules.shape[1], _BLOCK)
    ]
    ends = np.concatenate([np.empty((2, 0)), *solved], axis=1)[:, rule_of.ravel()]
    for start in range(0, keep.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        k, r, w = (x[block] for x in flat)
        saturated, log_scale = ends[:, block]
        sure, t, weights = _soft_parts(saturated, log_scale, w, r)
        spread = np.sqrt((1 - r) * (1 + r))
        margin = _ratio(r, spread)[:, None] * t
        out[0, block] = k
        out[1, block] = sure.gamma + np.sum(weights * t**2, axis=-1)
        out[2, block] = sure.beta + np.sum(weights * 2 * density(margin), axis=-1)
        out[3, block] = sure.beta_tilde + np.sum(weights * erf(margin / np.sqrt(2)) * t, axis=-1)
    return Scalars(*out.reshape(4, *keep.shape))


def quadrature(
    rule: Callable[[Array], Array], rho: float, *, breaks: Sequence[float] = (), nodes: int = 48
) -> Scalars:
    """Returns the scalars of any even rule q(t), by a composite Gauss rule.

    The panels narrow towards the breaks and towards 0, where Phi(tau t) turns within sqrt(1 -
    rho^2) of it.

    Args:
        rule: Function q(t), given for t >= 0.
        rho: Cosine of the selecting vector and the labels' one.
        breaks: Jumps of q.
        nodes: Nodes of each panel.

    Raises:
        InputError: For an argument outside its domain, and a rule with a value that is no
            probability.
    """
    domain(rho=rho)
    if np.any(np.isnan(breaks)):
        raise InputError(f"breaks = {list(breaks)}: expected numbers")
    if nodes < 1:
        raise InputError(f"nodes = {nodes}: expected at least 1")
    inner = sorted(b for b in breaks if 0 < b < _END)
    edges = [0.0, *inner, _END]
    x, w = np.polynomial.legendre.leggauss(nodes)
    graded = _graded(30)
    pieces = [lo + (hi - lo) * graded for lo, hi in pairwise(edges)]
    left = np.concatenate([piece[:-1] for piece in pieces])[:, None]
    right = np.concatenate([piece[1:] for piece in pieces])[:, None]
    t = (left + (right - left) * (1 + x) / 2).ravel()
    q = np.broadcast_to(rule(t), t.shape)
    wrong = ~((q >= 0) & (q <= 1 + 1e-12))  # beyond 1 by rounding alone
    if wrong.any():
        raise InputError(f"rule: q({t[wrong][0]:.6g}) = {float(q[wrong][0])!r} is no probability")
    # Both signs of t: q is even, and so are q G^2, the even part of phi(tau G) and of (2 Phi(tau G)
    # - 1) G.
    weights = ((right - left) * w).ravel() * density(t) * q
    margin = _ratio(np.float64(rho), np.sqrt((1 - rho) * (1 + rho))) * t
    turned = erf(margin / np.sqrt(2)) * t
    return Scalars(
        *(np.sum(weights * f) for f in (np.ones_like(t), t**2, 2 * density(margin), turned))
    )


def threshold(strategy: str, keep: ArrayLike) -> Array:
    """Returns the a of "hard" (|t| <= a is kept) or "easy" (|t| > a is kept); infinite and 0 where
    everything is kept.
    """
    choose("strategy", strategy, ("hard", "easy"))
    return _threshold(strategy, domain(keep=keep)["keep"])


def _threshold(strategy: str, keep: Array) -> Array:
    if strategy == "hard":
        return np.sqrt(2) * special(torch.special.erfinv, keep)
    return -special(torch.special.ndtri, keep / 2)


def soft_rule(keep: ArrayLike, power: ArrayLike) -> tuple[Array, Array]:
    """Returns (a, c) of the soft rule: q = 1 for |t| <= a where power >= 0, for |t| > a where power
    < 0.
    """
    keep, power = np.broadcast_arrays(*map(np.atleast_1d, domain(keep=keep, power=power).values()))
    far = np.where(power < 0, _END, 0.0)  # where q reaches 1 last, as c rises

    def mass(a: Array, log_scale: Array) -> Array:
        sure, _, weights = _soft_parts(a, log_scale, power, np.zeros(1))
        return np.asarray(sure.p + weights.sum(-1))

    unsaturated = mass(far, -_log_profile(far, power))
    scaled = keep <= unsaturated
    # Elsewhere q = 1 up to (from) some a, which lies between that of the sharp rule and `far`.
    lo = np.where(power < 0, np.minimum(_threshold("easy", keep), _END), 0.0)
    hi = np.where(power < 0, _END, np.minimum(_threshold("hard", keep), _END))
    for _ in range(54):  # bisection to the last bit of a
        a = (lo + hi) / 2
        grow = (mass(a, -_log_profile(a, power)) < keep) == (power >= 0)
        lo, hi = np.where(grow, a, lo), np.where(grow, hi, a)
    a = np.where(scaled, far, (lo + hi) / 2)
    shrink = np.where(scaled, np.log(keep / unsaturated), 0.0)
    return np.where(scaled, np.where(power < 0, np.inf, 0.0), a), shrink - _log_profile(a, power)


def keep_probability(t: Array, strategy: str, keep: float, *, power: float = 1.0) -> Array:
    """Returns q(t) of a rule, for projections t of any shape."""
    choose("strategy", strategy, STRATEGIES)
    if strategy == "soft":
        _, log_scale = soft_rule(keep, power)
        return np.asarray(
            np.exp(np.minimum(0.0, log_scale + _log_profile(np.abs(t), np.asarray(power))))
        )
    a = threshold(strategy, keep)
    return np.asarray(np.abs(t) <= a if strategy == "hard" else np.abs(t) > a, float)


def density(x: Array) -> Array:
    """Returns the standard normal density; 0 beyond 40, where the square of a huge x would
    overflow.
    """
    return np.asarray(_PEAK * np.exp(-0.5 * np.square(np.clip(x, -40, 40))))


def erf(x: Array) -> Array:
    return special(torch.special.erf, x)


def _inside(a: Array, rho: ArrayLike) -> Scalars:
    """Returns the scalars of q = 1[|t| <= a]."""
    a = np.minimum(a, _FAR)
    rho = np.asarray(rho, float)
    spread = np.sqrt((1 - rho) * (1 + rho))
    peak = density(a)
    e1 = erf(_ratio(a, spread) / np.sqrt(2))
    p = erf(a / np.sqrt(2))
    gamma = p - 2 * a * peak
    beta_tilde = np.asarray(
        2 * (rho * _PEAK * e1 - peak * erf(rho * _ratio(a, spread) / np.sqrt(2)))
    )
    small = np.broadcast_to(a < _SMALL, beta_tilde.shape)
    if small.any():
        few, r, s = (np.broadcast_to(x, small.shape)[small] for x in (a, rho, spread))
        gamma, beta_tilde = np.array(np.broadcast_to(gamma, small.shape)), np.array(beta_tilde)
        gamma[small], beta_tilde[small] = _near_zero(few, r, s)
    return Scalars(p, np.asarray(gamma), np.asarray(2 * _PEAK * spread * e1), beta_tilde)


def _near_zero(a: Array, rho: Array, spread: Array) -> tuple[Array, Array]:
    """Returns gamma and beta~ of |t| <= a for small a, as integrals of one sign: nothing
    cancels.
    """
    x, w = np.polynomial.legendre.leggauss(32)
    x, w = (1 + x) / 2, w / 2
    t = a[:, None] * x
    gamma = 2 * a * np.sum(w * t**2 * density(t), axis=-1)
    turn = np.minimum(a, 8 * _ratio(spread, np.abs(rho)))  # from here on |erf| = 1
    t = turn[:, None] * x
    rising = turn * np.sum(
        w * t * erf(rho[:, None] * _ratio(t, spread[:, None]) / np.sqrt(2)) * density(t), axis=-1
    )
    return gamma, 2 * (rising - np.sign(rho) * density(turn) * np.expm1((turn**2 - a**2) / 2))


def _outside(a: Array, rho: ArrayLike) -> Scalars:
    """Returns the scalars of q = 1[|t| > a]: no differences of like numbers."""
    a = np.minimum(a, _FAR)
    rho = np.asarray(rho, float)
    spread = np.sqrt((1 - rho) * (1 + rho))
    peak = density(a)
    e1 = special(torch.special.erfc, _ratio(a, spread) / np.sqrt(2))
    beta_tilde = 2 * (rho * _PEAK * e1 + peak * erf(rho * _ratio(a, spread) / np.sqrt(2)))
    p = special(torch.special.erfc, a / np.sqrt(2))
    gamma = p + 2 * a * peak
    return Scalars(p, gamma, np.asarray(2 * _PEAK * spread * e1), np.asarray(beta_tilde))


def _soft_parts(
    a: Array, log_scale: Array, power: Array, rho: Array
) -> tuple[Scalars, Array, Array]:
    """Returns the part where q = 1 in closed form; nodes and weights (cells, nodes) of the rest,
    for both signs of t.
    """
    eager = power < 0
    inner, outer = _inside(np.where(eager, 0.0, a), rho), _outside(np.where(eager, a, np.inf), rho)
    sure = Scalars(*(np.where(eager, o, i) for o, i in zip(outer, inner, strict=True)))
    lo, hi = np.where(eager, 0.0, a)[:, None], np.where(eager, np.minimum(a, _END), _END)[:, None]
    t = lo + (hi - lo) * _SOFT_NODES
    q = np.exp(np.minimum(0.0, log_scale[:, None] + _log_profile(t, power[:, None])))
    return sure, t, 2 * (hi - lo) * _SOFT_WEIGHTS * density(t) * q


def _log_profile(t: Array, power: Array) -> Array:
    """Returns power times the logarithm of sigma(t) sigma(-t) / sigma(0)^2, for t >= 0."""
    return np.asarray(-2 * power * (t / 2 + np.log1p(np.exp(-t)) - np.log(2)))


def _graded(steps: int) -> Array:
    """Returns edges of panels on [0, 1] that halve towards both ends."""
    halves = 0.5 ** np.arange(1, steps + 1)
    return np.concatenate([[0.0], halves[::-1], 1 - halves[1:], [1.0]])


def _unit_rule(steps: int, nodes: int) -> tuple[Array, Array]:
    edges = _graded(steps)
    x, w = np.polynomial.legendre.leggauss(nodes)
    widths = np.diff(edges)[:, None]
    return (edges[:-1, None] + widths * (1 + x) / 2).ravel(), (widths * w / 2).ravel()


_SOFT_NODES, _SOFT_WEIGHTS = _unit_rule(24, 12)
_BLOCK = 1024  # cells a block: their nodes stay in the cache


def _ratio(x: ArrayLike, y: ArrayLike) -> Array:
    """Returns x / y with 0 / 0 = 0: the limit that makes the closed forms right at rho = +-1."""
    return np.asarray(x / np.maximum(y, _TINY))


def special(function: Callable[..., Any], x: ArrayLike) -> Array:
    """Returns a special function that NumPy lacks, on torch's threads."""
    return np.asarray(function(torch.from_numpy(np.require(x, np.float64, ["C", "W"]))).numpy())
