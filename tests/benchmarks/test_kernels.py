"""What a first batch compiles, read without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import run
from benchmarks.systems import kernels
from dpfast.ops import dispatch, geglu, group_norm

NEEDS_TRITON = pytest.mark.skipif(
    dispatch.INTERPRETED or not dispatch.has_triton(), reason="needs Triton outside its interpreter"
)


@NEEDS_TRITON
@pytest.mark.parametrize(("name", "count"), [("stable-diffusion-1.5", 131), ("dit-xl-2", 27)])
def test_the_kernels_of_a_model_are_those_that_the_page_counts(name, count):
    assert f"{count} " in kernels.__doc__
    found = kernels.launches(name)
    assert len(found) == count
    names = {launch.kernel.__name__ for launch in found}
    assert {"apply_kernel", "gate_norm_modulate_kernel", "relu_backward_kernel"} <= names
    assert all(set(launch.options) <= {"num_warps"} for launch in found)


@NEEDS_TRITON
@pytest.mark.skipif(torch.cuda.is_available(), reason="plays a GPU that is not there")
def test_what_was_recorded_is_what_a_gpu_compiles(tmp_path, monkeypatch):
    """Triton's own compilation, for a GPU that is not there; a second one finds the first."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, Triton 3.9 warns
    absent = SimpleNamespace(
        get_current_device=lambda: 99,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    x = torch.empty(2, 64, 16, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    rows = torch.empty(2, 256, 128, device="meta", dtype=torch.bfloat16)
    with kernels.recorded() as found:
        group_norm(x, None, None, 8, silu=True).sum().backward()
        geglu(rows)
        geglu(torch.empty(2, 512, 128, device="meta", dtype=torch.bfloat16))
    assert len(found) == 8
    assert len({launch.compiled() for launch in found}) == 7  # another size of the same
    driver.set_active(absent)
    try:
        for launch in found:
            launch.compile()
    finally:
        driver.set_active(None)  # the next one that asks looks for a GPU again
    cubins = sorted(file.name for file in tmp_path.glob("*/*.cubin"))
    assert len(cubins) == 7
    assert "geglu_kernel.cubin" in cubins


def test_recording_leaves_the_operations_as_they_were():
    rows = torch.randn(2, 3, 20)
    with kernels.recorded():
        pass
    assert torch.equal(geglu(rows), geglu(rows.clone()))
    assert geglu(rows.to("meta")).shape == (2, 3, 10)


def test_it_needs_a_gpu_and_a_known_model(capsys):
    assert run.main(["kernels", "--models", "nosuch"]) == 2
    assert "models = 'nosuch': expected stable-diffusion-1.5 or dit-xl-2" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run.main(["kernels"]) == 2
        assert "the suite kernels needs a GPU" in capsys.readouterr().err
