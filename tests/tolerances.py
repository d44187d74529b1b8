"""How far an operation may be from its fp64 reference; the comment beside a number is the worst
measured error.

Measured on an AVX-512 CPU with torch 2.13, and in Triton 3.9 as interpreter, for inputs of unit to
20-fold size.
"""

from __future__ import annotations

import os

import torch

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Rounding of an output: half a unit in the last place, relative. Triton's interpreter truncates to
# bf16, a GPU rounds.
HALF_ULP = {
    FP32: 2.0**-24,
    FP16: 2.0**-11,
    BF16: 2.0**-7 if os.environ.get("TRITON_INTERPRET") == "1" else 2.0**-8,
}

# Entropy in nats, absolute, up to K = 262,144.
ENTROPY = 2e-6  # reference 2.4e-7, native 4.5e-7, triton 5.7e-7
# Its gradient, absolute, beside the rounding of the output.
# Reference 2.9e-8, native 3.3e-7, triton 5.4e-7.
ENTROPY_GRAD = {FP32: 2e-6, FP16: 2e-6, BF16: 2e-6}
# Normals, relative to 1 + |z|.
NORMAL = 6e-7  # native 1.2e-7, triton 1.2e-7
# Normalised pixels, absolute, beside the rounding of the output.
GATHER = 6e-7  # reference 1.6e-7, native 9.6e-8, triton 1.6e-7
# GroupNorm and its gradient, times the largest value, beside the rounding of the output.
GROUP_NORM = 1e-6  # reference 2.5e-7, triton 3.4e-7
# The guided step, absolute, for inputs of unit size, beside the rounding of the output.
GUIDED = 3e-6  # reference 2.2e-6, native 6.3e-7, triton 2.0e-6
# With an anchor 8.2e-7; where gradient and label score nearly cancel (|d| below 0.1), more.
CANCELLED = 2e-5  # reference 9.1e-6, native 4.6e-6, triton 5.1e-6
# One solver step against diffusers, times the largest factor of the step.
SCHEDULER = (
    4e-5  # 1.7e-5, at the last steps of eta = 1, where diffusers takes sigma^2 - s^2 in fp32
)
