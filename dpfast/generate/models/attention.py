"""The kernel behind torch's attention, chosen by the size of a head.

torch asks cuDNN, FlashAttention and the efficient kernels in an order of its own, which changed
between its versions. Here the order is a table. On Hopper and later, in 16 bits, cuDNN's forward
pass is 1.27 times as fast as FlashAttention 2's at heads of 64 and 1.65 times at 128 (Shah et al.,
"FlashAttention-3", 2024, figure 5: 408 against 321 and 609 against 368 TFLOP/s on an H100, not
measured here); it takes heads of up to 128, FlashAttention those of up to 256. Whatever cannot run
is passed over, so nothing is lost where a row is wrong.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
# capability from, head size up to -> the order; the first row that fits
ORDERS: tuple[tuple[tuple[int, int], int, tuple[SDPBackend, ...]], ...] = (
    ((9, 0), 128, (CUDNN, FLASH, EFFICIENT, MATH)),
    ((8, 0), 256, (FLASH, EFFICIENT, CUDNN, MATH)),
    ((0, 0), 1 << 30, (EFFICIENT, FLASH, CUDNN, MATH)),
)


def order(head_size: int, capability: tuple[int, int]) -> tuple[SDPBackend, ...]:
    """Returns the kernels for heads of a size in 16 bits on a GPU of a compute capability, best
    first.
    """
    fits = (row for row in ORDERS if capability >= row[0] and head_size <= row[1])
    return next(fits)[2]


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns softmax(q k^T / sqrt d) v of heads (B, H, T, d) and (B, H, S, d), (B, H, T, d) in
    their dtype.
    """
    if not q.is_cuda or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v)
    kernels = list(order(q.shape[-1], _capability(q.device)))
    with sdpa_kernel(kernels, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)
