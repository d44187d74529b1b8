"""Attention kernels: torch's scaled_dot_product_attention, or xformers where it is installed and
fits torch and device.

xformers ships binaries for one build of torch. Beside another it still imports, warns and lacks its
kernels, so it is never the default, and what is missing is said before any weights are loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from dpfast.errors import InputError


def checked(attention: str, device: torch.device) -> str:
    """Returns ``attention``, or ``InputError`` for an unknown kind, and for xformers that is
    missing, does not match or has no GPU to run on.
    """
    if attention not in ("sdpa", "xformers"):
        raise InputError(f"attention = {attention!r}: expected 'sdpa' or 'xformers'")
    if attention == "xformers":
        problem = _problem(device)
        if problem is not None:
            raise InputError(f"attention = 'xformers': {problem}, or use 'sdpa'")
    return attention


def _problem(device: torch.device) -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return "not installed; pip install 'dpfast[xformers]'"
    try:
        version = importlib.import_module("xformers").__version__
        library = importlib.import_module("xformers._cpp_lib")
    except Exception as error:  # whatever a foreign package raises on import
        return (
            f"installed, but cannot be imported ({_line(error)}); install a build for torch "
            f"{torch.__version__}"
        )
    failure = getattr(library, "_cpp_library_load_exception", None)
    if failure is not None:
        return (
            f"version {version} does not match torch {torch.__version__} ({_line(failure)}); "
            "install one that does"
        )
    if device.type != "cuda":
        return f"runs on a GPU alone, and device = {str(device)!r}; take a GPU"
    return None


def set_attention(model: Any, attention: str) -> Any:
    """Makes a model of diffusers use the kernels, and returns it. Raises ``InputError`` where it
    cannot.
    """
    if attention == "xformers":
        try:
            model.enable_xformers_memory_efficient_attention()  # runs one small product first
        except Exception as error:  # of diffusers, xformers or CUDA
            raise InputError(f"attention = 'xformers': {_line(error)}; use 'sdpa'") from error
    return model


def _line(error: BaseException) -> str:
    """Returns a foreign message without its advice, as one line."""
    return " ".join(str(error).split("Please")[0].split()) or type(error).__name__
