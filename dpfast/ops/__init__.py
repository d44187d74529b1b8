"""The operations with kernels of their own: what a guided sampler, a pool and a loader run often.

Each file holds one operation, in reading order: its formula and the bytes that it moves, the
reference in plain PyTorch, the Triton kernel, the call of the C++ kernel (csrc), the registration
with torch and the public function; `guided_step` and `group_norm` take a folder. `backend_of` tells
which kernels an operation would use on a device; `DPFAST_BACKEND` forces one.

What operations share: `dispatch` (the rule that chooses kernels), `check` (of arguments), `layout`
(channels_last memory), `traffic` (what each launches and moves, for counters) and `triton_stub`
(kernels can be defined where Triton is missing). `audit` reads what the Triton
kernels become on a GPU.
"""

from dpfast.ops.bias_residual import bias_residual
from dpfast.ops.chunk_rows import ChunkTable, take_rows
from dpfast.ops.crop import StoredImages, crop_batch
from dpfast.ops.dispatch import backend_of
from dpfast.ops.entropy import entropy, entropy_and_grad
from dpfast.ops.frozen_linear import frozen_linear
from dpfast.ops.gate_norm_modulate import gate_norm_modulate, gate_norm_quantise
from dpfast.ops.gather import gather_batch
from dpfast.ops.geglu import geglu
from dpfast.ops.group_norm import group_norm, group_norm_and_x
from dpfast.ops.guided_step import DynamicThreshold, guided_step
from dpfast.ops.noise import normal
from dpfast.ops.permutation import permutation
from dpfast.ops.quantise import Quantised, quantise
from dpfast.ops.relu_chain import relu_chain

__all__ = [
    "ChunkTable",
    "DynamicThreshold",
    "Quantised",
    "StoredImages",
    "backend_of",
    "bias_residual",
    "crop_batch",
    "entropy",
    "entropy_and_grad",
    "frozen_linear",
    "gate_norm_modulate",
    "gate_norm_quantise",
    "gather_batch",
    "geglu",
    "group_norm",
    "group_norm_and_x",
    "guided_step",
    "normal",
    "permutation",
    "quantise",
    "relu_chain",
    "take_rows",
]
