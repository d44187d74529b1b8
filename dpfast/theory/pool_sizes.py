"""The samples that reach an accuracy at each kept fraction, against no selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from dpfast.errors import InputError
from dpfast.theory.cells import Array, domain
from dpfast.theory.theorem import test_error

KEEPS = (1.0, 0.9, 0.8, 0.5, 0.3, 0.2, 0.1)
# samples a dimension; an accuracy that no pool up to this size reaches counts as out of reach
MOST = 100_000
_RIDGES = np.logspace(-8, 2, 101)


class PoolSize(NamedTuple):
    """The pool that a kept fraction needs. n: size from which on the accuracy holds, None where
    none holds it.

    accuracy and ridge: those of the pool n, or of the best of all pools where n is None. A fixed
    ridge can reach the accuracy and lose it again with more samples; then n is None and the best
    accuracy is above the one asked for.
    """

    keep: float
    n: int | None
    ridge: float
    accuracy: float
    best_n: int

    @property
    def kept(self) -> float | None:
        return None if self.n is None else self.n * self.keep


def pool_sizes(
    accuracy: float,
    *,
    d: int,
    keeps: Sequence[float] = KEEPS,
    ridge: float | None = None,
    rho: float = 1.0,
    strategy: str = "hard",
    rho_g: float | None = None,
    rho_s: float | None = None,
    power: float = 1.0,
) -> list[PoolSize]:
    """Returns one size for each kept fraction, of pools up to MOST d. The other arguments are those
    of ``test_error``.

    ridge: above 0; None takes the best one for every pool. Raises InputError, naming the argument.
    """
    if not 0.5 < accuracy < 1:
        raise InputError(f"accuracy = {accuracy!r}: expected between 0.5, which is chance, and 1")
    domain(d=d, keep=keeps)
    if ridge is not None:
        domain(ridge=ridge)
        if ridge == 0:
            raise InputError("ridge = 0: expected above 0 here; 1e-9 stands for its limit")

    def best(n: ArrayLike, keep: float) -> tuple[Array, Array]:
        """Returns ridges and errors of pools n (k,)."""
        n = np.asarray(n, float)[:, None]
        log = np.log(_RIDGES if ridge is None else np.array([ridge])) + np.zeros_like(n)
        looks = 3 if ridge is None else 1  # each one between the neighbours of the best before
        for _ in range(looks):
            error = test_error(
                d=d,
                n=n,
                keep=keep,
                rho=rho,
                ridge=np.exp(log),
                strategy=strategy,
                rho_g=rho_g,
                rho_s=rho_s,
                power=power,
            )
            at, rows = error.argmin(1), np.arange(len(n))
            found = np.exp(log[rows, at]), error[rows, at]
            low = log[rows, np.maximum(at - 1, 0)]
            high = log[rows, np.minimum(at + 1, log.shape[1] - 1)]
            log = np.linspace(low, high, 21, axis=1)
        return found

    sizes = []
    for keep in keeps:
        # There a small ridge lets the error rise again, within less than the grid resolves.
        peak = d / keep
        near = [max(1, int(peak)), int(np.ceil(peak))]
        pools = np.unique([*np.rint(np.geomspace(1, MOST * d, 400)).astype(np.int64), *near])
        ridges, errors = best(pools, keep)
        short = np.flatnonzero(1 - errors < accuracy)
        if len(short) and short[-1] == len(pools) - 1:
            i = int(errors.argmin())
            sizes.append(
                PoolSize(keep, None, float(ridges[i]), float(1 - errors[i]), int(pools[i]))
            )
            continue
        low, high = (pools[short[-1]], pools[short[-1] + 1]) if len(short) else (0, pools[0])
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (low, middle) if 1 - best([middle], keep)[1][0] >= accuracy else (middle, high)
            )
        ridges, errors = best([high], keep)
        sizes.append(PoolSize(keep, int(high), float(ridges[0]), float(1 - errors[0]), int(high)))
    return sizes


def table(sizes: Sequence[PoolSize]) -> str:
    """Returns a Markdown table, against the pool without selection if there is one."""
    whole = next((p for p in sizes if p.keep == 1), None)
    lines = [
        "| keep | pool | kept | fewer kept than without selection | ridge | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for p in sizes:
        if p.n is None or p.kept is None:
            best = f"at best {100 * p.accuracy:.2f} %, pool {p.best_n:,}"
            lines.append(
                f"| {p.keep:g} | none up to {MOST:,} d holds it | | | {p.ridge:.2g} | {best} |"
            )
            continue
        gain = f"{whole.n / p.kept:.2f}x" if whole is not None and whole.n is not None else ""
        lines.append(
            f"| {p.keep:g} | {p.n:,} | {p.kept:,.0f} | {gain} | {p.ridge:.2g} | "
            f"{100 * p.accuracy:.2f} % |"
        )
    return "\n".join(lines)
