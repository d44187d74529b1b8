"""Every test of an operation runs on each backend of this process; allocations hold NaN until a
kernel writes them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest
import torch

from dpfast.ops import dispatch

INTERPRETED = dispatch.INTERPRETED
if INTERPRETED:
    BACKENDS = ["triton"]
else:
    BACKENDS = ["reference", "native"] if dispatch.native() is not None else ["reference"]
    BACKENDS += ["triton"] if torch.cuda.is_available() else []


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(dispatch, "FORCED", request.param)
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


def far_apart(width: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Two rows 2^31 elements apart, more than 32 bits count. On a CPU no page between them is ever
    touched.
    """
    elements = 2**31 + width
    if device == "cpu":
        memory = mmap.mmap(
            -1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        return torch.frombuffer(memory, dtype=dtype).as_strided((2, width), (2**31, 1))
    return torch.empty(elements, dtype=dtype, device=device).as_strided((2, width), (2**31, 1))


@pytest.fixture(autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """Deterministic mode fills new memory with NaN, so that an element which no kernel wrote fails
    its test.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
