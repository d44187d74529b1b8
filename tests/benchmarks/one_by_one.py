"""One variant at a time with pytest-benchmark: `pytest tests/benchmarks/one_by_one.py -k entropy`.

Each case asserts first that its variants agree. Cases that need a GPU are skipped without one.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness.registry import EAGER, OURS, cases

PAIRS = [
    *((case, variant) for case in cases("ops") for variant in (EAGER, OURS)),
    *((case, OURS) for suite in ("pool", "loader") for case in cases(suite)),
]


@pytest.mark.parametrize(
    ("case", "variant"), PAIRS, ids=[f"{case.name}, {variant}" for case, variant in PAIRS]
)
def test_case(benchmark, case, variant):
    if case.gpu_only and not torch.cuda.is_available():
        pytest.skip("a CPU runs plain PyTorch")
    benchmark.group = case.name
    benchmark(case.build(torch.device("cuda" if case.gpu_only else "cpu"))[variant])
