"""A run of Stable Diffusion at tiny size whose memory runs out in every phase, from its start to
its report.
"""

import json

import pytest
import torch

from dpfast.config import Recipe
from dpfast.data.folders import BATCH
from dpfast.hardware.peaks import here
from dpfast.parallel import ALONE
from dpfast.pool.reader import open_pool
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.run_paths import RunPaths
from dpfast.practice.run_writer import RunWriter
from dpfast.report.page import write_report
from tests.memory_limit import MemoryLimit
from tests.practice.small import noise
from tests.ranks import spawned
from tests.tiny_pipelines import NAMES, stable_diffusion, tiny_vae

ENOUGH = 1 << 40  # bytes
IMAGES = 2 * BATCH  # real ones, a whole batch of an evaluation for each of two ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = stable_diffusion(tmp_path_factory.mktemp("generator"))
    tiny_vae().save_pretrained(folder / "tiny_decoder")
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """The run folder of one rank with memory enough."""
    path = tmp_path_factory.mktemp("run") / "whole"
    assert go(ALONE, folder, path, [ENOUGH]).failures == []
    return path


def recipe_of(folder):
    """Batches of 32 samples, 384 for the learner and 500 of an evaluation: about 2 MB each; guided
    ones take 9 MB.
    """
    return Recipe.from_dict(
        {
            "name": "tight",
            "generator": {
                "pipeline": str(folder),
                "class_names": list(NAMES),
                "steps": 3,
                "batch_size": 32,
            },
            "guidance": {"omega": 0.2, "every": 2},
            "learner": {"model": "tests.tiny_pipelines:learner", "batch_size": 384},
            "practice": {
                "initial_samples": 96,
                "round_samples": 32,
                "maximum_samples": 128,
                "iterations": 10,
                "evaluate_every": 2,
                "patience": 1,
                "patience_growth": "fixed",
                "sources": ["dp"],
                "yardstick_samples": 32,
            },
        }
    )


def go(ranks, folder, path, limits):
    """A run, in the memory that each rank has of ``limits``, bytes."""
    recipe = recipe_of(folder)
    here()  # measures this CPU once a process, with products of megabytes
    practice = DeliberatePractice(recipe, real=noise(2 * IMAGES), ranks=ranks)
    placed = RunWriter(path, recipe, ranks=ranks) if ranks.first else RunPaths(path, ranks)
    with MemoryLimit(limits[ranks.rank]) as memory:
        practice.run(placed, progress=False)
    if ranks.first:
        placed.close()
    return memory


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


PHASES = (
    "unguided.stream",
    "trainer.step",
    "measures.evaluate",
    "guided_methods.make",
    "yardstick.images",
)


def runs_out_of_memory_on_one_rank(ranks, folder, path):
    memory = go(ranks, folder, path, [ENOUGH, 900_000])
    failed = {phase: memory.failed_in(phase) for phase in PHASES}
    assert all((count > 0) == (ranks.rank == 1) for count in failed.values()), failed


def check(path, whole):
    """Samples, additions and, up to rounding, losses are those of the undisturbed run; and there is
    a report.
    """
    mine, theirs = (open_pool(run / "pool_dp") for run in (path, whole))
    assert len(mine) == 128
    for name in ("sample_id", "label", "round", "omega"):
        assert torch.equal(mine.column(name), theirs.column(name)), name
    images, expected = (pool.images(torch.arange(96)).int() for pool in (mine, theirs))
    assert int((images - expected).abs().max()) <= 1
    found, wanted = (lines_of(run / "metrics.jsonl") for run in (path, whole))
    assert [(line["event"], line["step"]) for line in found] == [
        (line["event"], line["step"]) for line in wanted
    ]
    for line, other in zip(found, wanted, strict=True):
        if line["event"] == "evaluation":
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert write_report([path], path).is_file()


def test_a_run_goes_on_where_memory_runs_out_in_every_phase(folder, undisturbed, tmp_path):
    memory = go(ALONE, folder, tmp_path / "run", [1_400_000])
    assert all(memory.failed_in(phase) for phase in PHASES), {
        phase: memory.failed_in(phase) for phase in PHASES
    }
    assert memory.failed_in("trainer.step") == 1
    assert memory.failed_in("measures.evaluate") == 1
    check(tmp_path / "run", undisturbed)


def test_ranks_go_on_together_where_one_of_them_runs_out_of_memory(folder, undisturbed, tmp_path):
    spawned(2, runs_out_of_memory_on_one_rank, folder, tmp_path / "run")
    check(tmp_path / "run", undisturbed)
