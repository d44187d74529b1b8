"""The arguments of the prediction and its simulation, and the domain of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpfast.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import NotRequired

Array: TypeAlias = "NDArray[np.float64]"
STRATEGIES = ("hard", "easy", "soft")
_Domain = tuple[Callable[[Array], Any], str]
_COSINE: _Domain = (lambda x: np.abs(x) <= 1, "a cosine, between -1 and 1")
_SIZE: _Domain = (lambda x: (x >= 1) & np.isfinite(x), "at least 1")
_NOT_NEGATIVE: _Domain = (lambda x: (x >= 0) & np.isfinite(x), "at least 0")
_FRACTION: _Domain = (lambda x: (x > 0) & (x <= 1), "in (0, 1]")
_DOMAINS: dict[str, _Domain] = {
    "d": _SIZE,
    "n": _SIZE,
    "keep": _FRACTION,
    "p": _FRACTION,
    "gamma": _NOT_NEGATIVE,
    "phi": (lambda x: (x > 0) & np.isfinite(x), "above 0"),
    "rho": _COSINE,
    "rho_g": _COSINE,
    "rho_s": _COSINE,
    "ridge": _NOT_NEGATIVE,
    "power": (np.isfinite, "finite"),
}


class Pool(TypedDict):
    """The arguments of ``test_error`` that say what is selected and how it is fitted; it says what
    they are.
    """

    n: ArrayLike
    keep: ArrayLike
    ridge: ArrayLike
    strategy: NotRequired[str]
    power: NotRequired[ArrayLike]


class Arguments(Pool):
    """The arguments of a whole experiment: those of ``Pool`` and the directions."""

    d: ArrayLike
    rho: ArrayLike
    rho_g: NotRequired[ArrayLike | None]
    rho_s: NotRequired[ArrayLike | None]


class Cells(NamedTuple):
    """Checked arguments in float64. rho: cosine of the labels' vector and the truth; rho_g and
    rho_s: of the selecting vector and either. Two directions are three of which two are one: rho =
    1."""

    d: Array
    n: Array
    keep: Array
    ridge: Array
    rho: Array
    rho_g: Array
    rho_s: Array
    power: Array


def cells(
    *,
    d: ArrayLike,
    n: ArrayLike,
    keep: ArrayLike,
    rho: ArrayLike,
    ridge: ArrayLike,
    strategy: str = "hard",
    rho_g: ArrayLike | None = None,
    rho_s: ArrayLike | None = None,
    power: ArrayLike = 1.0,
) -> Cells:
    """Returns the arguments, each in its own shape; InputError names what lies outside the domain,
    NaN included.
    """
    choose("strategy", strategy, STRATEGIES)
    if (rho_g is None) != (rho_s is None):
        raise InputError("rho_g, rho_s: three directions need both")
    x = domain(d=d, n=n, keep=keep, ridge=ridge, rho=rho, power=power)
    one = np.asarray(1.0)
    if rho_g is None or rho_s is None:
        return Cells(x["d"], x["n"], x["keep"], x["ridge"], one, x["rho"], x["rho"], x["power"])
    x |= domain(rho_g=rho_g, rho_s=rho_s)
    shapes_agree(**x)
    a = x["rho"]
    b = x["rho_g"]
    c = x["rho_s"]
    if np.any(1 + 2 * a * b * c - a**2 - b**2 - c**2 < -1e-12):
        raise InputError("rho, rho_g, rho_s: no three vectors have these cosines")
    return Cells(**x)


def domain(**values: ArrayLike) -> dict[str, Array]:
    """Returns each value as float64; InputError names the first outside of its domain, and shapes
    that do not broadcast.
    """
    checked = {}
    for name, value in values.items():
        good, wanted = _DOMAINS[name]
        try:
            x = np.asarray(value, float)
        except (TypeError, ValueError):
            raise InputError(f"{name} = {value!r}: expected numbers, {wanted}") from None
        outside = ~np.asarray(good(x))
        if outside.any():
            raise InputError(f"{name} = {float(x[outside].flat[0])!r}: {wanted}")
        checked[name] = x
    shapes_agree(**checked)
    return checked


def shapes_agree(**values: Array) -> None:
    try:
        np.broadcast_shapes(*(x.shape for x in values.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {x.shape}" for name, x in values.items() if x.ndim)
        raise InputError(f"{shapes}: shapes that do not broadcast") from None


def choose(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{name} = {value!r}: one of {', '.join(known)}")
