"""The way from a pool to the batches that a learner trains on: ``make_loader``."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

from dpfast.config import imported, is_import_path
from dpfast.config.imported import FORM
from dpfast.errors import InputError
from dpfast.feed.dali import DaliLoader
from dpfast.feed.loader import Loader
from dpfast.feed.torch_loader import TorchLoader
from dpfast.pool.protocol import Pool

PARTS = (  # of the protocol Loader
    *("pool", "waited", "__next__", "state_dict", "load_state_dict"),
    *("indices_after", "release", "close"),
)
LOADERS: dict[str, Callable[..., Loader]] = {"dali": DaliLoader, "torch": TorchLoader}


def make_loader(kind: str | Callable[..., Loader], pool: Pool, **options: Any) -> Loader:
    """Returns an endless iterator over shuffled batches (images, labels) of a pool.

    The pool may grow meanwhile: what was prepared is then dropped, and drawn anew from all samples.

    Args:
        kind: "auto", "torch" or "dali", the import path of a loader of one's own, or what makes
            one, called with ``pool`` and ``options``.
        pool: Samples to draw from; must hold one before the first batch.
        **options: Arguments of ``dpfast.feed.loader.PoolLoader``, such as ``batch_size`` and
            ``seed``, and of the loader's class in ``dpfast.feed.LOADERS``.

    Raises:
        InputError: For an unknown kind, options that do not fit, and a loader of one's own that
            lacks a part of the protocol.
        TypeError: For what is no loader or no pool.

    Examples:
        >>> import torch
        >>> from dpfast import SamplePool, make_loader
        >>> pool = SamplePool()
        >>> pool.append_images(torch.zeros(8, 1, 16, 16, dtype=torch.uint8), torch.arange(8))
        >>> images, labels = next(make_loader("torch", pool, batch_size=4, seed=0))
        >>> images.shape, images.min()
        (torch.Size([4, 1, 16, 16]), tensor(-1.))
    """
    if isinstance(kind, str) and is_import_path(kind):
        kind = _loader_at(kind)
    if isinstance(kind, str):
        if not hasattr(pool, "fetch"):
            raise TypeError(f"pool = {pool!r}: expected a SamplePool")
        return LOADERS[choose_loader(kind, pool.codec)](pool, **options)
    if not callable(kind):
        raise TypeError(f"loader must be a name or make a loader, got {kind!r}")
    made = kind(pool, **options)
    for name in PARTS:
        if not hasattr(made, name):
            raise InputError(
                f"loader: a {type(made).__name__} has no {name}; "
                "expected the protocol dpfast.Loader"
            )
    return made


def choose_loader(kind: str, codec: str = "pixels") -> str:
    """Returns the name in ``LOADERS`` of a loader for a pool of ``codec``: ``kind``, unless that is
    "auto".

    "auto" takes DALI for JPEG, which it decodes, and torch for what lies in the pool as pixels or
    latents: on two CPU cores DALI takes 7.5 times as long for crops of 256 images of 224 px, 9.7
    times at 32 px and 2.6 to 9.3 times without crops (``dpfast bench loader``). DALI has not run on
    a GPU yet.

    The import path of a loader of the user's own is itself.

    Raises ``InputError`` for an unknown loader, for DALI where it is not installed, and for a path
    that leads to nothing that could make a loader.
    """
    if is_import_path(kind):
        _loader_at(kind)
        return kind
    if kind == "auto":
        return "dali" if codec == "jpeg" and dali_installed() else "torch"
    if kind not in LOADERS:
        raise InputError(f"loader = {kind!r}: expected one of auto, {', '.join((*LOADERS, FORM))}")
    if kind == "dali" and not dali_installed():
        raise InputError(
            "loader = 'dali': DALI is not installed; pip install 'dpfast[dali]', or choose 'torch'"
        )
    return kind


def _loader_at(path: str) -> Callable[..., Loader]:
    """Returns the maker of a loader at an import path."""
    found: Callable[..., Loader] = imported("loader", path)
    if not callable(found):
        raise InputError(
            f"loader = {path!r}: is a {type(found).__name__}, "
            "expected a class or function that makes a dpfast.Loader"
        )
    return found


def check_groups(loader: str | Callable[..., Loader]) -> None:
    """Raises ``InputError`` for what makes a loader of the caller's own and takes no ``groups``
    (``PoolLoader``).
    """
    make = _loader_at(loader) if isinstance(loader, str) and is_import_path(loader) else loader
    if isinstance(make, str):
        return
    try:
        inspect.signature(make).bind_partial(groups=None)
    except TypeError:
        raise InputError(
            f"real_in_batch: loader = {loader!r} takes no groups, which say what of the pool is "
            "real; expected a parameter of that name, or no real_in_batch"
        ) from None
    except ValueError:  # of native code, which has no signature
        return


def dali_installed() -> bool:
    """Returns True if NVIDIA DALI can be imported."""
    return (
        importlib.util.find_spec("nvidia") is not None
        and importlib.util.find_spec("nvidia.dali") is not None
    )
