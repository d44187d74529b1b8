"""The fused operations of a guided sampler: entropy, guided step, keyed noise, batch gather.

Each file holds one operation: its formula, its registration with torch and its public function. The
same name stands in `reference` for plain PyTorch and in `kernels` for Triton; the C++ of
`dpfast._native` is in csrc. `backend_of` tells which kernels an operation would use on a device;
`DPFAST_BACKEND` forces one.
"""

from dpfast.ops.dispatch import backend_of
from dpfast.ops.entropy import entropy, entropy_and_grad
from dpfast.ops.gather import gather_batch
from dpfast.ops.guided_step import DynamicThreshold, guided_step
from dpfast.ops.noise import normal

__all__ = [
    "DynamicThreshold",
    "backend_of",
    "entropy",
    "entropy_and_grad",
    "gather_batch",
    "guided_step",
    "normal",
]
