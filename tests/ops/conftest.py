"""Every test of an operation runs on each backend of this process; allocations hold NaN until a kernel writes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dpfast.ops import _dispatch

INTERPRETED = _dispatch.INTERPRETED
if INTERPRETED:
    BACKENDS = ["triton"]
else:
    BACKENDS = ["reference", "native"] if _dispatch.native() is not None else ["reference"]
    BACKENDS += ["triton"] if torch.cuda.is_available() else []


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_dispatch, "FORCED", request.param)
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


@pytest.fixture(autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """Deterministic mode fills new memory with NaN, so that an element which no kernel wrote fails its test."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
