"""What works without the packages of the extras, and what is said where one is missing."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from dpfast.errors import InputError
from dpfast.extras import EXTRAS, installed, require
from tests.test_imports import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# In a process of its own: what an environment has that nobody installed the extras into.
WITHOUT = """
import sys

HIDDEN = {"transformers", "accelerate", "matplotlib", "tensorboard", "pyarrow", "timm", "xformers"}


class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in HIDDEN:
            return self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        find = getattr(self.finder, "find_distributions", None)
        return () if find is None or context.name in HIDDEN else find(context)


sys.meta_path = [Without(finder) for finder in sys.meta_path]
"""
SAMPLE = """
import torch
from dpfast import GuidanceConfig, GuidedSampler, Pipeline, SamplePool, entropy

assert torch.allclose(entropy(torch.zeros(2, 8)), torch.full((2,), 8.0).log())
learner = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 10)).eval()
pipeline = Pipeline.from_pretrained("fashion", device="cpu")
sampler = GuidedSampler(pipeline, learner, guidance=GuidanceConfig(omega=0.05), steps=2)
pool = SamplePool("pixels", shape=(1, 32, 32))
pool.append(sampler.generate([3, 4]), round=0, omega=0.05, cfg_scale=1.0, steps=2, seed=0)
assert len(pool) == 2

import dpfast.adapters, dpfast.feed, dpfast.practice.experiment
"""
COMMAND = "from dpfast.cli.main import main; sys.exit(main(sys.argv[1:]))"


def without_extras(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT + code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_operations_sampler_and_pool_need_no_extra() -> None:
    ended = without_extras(SAMPLE)
    assert ended.returncode == 0, ended.stderr
    assert "accelerate" not in ended.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["run", "fashion", "--out", "OUT"],
        ["sample", "--labels", "1", "--out", "OUT"],
        ["report", "OUT"],
        ["rehearse", "imagenet1k-dit"],
    ],
    ids=lambda command: command[0],
)
def test_a_command_names_what_installs_its_packages_before_it_works(command, tmp_path) -> None:
    out = tmp_path / "out"
    ended = without_extras(COMMAND, *(str(out) if word == "OUT" else word for word in command))
    assert ended.returncode == 2
    assert re.fullmatch(
        r"dpfast: error: .* not installed; pip install 'dpfast\[run\]'\n", ended.stderr
    )
    assert not out.exists()


def test_every_package_is_in_the_extra_that_is_named() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {"nvidia.dali": "nvidia-dali-cuda130"}
    for package, extra in EXTRAS.items():
        listed = project["optional-dependencies"][extra]
        assert any(line.startswith(names.get(package, package)) for line in listed), package


def test_what_is_there_is_not_asked_for() -> None:
    require("matplotlib", "tensorboard")


@pytest.mark.skipif(installed("timm"), reason="timm is installed")
def test_every_missing_package_is_named_in_one_error() -> None:
    with pytest.raises(InputError, match=r"^timm is not installed; pip install 'dpfast\[timm\]'$"):
        require("matplotlib", "timm")
