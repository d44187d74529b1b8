from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpfast.ops import backend_of, dispatch, entropy

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    dispatch.INTERPRETED, reason="describes a process outside the interpreter"
)


@pytest.fixture(autouse=True)
def undecided(monkeypatch):
    monkeypatch.setattr(dispatch, "FORCED", "")
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()
    dispatch.native.cache_clear()


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "dpfast._native", None)
    dispatch.native.cache_clear()


def test_cuda_uses_triton():
    assert backend_of("entropy", "cuda") == "triton"
    assert backend_of("entropy", torch.device("cuda", 1)) == "triton"


@pytest.mark.skipif(dispatch.native() is None, reason="the extension was not built")
@pytest.mark.parametrize("operation", dispatch.OPERATIONS)
def test_cpu_uses_the_extension_where_it_has_a_kernel(operation):
    expected = "native" if "native" in dispatch.OPERATIONS[operation] else "reference"
    assert backend_of(operation, "cpu") == expected


def test_every_operation_is_listed():
    shared = {"audit", "check", "dispatch", "layout", "traffic", "triton_stub"}
    names = {path.stem for path in Path(dispatch.__file__).parent.iterdir()}
    assert names - shared - {"__init__", "__pycache__"} == set(dispatch.OPERATIONS)


def test_other_devices_use_the_reference():
    assert backend_of("noise", "meta") == "reference"


def test_missing_extension_warns_once(without_extension, recwarn):
    assert [backend_of("gather", "cpu") for _ in range(3)] == ["reference"] * 3
    entropy(torch.zeros(2, 3))
    messages = [str(warning.message) for warning in recwarn if warning.category is RuntimeWarning]
    assert len(messages) == 1
    assert "native CPU kernels are not available" in messages[0]


@pytest.mark.filterwarnings("ignore:dpfast's native")
@pytest.mark.parametrize(
    ("forced", "device", "message"),
    [
        (
            "triton",
            "cpu",
            "DPFAST_BACKEND=triton needs Triton and CUDA tensors or TRITON_INTERPRET=1, got cpu",
        ),
        (
            "native",
            "cuda",
            "DPFAST_BACKEND=native needs CPU tensors and the built extension, got cuda",
        ),
        ("native", "cpu", "needs CPU tensors and the built extension"),
    ],
)
def test_forced_backend_that_cannot_run(forced, device, message, monkeypatch, without_extension):
    monkeypatch.setattr(dispatch, "FORCED", forced)
    with pytest.raises(RuntimeError, match=message):
        backend_of("entropy", device)


def test_forced_reference(monkeypatch):
    monkeypatch.setattr(dispatch, "FORCED", "reference")
    assert backend_of("entropy", "cpu") == "reference"
    assert backend_of("entropy", "cuda") == "reference"


def test_unknown_names(monkeypatch):
    with pytest.raises(
        ValueError, match="operation must be one of entropy, guided_step, noise, gather"
    ):
        backend_of("softmax", "cpu")
    monkeypatch.setattr(dispatch, "FORCED", "cuda")
    with pytest.raises(
        ValueError, match="DPFAST_BACKEND must be one of triton, native, reference, got 'cuda'"
    ):
        backend_of("entropy", "cpu")


@pytest.mark.slow
@pytest.mark.skipif(not dispatch.has_triton(), reason="needs Triton")
def test_triton_kernels_pass_the_same_tests_in_the_interpreter():
    """Triton decides when a kernel is defined whether to interpret it, so these tests have a
    process of their own.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        "tests/ops",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
