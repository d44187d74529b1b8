"""The loop on a GPU: the recipe's device, a resumed run, and one rank under NCCL."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from dpfast.config import Recipe
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.run_writer import RunWriter
from tests.practice import conftest
from tests.practice.small import REAL

recipe = conftest.recipe


def run(chosen, path, real=None):
    with RunWriter(path, chosen) as folder:
        results = DeliberatePractice(chosen, real=real).run(folder, progress=False)
    return results, [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_run_on_the_gpu_makes_the_samples_of_a_cpu(recipe, tmp_path):
    (dp, static), _ = run(dataclasses.replace(recipe, device="cuda"), tmp_path / "cuda", REAL)
    (_, other), _ = run(dataclasses.replace(recipe, device="cpu"), tmp_path / "cpu", REAL)
    assert next(dp.learner.parameters()).is_cuda
    assert len(dp.pool) == len(static.pool) == 70
    places = torch.arange(70)
    assert torch.equal(static.pool.column("sample_id"), other.pool.column("sample_id"))
    difference = static.pool.images(places).int() - other.pool.images(places).int()
    assert int(difference.abs().max()) <= 2
    assert bool(torch.isfinite(dp.pool.column("entropy")[30:]).all())


@pytest.mark.parametrize("loader", ["torch", "auto"])
def test_the_embedded_recipe_learns(loader, tmp_path):
    small = Recipe.load(
        "fashion", device="cuda", iterations=200, maximum_samples=1500, loader=loader, sources="dp"
    )
    (dp,), metrics = run(small, tmp_path / "run")
    assert dp.test.top1 > 0.5, [m for m in metrics if m["event"] == "result"]


def test_one_rank_joins_nccl(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "1",
        "-m",
        "dpfast",
        "run",
        "fashion",
    ]
    options = [
        "--device",
        "cuda",
        "--iterations",
        "60",
        "--sources",
        "dp",
        "--out",
        str(tmp_path / "run"),
    ]
    result = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "4"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
