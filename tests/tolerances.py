"""How far an operation may be from its fp64 reference; the comment beside a number is the worst measured error."""

from __future__ import annotations

import os

import torch

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Rounding of an output: half a unit in the last place, relative. Triton's interpreter truncates to bf16, a GPU rounds.
HALF_ULP = {FP32: 2.0**-24, FP16: 2.0**-11, BF16: 2.0**-7 if os.environ.get("TRITON_INTERPRET") == "1" else 2.0**-8}

# Entropy in nats, absolute, up to K = 128,256.
ENTROPY = 4e-6
# Its gradient, absolute, beside the rounding of the output.
ENTROPY_GRAD = {FP32: 2e-6, FP16: 2e-6, BF16: 2e-6}
# Normals, absolute and relative.
NORMAL = 6e-7
# Normalised pixels, absolute, beside the rounding of the output.
GATHER = 6e-7
# The guided step, absolute, for inputs of unit size, beside the rounding of the output.
GUIDED = 3e-6
