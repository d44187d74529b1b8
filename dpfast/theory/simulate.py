"""The experiment of the theory by Monte Carlo: draw a pool, select, fit, measure the exact angle
error.

Selection looks at one projection only. So the pool is drawn as n projections on the selecting
vector, and the other d
- 1 coordinates are drawn for the kept rows alone. The error of w_hat is its angle with the truth
over pi: no test set. Cells with one pool (d, n, keep) share its draws: directions are right-hand
sides, ridges are factorisations of one Gram matrix. Features of a covariance are these rows times
one matrix.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.hardware.device import device_of
from dpfast.theory.cells import Arguments, Array, Cells, Pool, cells
from dpfast.theory.covariance import Features
from dpfast.theory.scalars import soft_rule, threshold

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ELEMENTS = 32 << 20  # of one batch of kept rows


class Simulated(NamedTuple):
    """The mean test error over the draws and its standard error."""

    error: Array
    stderr: Array


def simulate(
    *,
    draws: int = 20,
    seed: int = 0,
    device: str | torch.device | None = None,
    **arguments: Unpack[Arguments],
) -> Simulated:
    """Simulates the experiment that ``test_error`` predicts, on a GPU if there is one.

    A cell's result depends on its own arguments, ``draws`` and ``seed``, not on the other cells,
    but cells that differ in rho or ridge alone use the same samples, so their deviations are
    correlated.

    Args:
        draws: Number of independent training sets.
        seed: Seed of all draws.
        device: Device of the simulation; None: a GPU, if any.
        **arguments: Those of ``test_error`` but for ``form``; d and n whole, d >= 3, ridge above 0,
            and one power.

    Raises:
        InputError: For an argument outside its domain, which the message names.
    """
    return _simulate(
        cells(**arguments), arguments.get("strategy", "hard"), None, draws, seed, device
    )


def simulate_covariance(
    features: Features,
    *,
    draws: int = 20,
    seed: int = 0,
    device: str | torch.device | None = None,
    **pool: Unpack[Pool],
) -> Simulated:
    """Simulates the experiment that ``covariance_error`` predicts.

    Args:
        features: Covariance and directions.
        draws: As in ``simulate``.
        seed: As in ``simulate``.
        device: As in ``simulate``.
        **pool: Further arguments of ``covariance_error``.

    Raises:
        InputError: For an argument outside its domain, which the message names.
    """
    return _simulate(
        features.cells(**pool), pool.get("strategy", "hard"), features.mixing(), draws, seed, device
    )


def _simulate(
    c: Cells,
    strategy: str,
    mixing: Array | None,
    draws: int,
    seed: int,
    device: str | torch.device | None,
) -> Simulated:
    if draws < 2:
        raise InputError(f"draws = {draws}: expected at least 2, for a standard error")
    if np.any(c.ridge <= 0):
        raise InputError(f"ridge = {float(np.min(c.ridge))!r}: expected above 0 in a simulation")
    if np.any(c.d < 3):
        raise InputError(f"d = {float(np.min(c.d))!r}: expected at least 3 in a simulation")
    for name, size in (("d", c.d), ("n", c.n)):
        if np.any(size % 1):
            raise InputError(
                f"{name} = {float(size[size % 1 > 0].flat[0])!r}: whole in a simulation"
            )
    if c.power.ndim:
        raise InputError(f"power of shape {c.power.shape}: one number in a simulation")
    grid = np.broadcast_arrays(c.d, c.n, c.keep, c.ridge, c.rho, c.rho_g, c.rho_s)
    table = np.stack([x.ravel() for x in grid], axis=1)
    out = np.empty((2, len(table)))
    place = device_of("auto" if device is None else device)
    mix = None if mixing is None else torch.tensor(mixing, dtype=torch.float64, device=place)
    for pool in np.unique(table[:, :3], axis=0):
        rows = np.flatnonzero((table[:, :3] == pool).all(1))
        errors = _pool(pool, table[rows, 3:], strategy, float(c.power), mix, draws, seed, place)
        out[:, rows] = errors.mean(0), errors.std(0, ddof=1) / np.sqrt(draws)
    return Simulated(*out.reshape(2, *grid[0].shape))


def _pool(
    pool: Array,
    fits: Array,
    strategy: str,
    power: float,
    mix: Tensor | None,
    draws: int,
    seed: int,
    device: torch.device,
) -> Array:
    """Returns errors (draws, fits) of one (d, n, keep); fits hold ridge, rho, rho_g, rho_s."""
    d = int(pool[0])
    n = int(pool[1])
    keep = float(pool[2])
    key = zlib.crc32(repr((seed, d, n, keep, strategy, power)).encode())
    generator = torch.Generator(device).manual_seed(key)
    directions, column = np.unique(fits[:, 1:], axis=0, return_inverse=True)
    label, truth = (
        torch.tensor(v, dtype=torch.float32, device=device) for v in _vectors(directions)
    )
    # Next to a square system the smallest eigenvalue is within single precision's error of the Gram
    # matrix.
    double = mix is not None or 0.5 < n * keep / d < 2
    size = max(1, min(draws, _ELEMENTS // max(1, int(n * keep * d))))
    errors = []
    for start in range(0, draws, size):
        batch = min(size, draws - start)
        x, kept = _kept_rows(batch, d, n, keep, strategy, power, generator, device)
        y = torch.sign(x[..., :2] @ label.T) * kept[..., None]
        if double:
            x, y = x.double(), y.double()
        if mix is not None:
            x = x @ mix
        wide = x.shape[1] < d
        gram = x @ x.mT if wide else x.mT @ x
        target = y if wide else x.mT @ y
        result = np.empty((batch, len(fits)))
        for ridge in np.unique(fits[:, 0]):
            here = np.flatnonzero(fits[:, 0] == ridge)
            w = _solve(gram, target, n * ridge)
            w = x.mT @ w if wide else w  # (batch, d, directions)
            w = (
                w if mix is None else mix @ w
            ).double()  # as projections on the unmixed coordinates
            length = w.norm(dim=1)
            # Nothing kept: w = 0 says nothing, and is wrong half of the time.
            cosine = (w[:, :3] * truth.T.double()).sum(1) / length.where(length > 0, 1.0)
            error = torch.arccos(cosine.clamp(-1, 1)) / torch.pi
            result[:, here] = error.cpu().numpy()[:, column.ravel()[here]]
        errors.append(result)
    return np.concatenate(errors)


def _solve(gram: Tensor, target: Tensor, shift: float) -> Tensor:
    shifted = gram.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
    try:
        return torch.cholesky_solve(target, torch.linalg.cholesky(shifted))
    except torch.linalg.LinAlgError:
        raise InputError(
            f"ridge: n ridge = {shift:.3g} is below the rounding of the simulated Gram matrix"
        ) from None


def _kept_rows(
    batch: int,
    d: int,
    n: int,
    keep: float,
    strategy: str,
    power: float,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Returns rows (batch, most kept, d) that were selected along coordinate 0, zero beyond each
    draw's own number.
    """
    t = torch.randn(batch, n, generator=generator, device=device)
    if strategy == "soft":
        log_scale = float(soft_rule(keep, power)[1][0])
        size = t.abs()
        log_q = log_scale - 2 * power * (size / 2 + torch.log1p(torch.exp(-size)) - np.log(2))
        chosen = torch.rand(batch, n, generator=generator, device=device).log() < log_q
    else:
        a = float(threshold(strategy, keep))
        chosen = t.abs() <= a if strategy == "hard" else t.abs() > a
    most = max(1, int(chosen.sum(1).max()))
    order = chosen.to(torch.int8).argsort(dim=1, descending=True)[:, :most]
    kept = chosen.gather(1, order)
    x = torch.randn(batch, most, d, generator=generator, device=device)
    x[..., 0] = t.gather(1, order)
    return x.mul_(kept[..., None]), kept


def _vectors(directions: Array) -> tuple[Array, Array]:
    """Returns label vectors (k, 2) and test vectors (k, 3) where the selecting vector is the first
    axis.
    """
    rho, rho_g, rho_s = directions.T
    spread = np.sqrt(np.maximum(0, 1 - rho_g**2))
    second = (rho - rho_g * rho_s) / np.where(spread > 0, spread, 1)
    third = np.sqrt(np.maximum(0, 1 - rho_s**2 - second**2))
    return np.stack([rho_g, spread], 1), np.stack([rho_s, second, third], 1)
