"""Bad input under torchrun: one error from rank 0, every rank leaves with it, nothing is
written.
"""

import contextlib
import io
import os
import shutil
import time

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from dpfast.cli import main as command
from dpfast.parallel import torchrun
from tests.practice import launch
from tests.practice.launch import FIELDS, SIZES, Launched
from tests.ranks import environment, free_port

RECIPE = "imagenet100-sd15"
# name -> (options beside those that name the folders, what the error says)
CASES = {
    "batch": (
        ["--learner.batch-size", "6"],
        "batch_size = 6: expected a multiple of 4, twice the 2 ranks",
    ),
    "generation batch": (["--generator.batch-size", "200"], "are fewer batches than the 2 ranks"),
    "classes": (["--validation", "{root}/few"], "no images of"),
    "weights": (["--pipeline", "{root}/empty"], "{root}/empty"),
    "resume": (["--resume", "--omega", "0.2"], "has another recipe: omega = 0.2 was 0.05"),
    "resume nothing": (["--resume", "--out", "{root}/nothing"], "holds no run"),
    "versions": ([], "versions of dpfast and torch: rank 1 has"),
    "field": (["--omega", "much"], "omega = 'much': expected a finite number"),
}


def prepared(root):
    """The recipe's folders, two broken ones, and the folder of a run that has begun."""
    options = launch.folders(RECIPE, root)
    shutil.copytree(root / "validation", root / "few")
    shutil.rmtree(sorted((root / "few").iterdir())[3])
    shutil.copytree(root / "generator", root / "empty")
    (root / "empty" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return options


def arguments(options, extra, out):
    fields = [
        text
        for name, value in (FIELDS | SIZES[RECIPE]).items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    return ["run", RECIPE, "--quiet", "--out", str(out), *fields, *options, *extra]


def say(rank, ports, options, root):
    command.WORDS = 0.0
    if rank == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("RANK", raising=False)
            begun = launch_folder(options, root)
    for port, (name, (extra, words)) in zip(ports, CASES.items(), strict=True):
        os.environ |= environment(rank, 2, port)
        torchrun.__version__ = f"0.0.{rank}" if name == "versions" else "0"
        words, extra = words.format(root=root), [text.format(root=root) for text in extra]
        out = root / "begun" if name == "resume" else root / "out"
        with contextlib.redirect_stderr(io.StringIO()) as said:
            started = time.monotonic()
            assert command.main(arguments(options, extra, out)) == 2, name
            assert time.monotonic() - started < 300, name  # the ranks' timeout is 600
        errors = [
            line for line in said.getvalue().splitlines() if line.startswith("dpfast: error:")
        ]
        assert len(errors) == (rank == 0), (name, said.getvalue())
        assert rank or words in errors[0], (name, errors)
        if dist.is_initialized():
            dist.destroy_process_group()
        assert not (root / "out").exists(), name
    if rank == 0:
        assert sorted(path.name for path in (root / "begun").iterdir()) == begun


def launch_folder(options, root):
    """A run of the recipe that has just begun."""
    from dpfast.cli.recipes import recipe_of
    from dpfast.practice.run_writer import RunWriter

    parsed = command.new_parser().parse_args(arguments(options, [], root / "begun"))
    with RunWriter(root / "begun", recipe_of(parsed)):
        pass
    return sorted(path.name for path in (root / "begun").iterdir())


def test_bad_input_is_one_error_of_rank_0_and_every_rank_leaves(tmp_path):
    options = prepared(tmp_path)
    mp.spawn(say, ([free_port() for _ in CASES], options, tmp_path), nprocs=2)


@pytest.mark.slow
def test_torchrun_ends_with_the_words_of_rank_0(tmp_path):
    options, started = prepared(tmp_path), time.monotonic()
    said = Launched(
        RECIPE, tmp_path / "out", [*options, "--validation", str(tmp_path / "few")]
    ).ended(1)
    assert said.count("dpfast: error:") == 1
    assert "no images of" in said
    assert time.monotonic() - started < 300  # the ranks' timeout is 600
    assert not (tmp_path / "out").exists()
