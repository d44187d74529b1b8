"""The order of attention kernels is a table, and every order ends with one that always runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dpfast.generate.models.attention import CUDNN, EFFICIENT, FLASH, MATH, attend, order


@pytest.mark.parametrize(
    ("head_size", "capability", "first"),
    [
        (40, (9, 0), CUDNN),
        (72, (9, 0), CUDNN),
        (128, (10, 0), CUDNN),
        (160, (9, 0), FLASH),
        (72, (8, 0), FLASH),
        (512, (9, 0), EFFICIENT),
        (40, (7, 5), EFFICIENT),
    ],
)
def test_the_first_kernel_of_published_head_sizes(head_size, capability, first) -> None:
    """40, 80 and 160: Stable Diffusion 1.5; 72: DiT-XL/2; 512: the autoencoder's."""
    kernels = order(head_size, capability)
    assert kernels[0] == first
    assert set(kernels) == {CUDNN, FLASH, EFFICIENT, MATH}
    assert kernels[-1] == MATH


def test_on_a_cpu_it_is_torchs_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
