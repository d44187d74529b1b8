"""What an installation has where no compiler works: all of the package but the extension, and the
reference.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from dpfast.ops import dispatch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    dispatch.INTERPRETED, reason="describes a process outside the interpreter"
)
EVERY_OPERATION = """
import sys

# An editable installation would lend its extension to any package of this name.
sys.meta_path = [
    f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")
]
import torch
import dpfast
from dpfast.ops import backend_of, entropy_and_grad, gather_batch, guided_step, normal

x, ids, table = torch.randn(2, 3), torch.arange(2), torch.rand(1, 6)
values, _ = entropy_and_grad(torch.zeros(2, 8))
guided_step(x, x, None, x, table, 0, cfg_scale=1.0, omega=0.1, sample_ids=ids)
normal(ids, (5,), seed=0, stream=0)
store = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
gather_batch(store, ids, mean=[0.0], std=[1.0], dtype=torch.float32, channels_last=False)
torch.testing.assert_close(values, torch.full((2,), 8.0).log())
print(dpfast.__file__, backend_of("entropy", "cpu"))
"""


def run(
    arguments: list[str], folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_without_a_compiler_the_package_builds_and_runs_the_reference(tmp_path):
    for module in ("pybind11", "setuptools"):
        pytest.importorskip(module, reason="builds the extension")
    library = tmp_path / "library"
    left_over = library / "dpfast" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    left_over.parent.mkdir(parents=True)
    left_over.touch()
    os.utime(left_over, (0, 0))  # an extension of older sources, which must not outlive this build
    moved = library / "dpfast" / "moved.py"  # nor must a module that is no more
    moved.touch()
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    folders = ["--build-lib", str(library), "--build-temp", str(tmp_path / "objects")]
    built = run(["setup.py", "build", *folders], ROOT, environment)
    assert built.returncode == 0, built.stderr
    assert built.stderr.count("dpfast: the native CPU kernels were not built (") == 1
    assert not left_over.exists()
    assert not moved.exists()

    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("DPFAST_BACKEND", "PYTHONPATH")
    }
    ran = run(["-c", EVERY_OPERATION], library, environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(library / "dpfast" / "__init__.py"), "reference"]
    assert ran.stderr.count("dpfast's native CPU kernels are not available") == 1
