"""The one rule that chooses the kernels of an operation.

CUDA runs Triton, a CPU runs the native extension `dpfast._native`, or the PyTorch reference with one warning where the
extension was not built. `DPFAST_BACKEND=triton|native|reference` forces a backend, and `TRITON_INTERPRET=1` lets the
Triton kernels run on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType
from typing import Literal

import torch

Backend = Literal["triton", "native", "reference"]
BACKENDS: tuple[Backend, ...] = ("triton", "native", "reference")
OPERATIONS = ("entropy", "guided_step", "noise", "gather")


@functools.cache
def native() -> ModuleType | None:
    """The compiled extension, or None (after one warning) where it was not built."""
    try:
        return importlib.import_module("dpfast._native")
    except ImportError as error:
        warnings.warn(
            f"dpfast's native CPU kernels are not available ({error}); the slower PyTorch reference runs instead. "
            "Reinstall dpfast where a C++17 compiler is present to build them.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def backend_of(operation: str, device: torch.device | str) -> Backend:
    """The backend that `operation` ("entropy", "guided_step", "noise" or "gather") uses for tensors on `device`.

    Raises `ValueError` for an unknown operation or `DPFAST_BACKEND`, `RuntimeError` where a forced backend cannot run.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {operation!r}")
    kind = torch.device(device).type
    forced = os.environ.get("DPFAST_BACKEND")
    if forced:
        if forced not in BACKENDS:
            raise ValueError(f"DPFAST_BACKEND must be one of {', '.join(BACKENDS)}, got {forced!r}")
        return _forced(forced, kind)
    if kind == "cuda" and has_triton():
        return "triton"
    if kind == "cpu":
        if interpreted() and has_triton():
            return "triton"
        if native() is not None:
            return "native"
    return "reference"


def _forced(backend: Backend, kind: str) -> Backend:
    if backend == "native" and (kind != "cpu" or native() is None):
        raise RuntimeError(f"DPFAST_BACKEND=native needs CPU tensors and the built extension, got {kind} tensors")
    if backend == "triton" and not (has_triton() and (kind == "cuda" or (kind == "cpu" and interpreted()))):
        raise RuntimeError(
            f"DPFAST_BACKEND=triton needs Triton and CUDA tensors or TRITON_INTERPRET=1, got {kind} tensors"
        )
    return backend
