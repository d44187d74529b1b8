"""The predicted test error for features of any covariance (the appendix of the paper, with its open
part filled in).

Model of `dpfast.theory.theorem` with x ~ N(0, Sigma). In the whitened space, x = Sigma^1/2 z,
labels and selection look along v_0 ~ Sigma^1/2 w_0 and u ~ Sigma^1/2 w_s (unit vectors), so the
four scalars are those at rho = u.v_0. With

    A = E[q x x^T] = Sigma^1/2 (p I - (p - gamma) u u^T) Sigma^1/2
    c = E[q y x]   = Sigma^1/2 (beta~ u + beta v)            v: the part of v_0 across u, normalised
    delta = tr(Sigma R0) / n                                 R0 = (p Sigma / (1 + delta) + ridge)^-1
    R = (A / (1 + delta) + ridge)^-1                         of (X^T D X / n + ridge)^-1 the
                                                             deterministic equivalent

the paper gives m0 = c.R Sigma w_0 / |Sigma^1/2 w_0| and

    nu0 = p chi + c.S c - 2 chi c.R c / (1 + delta)          chi = tr(Sigma S) / n

and leaves S, the equivalent of E[(X^T D X / n + ridge)^-1 Sigma (...)^-1], open. Leave one row out
twice, as for R:

    S = R Sigma R + chi / (1 + delta)^2 R A R
    chi = tr(Sigma R0 Sigma R0) / n / (1 - p tr(Sigma R0 Sigma R0) / n / (1 + delta)^2)

The one direction u does not count in the traces. Sigma = 1 gives Theorem 1 back: delta = phi m, chi
= phi m'. The R that the paper prints, Sigma^-1/2 (...) Sigma^-1/2 around a sum with the ridge in
it, is of the penalty ridge w.Sigma w.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from dpfast.errors import InputError
from dpfast.theory.cells import Array, Cells, Pool, cells
from dpfast.theory.scalars import scalars

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Features:
    """A covariance and the vectors that label, select and test, in one basis.

    Args:
        covariance: (d,) variances of independent features, or (d, d), symmetric and positive
            definite.
        truth: (d,) vector of any length, the labels of the test.
        selector: (d,) vector of any length, the selection.
        generator: (d,) vector of any length, the labels of the training set; None: the truth's.

    Raises:
        InputError: For an argument outside its domain, which the message names.
    """

    def __init__(
        self,
        covariance: ArrayLike,
        *,
        truth: ArrayLike,
        selector: ArrayLike,
        generator: ArrayLike | None = None,
    ) -> None:
        self.spectrum, basis = _spectrum(covariance)
        self.d = len(self.spectrum)
        units = []
        for name, vector in (("truth", truth), ("selector", selector), ("generator", generator)):
            w = np.asarray(truth if vector is None else vector, float)
            if w.shape != (self.d,) or not np.isfinite(w).all() or not w.any():
                raise InputError(
                    f"{name} of shape {w.shape}: expected ({self.d},) "
                    "finite numbers that are not all 0"
                )
            w = w / np.abs(w).max()
            units.append(
                np.sqrt(self.spectrum / self.spectrum.max()) * (w if basis is None else basis.T @ w)
            )
        # unit vectors (d,) along Sigma^1/2 w, in the basis of the eigenvectors
        self.truth, self.selector, self.generator = (unit / np.linalg.norm(unit) for unit in units)

    @property
    def cosines(self) -> tuple[float, float, float]:
        """The cosines rho, rho_g and rho_s of the theorem, in the whitened space."""
        pairs = (
            (self.generator, self.truth),
            (self.selector, self.generator),
            (self.selector, self.truth),
        )
        rho, rho_g, rho_s = (float(np.clip(a @ b, -1, 1)) for a, b in pairs)
        return rho, rho_g, rho_s

    def cells(self, **pool: Unpack[Pool]) -> Cells:
        """Returns the checked arguments of an experiment with these features.

        Raises:
            InputError: For an argument outside its domain, which the message names.
        """
        rho, rho_g, rho_s = self.cosines
        return cells(d=self.d, rho=rho, rho_g=rho_g, rho_s=rho_s, **pool)

    def mixing(self) -> Array:
        """Returns a (d, d) matrix M such that rows z M have the covariance where z ~ N(0, I).

        u, then v_label across u, then v_truth across both are the first axes of z.
        """
        spanned = np.stack([self.selector, self.generator, self.truth], axis=1)
        # A vector that the ones before it span gets a direction of its own: any will do.
        random = np.random.default_rng(0).standard_normal((self.d, self.d))
        for i in range(3):
            before, _ = np.linalg.qr(spanned[:, :i])
            if np.linalg.norm(spanned[:, i] - before @ (before.T @ spanned[:, i])) < 1e-9:
                spanned[:, i] = random[:, i]
        random[:, :3] = spanned
        axes, signs = np.linalg.qr(random)
        axes *= np.where(np.diag(signs) < 0, -1, 1)
        return np.asarray(axes.T * np.sqrt(self.spectrum))


def covariance_error(
    features: Features,
    *,
    n: ArrayLike,
    keep: ArrayLike,
    ridge: ArrayLike,
    strategy: str = "hard",
    power: float = 1.0,
) -> Array:
    """Returns the probability of a wrong label on a fresh sample, for any covariance.

    It is the appendix of arXiv 2502.15588 with its open part filled in, broadcast over n, keep and
    ridge.

    Args:
        features: Covariance and directions.
        n: Size of the pool before selection.
        keep: Fraction kept: the rule's threshold is in units of the projection's standard
            deviation.
        ridge: Penalty above 0.
        strategy: "hard", "easy" or "soft".
        power: Power of the soft rule.

    Returns:
        float64 in the broadcast shape.

    Raises:
        InputError: For an argument outside its domain, which the message names.
    """
    s = features.spectrum
    checked = features.cells(n=n, keep=keep, ridge=ridge, strategy=strategy, power=power)
    if np.any(checked.ridge == 0):
        raise InputError("ridge = 0.0: expected above 0 with a covariance")
    grid = np.broadcast_arrays(checked.n, checked.keep, checked.ridge)
    n, keep, ridge = (x[..., None] for x in grid)  # the last axis is Sigma's
    k = scalars(strategy, keep, checked.rho_g, power=power)
    across = features.generator - checked.rho_g * features.selector
    across /= np.linalg.norm(across) or 1.0

    delta = _delta(s, n, k.p, ridge)
    r0 = 1 / (k.p * s / (1 + delta) + ridge)
    df = np.sum((s * r0) ** 2, axis=-1, keepdims=True) / n
    chi = df / (1 - k.p * df / (1 + delta) ** 2)
    root = np.sqrt(s)
    a, c = root * features.selector, root * (k.beta_tilde * features.selector + k.beta * across)
    lost = (k.p - k.gamma) / (1 + delta)  # what selection takes from A along a, over 1 + delta

    def resolve(x: Array) -> Array:
        """Returns R x: R0 and its rank-one correction."""
        return np.asarray(r0 * x + lost * r0 * a * _dot(r0 * a, x) / (1 - lost * _dot(r0 * a, a)))

    rc = resolve(c)
    ac = k.p * s * rc - (k.p - k.gamma) * a * _dot(a, rc)  # A R c
    m0 = _dot(rc, root * features.truth)
    c_s_c = _dot(rc, s * rc) + chi / (1 + delta) ** 2 * _dot(rc, ac)
    nu0 = k.p * chi + c_s_c - 2 * chi * _dot(rc, c) / (1 + delta)
    with np.errstate(all="ignore"):
        error = np.arccos(np.clip(m0 / np.sqrt(nu0), -1, 1)) / np.pi
    if not np.isfinite(error).all():
        raise InputError(
            "n, keep, ridge: no finite prediction for this combination and this covariance"
        )
    return np.asarray(error)[..., 0]


def _spectrum(covariance: ArrayLike) -> tuple[Array, Array | None]:
    """Returns eigenvalues (d,) and eigenvectors (d, d) in columns, which a diagonal does
    without.
    """
    sigma = np.asarray(covariance, float)
    if (
        sigma.ndim not in (1, 2)
        or not sigma.size
        or (sigma.ndim == 2 and sigma.shape[0] != sigma.shape[1])
    ):
        raise InputError(f"covariance of shape {sigma.shape}: expected (d,) variances or (d, d)")
    if not np.isfinite(sigma).all():
        raise InputError("covariance: has entries that are not finite")
    if sigma.ndim == 1:
        spectrum, basis = sigma, None
    elif np.abs(sigma - sigma.T).max() > 1e-10 * np.abs(sigma).max():
        raise InputError("covariance: not symmetric")
    else:
        spectrum, basis = np.linalg.eigh((sigma + sigma.T) / 2)
    if not (spectrum > 0).all():
        raise InputError(
            f"covariance: its smallest eigenvalue is {spectrum.min():.3g}, expected above 0"
        )
    return spectrum, basis


def _delta(s: Array, n: Array, p: Array, ridge: Array) -> Array:
    """Returns the root of delta = tr(Sigma R0) / n, (..., 1).

    tr(Sigma R0) / n - delta is 0 at one point, as n delta (p s / (1 + delta) + ridge) grows with
    delta for each s. It lies between the trace at delta = 0 and at infinity; bisection in the
    logarithm.
    """
    low = np.log(np.sum(s / (p * s + ridge), axis=-1, keepdims=True) / n)
    high = np.log(np.sum(s) / (n * ridge)) + np.zeros_like(p)
    for _ in range(64):
        middle = (low + high) / 2
        delta = np.exp(middle)
        below = np.sum(s / (p * s / (1 + delta) + ridge), axis=-1, keepdims=True) / n > delta
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.exp((low + high) / 2)


def _dot(x: Array, y: Array) -> Array:
    return np.asarray(np.sum(x * y, axis=-1, keepdims=True))
