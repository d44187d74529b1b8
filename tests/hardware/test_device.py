"""cuDNN searches its algorithms where shapes repeat, and not where determinism is asked for."""

from __future__ import annotations

import pytest
import torch

from dpfast.hardware.device import searched_convolutions

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "static", "expected"),
    [(CUDA, True, True), (CUDA, False, False), (CPU, True, False)],
    ids=["GPU", "shapes vary", "CPU"],
)
def test_algorithms_are_searched_on_a_gpu_where_shapes_repeat(device, static, expected) -> None:
    with searched_convolutions(device, static=static):
        assert torch.backends.cudnn.benchmark == expected
    assert not torch.backends.cudnn.benchmark


def test_no_algorithm_is_searched_where_determinism_is_asked_for() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with searched_convolutions(CUDA, static=True):
            assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
