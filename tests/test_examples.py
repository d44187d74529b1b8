"""The examples are short, and do what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch

import dpfast

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def example(name):
    """The module of an example."""
    (path,) = [path for path in EXAMPLES if path.stem == name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_under_60_lines(path):
    assert len(path.read_text().splitlines()) < 60


def test_samples_that_a_training_loop_of_one_s_own_appends_are_in_its_next_batch(capsys):
    shares = example("own_pool_loop").main()
    # each addition has 256 samples beside 256 more of every one before it, drawn twice as often
    for before, share in enumerate(shares, 1):
        assert share == pytest.approx(2 / (2 + before), abs=0.02)
    assert "1536 samples" in capsys.readouterr().out


def test_a_loader_of_one_s_own_hides_a_square_of_every_image_and_feeds_a_run():
    erasing = example("own_loader")
    pool = dpfast.SamplePool()
    pool.append_images(torch.full((8, 1, 16, 16), 255, dtype=torch.uint8), torch.arange(8))
    images, _ = next(dpfast.make_loader(erasing.ErasingLoader, pool, batch_size=4, seed=0))
    assert (images == 0).sum((1, 2, 3)).tolist() == [erasing.SIDE**2] * 4
    result = erasing.main()
    assert (len(result.pool), result.iterations) == (32, 10)
