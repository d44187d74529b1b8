"""The predicted test error of ridge regression on selected samples (Theorem 1 of the paper, in its
correct form).

Model: x ~ N(0, I_d), y = sign(x.w_0), a pool of n samples of which a rule keeps the fraction p
(`dpfast.theory.scalars`), w_hat minimises the mean squared error over the *pool size* plus ridge
|w|^2. With phi = d / n, for d and n to infinity:

    1/m = p/(1 + phi m) + ridge             1/m~ = gamma/(1 + phi m) + ridge
    m0  = sqrt(1 - rho^2) beta m + rho beta~ m~
    r   = beta^2 m + beta~^2 m~             r' = beta^2 m' + beta~^2 m~'
    nu0 = p phi m' + r' - 2 phi m' r / (1 + phi m)
    E   = arccos(m0 / sqrt(nu0)) / pi

m' and m~' are derivatives in z = -ridge. "arxiv-v1" and "icml-main" are what arXiv 2502.15588v1 and
the ICML main text print; both disagree with simulation of the stated model and are here for
comparison only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from dpfast.errors import InputError
from dpfast.theory.cells import Array, cells, choose, domain
from dpfast.theory.scalars import Scalars, scalars, special

FORMS = ("exact", "arxiv-v1", "icml-main")
_LEAST_RIDGE = (
    1e-100  # below it the squares of 1 / ridge overflow, and the error no longer depends on it
)


class Spectral(NamedTuple):
    """The numbers m, m', m~ and m~' at z = -ridge."""

    m: Array
    m_prime: Array
    m_tilde: Array
    m_tilde_prime: Array


def test_error(
    *,
    d: ArrayLike,
    n: ArrayLike,
    keep: ArrayLike,
    rho: ArrayLike,
    ridge: ArrayLike,
    strategy: str = "hard",
    form: str = "exact",
    rho_g: ArrayLike | None = None,
    rho_s: ArrayLike | None = None,
    power: ArrayLike = 1.0,
) -> Array:
    """Returns the probability of a wrong label on a fresh sample.

    It is broadcast over all arguments. With rho_g and rho_s there are three directions: labels come
    from a generator at cosine ``rho`` from the truth; the selecting vector has cosine rho_g with
    the generator and rho_s with the truth, which the test uses.

    Args:
        d: Number of features.
        n: Size of the pool before selection.
        keep: Fraction kept, in (0, 1].
        rho: Cosine of the selecting vector and the labels' one, w_0; with three directions that of
            the generator and the truth.
        ridge: Penalty, normalised by n; 0 takes the closed form of the limit.
        strategy: "hard", "easy" or "soft".
        form: "exact", or a superseded print of the paper, "arxiv-v1" or "icml-main".
        rho_g: Cosine of the selecting vector and the generator.
        rho_s: Cosine of the selecting vector and the truth.
        power: Power of the soft rule.

    Returns:
        float64 in the broadcast shape.

    Raises:
        InputError: For an argument outside its domain, which the message names, and for ridge = 0
            at d = n keep, where nu0 is infinite.

    Examples:
        >>> from dpfast.theory import test_error
        >>> hard = test_error(d=100, n=10_000, keep=0.1, rho=1.0, ridge=1e-3)
        >>> bool(hard < test_error(d=100, n=1_000, keep=1.0, rho=1.0, ridge=1e-3))
        True
    """
    choose("form", form, FORMS)
    c = cells(
        d=d,
        n=n,
        keep=keep,
        rho=rho,
        ridge=ridge,
        strategy=strategy,
        rho_g=rho_g,
        rho_s=rho_s,
        power=power,
    )
    if rho_g is not None and form != "exact":
        raise InputError(
            f"form = {form!r}: the superseded forms know two directions; leave rho_g and rho_s out"
        )
    if np.any((c.ridge == 0) & (np.abs(c.d - c.n * c.keep) <= 1e-14 * c.d)):
        raise InputError("ridge = 0: the limit does not exist at d = n keep; take a ridge above 0")
    phi, ridge = c.d / c.n, c.ridge
    with np.errstate(all="ignore"):
        s = scalars(strategy, c.keep, c.rho_g, power=c.power)
        spread = np.sqrt((1 - c.rho_g) * (1 + c.rho_g))
        across = (
            spread
            if rho_g is None
            else np.clip((c.rho - c.rho_g * c.rho_s) / np.maximum(spread, 1e-300), -1, 1)
        )
        error = _general(s, phi, np.maximum(ridge, _LEAST_RIDGE), across, c.rho_s, c.rho_g, form)
        if np.any(ridge == 0):
            limit = _limit(s, phi, across, c.rho_s) if form == "exact" else np.nan
            error = np.where(ridge == 0, limit, error)
    if not np.isfinite(error).all():
        raise InputError(
            f"d / n, keep, ridge: no finite prediction for this combination with form {form!r}"
        )
    return np.asarray(error)


test_error.__test__ = False  # type: ignore[attr-defined]  # no test, whatever pytest thinks of its name


def ridgeless(
    *, d: ArrayLike, n: ArrayLike, keep: ArrayLike, rho: ArrayLike, strategy: str = "hard"
) -> Array:
    """Returns the limit of no ridge in closed form (Corollary 1 of arXiv 2502.15588).

    The arguments are those of ``test_error``.

    Raises:
        InputError: For d = n keep, and an argument outside its domain.
    """
    return test_error(d=d, n=n, keep=keep, rho=rho, ridge=0.0, strategy=strategy)


def spectral(p: ArrayLike, gamma: ArrayLike, phi: ArrayLike, ridge: ArrayLike) -> Spectral:
    """Returns m, m~ and their derivatives at z = -ridge.

    Either sign of p - phi + ridge goes without cancellation.

    Raises:
        InputError: Outside 0 < p <= 1, gamma >= 0, phi > 0, ridge > 0, and where the result is
            beyond float64.
    """
    p, gamma, phi, ridge = domain(p=p, gamma=gamma, phi=phi, ridge=ridge).values()
    if np.any(ridge == 0):
        raise InputError("ridge = 0: expected above 0; ridgeless() is the limit")
    with np.errstate(all="ignore"):
        made = _spectral(p, gamma, phi, ridge)
    if not all(np.isfinite(part).all() for part in made):
        raise InputError("p, gamma, phi, ridge: m or a derivative of it is beyond float64")
    return made


def _spectral(p: Array, gamma: Array, phi: Array, ridge: Array) -> Spectral:
    b = p - phi + ridge
    root = np.sqrt(b * b + 4 * phi * ridge)
    m = np.where(b > 0, 2 / (np.abs(b) + root), (root + np.abs(b)) / (2 * phi * ridge))
    grown = 1 + phi * m
    m_prime = m * grown / root
    m_tilde = 1 / (gamma / grown + ridge)
    return Spectral(m, m_prime, m_tilde, m_tilde**2 * (1 + gamma * phi * m_prime / grown**2))


def _general(
    s: Scalars, phi: Array, ridge: Array, across: Array, along: Array, rho: Array, form: str
) -> Array:
    f = _spectral(s.p, s.gamma, phi, ridge)
    m0 = across * s.beta * f.m + along * s.beta_tilde * f.m_tilde
    b, b_tilde = s.beta, s.beta_tilde
    if form != "exact":  # omega for beta, as printed
        b, b_tilde = across * b, rho * b_tilde
    r = b**2 * f.m + b_tilde**2 * f.m_tilde
    r_prime = b**2 * f.m_prime + b_tilde**2 * f.m_tilde_prime
    nu0 = s.p * phi * f.m_prime + r_prime - 2 * phi * f.m_prime / (1 + phi * f.m) * r
    if form == "arxiv-v1":
        m0 = np.sqrt(2 / np.pi) * r
        left = np.maximum(nu0 - m0**2, 0) + 1e-300
        return special(torch.special.ndtr, -m0 / np.sqrt(left))
    return np.asarray(np.arccos(np.clip(m0 / np.sqrt(np.maximum(nu0, 1e-300)), -1, 1)) / np.pi)


def _limit(s: Scalars, phi: Array, across: Array, along: Array) -> Array:
    """Returns the limit of Corollary 1, with the powers of |p - phi| cancelled in a / sqrt(b), so
    that it is stable next to phi = p.
    """
    p = s.p
    gamma = s.gamma
    beta2 = s.beta**2
    tilde2 = s.beta_tilde**2
    gap = np.abs(p - phi)
    r0 = beta2 + tilde2 * p / gamma
    r0_prime = p * (beta2 + tilde2 * ((p - phi) * p / gamma**2 + phi / gamma))
    few = (across * s.beta + along * s.beta_tilde * p / gamma) * np.sqrt(
        gap / (p**2 * phi + r0_prime - 2 * phi * r0)
    )
    c1 = 1 - (p - gamma) / phi
    many = (across * s.beta + along * s.beta_tilde / c1) * np.sqrt(
        gap / phi / (p * phi - beta2 - tilde2 / c1)
    )
    return np.asarray(np.arccos(np.clip(np.where(phi < p, few, many), -1, 1)) / np.pi)
