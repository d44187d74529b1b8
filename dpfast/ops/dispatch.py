"""The one rule that chooses the kernels of an operation.

CUDA runs Triton, a CPU runs the native extension `dpfast._native`, or the PyTorch reference with
one warning where the extension was not built. `DPFAST_BACKEND=triton|native|reference` forces a
backend, and `TRITON_INTERPRET=1` lets the Triton kernels run on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType
from typing import Literal, cast

import torch
from torch import Tensor

from dpfast.errors import InputError

Backend = Literal["triton", "native", "reference"]
BACKENDS: tuple[Backend, ...] = ("triton", "native", "reference")
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # DType in csrc/simd.hpp
# Read once: a lookup a call would cost a tenth of a small operation.
FORCED = os.environ.get("DPFAST_BACKEND", "")
# Triton reads it once too, where a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The operations, each a file of this package, and the backends for which it has a kernel.
OPERATIONS: dict[str, tuple[Backend, ...]] = {
    "entropy": ("triton", "native"),
    "guided_step": ("triton", "native"),
    "noise": ("triton", "native"),
    "gather": ("triton", "native"),
    "chunk_rows": ("triton", "native"),
    "crop": ("triton", "native"),
    "permutation": ("native",),  # computed on the host, whatever the device
    "frozen_linear": (),  # oneDNN's kernel, through PyTorch
    "geglu": ("triton",),
    "bias_residual": ("triton",),
    "gate_norm_modulate": ("triton",),
    "group_norm": ("triton",),
    "relu_chain": ("triton",),  # its products are cuDNN's, through PyTorch
    "quantise": ("triton",),
}
CPU = torch.device("cpu")


@functools.cache
def native() -> ModuleType | None:
    """Returns the compiled extension, or None (after one warning) where it was not built."""
    try:
        return importlib.import_module("dpfast._native")
    except ImportError as error:
        warnings.warn(
            f"dpfast's native CPU kernels are not available ({error}); the slower PyTorch "
            "reference runs instead. "
            "Reinstall dpfast where a C++17 compiler is present to build them.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def native_module() -> ModuleType:
    """Returns the compiled extension, where `backend_for` has chosen it."""
    module = native()
    assert module is not None
    return module


@functools.cache
def has_triton() -> bool:
    """Returns True if Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def backend_of(operation: str, device: torch.device | str) -> Backend:
    """Returns the backend that an operation uses for tensors on a device.

    Args:
        operation: One of ``dpfast.ops.dispatch.OPERATIONS``.
        device: Device of the tensors.

    Raises:
        InputError: For an unknown operation or ``DPFAST_BACKEND``.
        RuntimeError: Where a forced backend cannot run.

    Examples:
        >>> import dpfast.ops
        >>> dpfast.ops.backend_of("entropy", "meta")
        'reference'
    """
    if operation not in OPERATIONS:
        raise InputError(f"operation must be one of {', '.join(OPERATIONS)}, got {operation!r}")
    backend = backend_for(torch.device(device))
    return backend if backend in OPERATIONS[operation] else "reference"


# A constant of a graph: what torch.compiler.assume_constant_result sets, which takes seconds to
# import. Traced, the rule would look for modules and break the graph.
backend_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def backend_for(device: torch.device) -> Backend:
    """Returns `backend_of` for an operation that has all kernels: they share the rule."""
    return _choose(device, FORCED)


@functools.cache
def _choose(device: torch.device, forced: str) -> Backend:
    kind = device.type
    runs_triton = has_triton() and (kind == "cuda" or (kind == "cpu" and INTERPRETED))
    if forced == "triton" and not runs_triton:
        raise RuntimeError(
            "DPFAST_BACKEND=triton needs Triton and CUDA tensors or TRITON_INTERPRET=1, got "
            f"{kind} tensors"
        )
    if forced == "native" and (kind != "cpu" or native() is None):
        raise RuntimeError(
            f"DPFAST_BACKEND=native needs CPU tensors and the built extension, got {kind} tensors"
        )
    if forced not in ("", *BACKENDS):
        raise InputError(f"DPFAST_BACKEND must be one of {', '.join(BACKENDS)}, got {forced!r}")
    if forced:
        return cast(Backend, forced)
    if runs_triton:
        return "triton"
    return "native" if kind == "cpu" and native() is not None else "reference"


def traced(*tensors: Tensor | None) -> bool:
    """Returns True if a call must go through the registered torch operation, because something
    looks at the tensors' graph.

    Otherwise the kernel is called directly: the registered operation costs tens of microseconds a
    call.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()  # fake tensors, make_fx
    ):
        return True
    if torch.is_grad_enabled():
        # A loop, because a generator costs a small operation more than its arithmetic.
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def has_kernels(operation: str, tensor: Tensor) -> bool:
    """Returns True if the Triton kernels of `operation`, which has no others, run for a tensor.

    The meta device has no kernels, but counters look there for what a GPU would run.
    """
    if tensor.dtype == torch.float64:
        return False
    return tensor.is_meta or backend_of(operation, tensor.device) == "triton"


def in_graph(*tensors: Tensor | None) -> bool:
    """Returns `traced`, or on the meta device, where every call is looked at."""
    return any(t is not None and t.is_meta for t in tensors) or traced(*tensors)


def address(tensor: Tensor | None) -> int:
    """Returns the address of a tensor's first element for the native kernels, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Returns the tensor in contiguous memory, None for None. Its caller keeps it until it was
    read.
    """
    return None if tensor is None else tensor.contiguous()


def integer_or_tensor(value: int | Tensor) -> tuple[int, Tensor | None]:
    """Returns a number or a device scalar as the pair that a registered operation takes."""
    return (0, value) if isinstance(value, Tensor) else (value, None)


def number_or_tensor(value: float | Tensor) -> tuple[float, Tensor | None]:
    """Returns a number or a tensor of numbers as the pair that a registered operation takes."""
    return (0.0, value) if isinstance(value, Tensor) else (value, None)
