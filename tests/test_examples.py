"""The examples are short, and do what they say."""

import importlib.util
import json
import re
import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import dpfast
from tests import tiny_pipelines

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
README = (FOLDER / "README.md").read_text(encoding="utf-8")
# file -> a line that it prints
ROWS = dict(re.findall(r"^\| \[\S+\]\((\S+)\) \|.*\| `([^`]+)` \|$", README, re.MULTILINE))


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


def test_the_table_has_a_row_for_each_example():
    assert sorted(ROWS) == [path.name for path in EXAMPLES]
    others = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.[is]*") if path.is_file()}
    assert others == {"deliberate_practice.ipynb", "slurm/dpfast.sbatch"}
    assert all(f"({name})" in README for name in others)


def words(text):
    """A text without its numbers."""
    return re.sub(r"\d+(\.\d+)?", "N", text)


@pytest.fixture
def prints(capsys):
    """Says whether an example has printed the line of its row in the table, whatever its numbers,
    and returns what it printed.
    """

    def of(name):
        printed = capsys.readouterr().out
        assert words(ROWS[f"{name}.py"]) in map(words, printed.splitlines())
        return printed

    return of


def test_guided_samples_of_a_grid_are_harder_than_unguided_ones(tmp_path, prints):
    (unguided, read), *guided = example("guided_grid").main(str(tmp_path / "grid.png"), 10)
    assert read == 1
    *free, anchored = (entropy for entropy, _ in guided)
    assert min(free) > 2 * unguided
    assert unguided < anchored < free[-1]  # of the same omega
    assert prints("guided_grid").count("nats") == 5
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width > 10 * 32
        assert picture.height > 5 * 32


def test_a_classifier_of_one_s_own_finds_guided_samples_harder(prints):
    found = example("own_classifier").main(steps=100, samples=20)
    assert found["real images"][1] > 0.7
    assert found["guided samples"][0] > 1.5 * found["unguided samples"][0]
    prints("own_classifier")


def test_a_diffusers_pipeline_is_guided_by_a_callback(stable_diffusion_folder, prints):
    unguided, guided = example("diffusers_pipeline").main(str(stable_diffusion_folder), steps=6)
    assert guided > unguided
    assert "0 steps were left unguided" in prints("diffusers_pipeline")


def test_a_folder_of_images_of_one_s_own_makes_a_generator_and_a_run(tmp_path, prints):
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    images = tmp_path / "images"
    block = block.replace('"clothes"', repr(str(images))).replace("2500", "100")
    exec(compile(block, "README.md", "exec"), {})
    sizes = {"initial_samples": 10, "round_samples": 5, "maximum_samples": 15, "iterations": 20}
    sizes |= {"steps": 2, "evaluate_every": 1, "yardstick_samples": 5}
    (images / ".DS_Store").touch()  # what a file manager leaves there is no class
    results = example("own_images").main(str(images), str(tmp_path / "out"), 3, **sizes)
    prints("own_images")
    assert [len(result.pool) for result in results] == [15, 15]
    assert results[0].pool.shape == (3, 16, 16)
    made = dpfast.Pipeline.from_pretrained(tmp_path / "out/model")
    assert made.class_names == ("Ankle boot", "Bag", "Coat", "Sneaker", "Trouser")
    assert (tmp_path / "out/run/metrics.jsonl").is_file()


def test_samples_that_a_training_loop_of_one_s_own_appends_are_in_its_next_batch(prints):
    shares = example("pool_and_loader").main()
    # each addition has 256 samples beside 256 more of every one before it, drawn twice as often
    for before, share in enumerate(shares, 1):
        assert share == pytest.approx(2 / (2 + before), abs=0.02)
    assert "1536 samples" in prints("pool_and_loader")


def test_a_loader_of_one_s_own_hides_a_square_of_every_image_and_feeds_a_run(prints):
    erasing = example("own_loader")
    pool = dpfast.SamplePool()
    pool.append_images(torch.full((8, 1, 16, 16), 255, dtype=torch.uint8), torch.arange(8))
    images, _ = next(dpfast.make_loader(erasing.ErasingLoader, pool, batch_size=4, seed=0))
    assert (images == 0).sum((1, 2, 3)).tolist() == [erasing.SIDE**2] * 4
    result = erasing.main()
    prints("own_loader")
    assert (len(result.pool), result.iterations) == (32, 10)


def test_the_loop_runs_on_a_pipeline_a_learner_and_images_of_one_s_own(tmp_path, prints):
    embed = example("embed_loop")
    dp, static = embed.main(str(tmp_path / "run"))
    prints("embed_loop")
    assert [len(result.pool) for result in (dp, static)] == [60, 60]
    assert [int(result.validation.per_class.isnan().sum()) for result in (dp, static)] == [0, 0]
    assert type(dp.learner).__name__ == type(static.learner).__name__ == "Learner"
    named = json.loads((tmp_path / "run" / "objects.json").read_text())
    assert named["pipeline"] == "dpfast.generate.pipelines.pipeline.Pipeline"
    assert named["learner"].endswith(".Learner")
    assert named["real"] == "builtins.tuple"
    written = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = embed.main(str(tmp_path / "run"), resume=True)
    assert [result.test.top1 for result in again] == [dp.test.top1, static.test.top1]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == written


def test_a_criterion_of_one_s_own_guides(prints):
    result = example("own_criterion").main()
    prints("own_criterion")
    assert bool(torch.isfinite(result.pool.column("entropy")[40:]).all())
    gini = example("own_criterion").gini
    torch.testing.assert_close(gini(torch.zeros(2, 4), torch.zeros(2)), torch.full((2,), 0.75))


def test_a_source_of_one_s_own_runs_beside_others(prints):
    static, mistaken = example("own_source").main()
    prints("own_source")
    assert (static.source, mistaken.source) == ("static", "mistaken")
    assert len(mistaken.pool) == 40 + 20 * mistaken.additions > 40
    assert mistaken.cost.samples == 40 + 2 * 20 * mistaken.additions
    assert len(mistaken.pool.column("sample_id").unique()) == len(mistaken.pool)


def test_a_callback_hears_every_evaluation(prints):
    points = example("callback").main()
    assert [step for step, _ in points] == [5, 10, 15, 20]
    assert "dp has 60 samples at step 10" in prints("callback")


def test_a_generator_that_is_no_pipeline_runs_the_loop(prints):
    dp, static = example("own_pipeline").main()
    prints("own_pipeline")
    assert len(dp.pool) == len(static.pool) == 60
    assert dp.additions == 1
    assert (dp.cost.forwards, dp.cost.flops) == (0, 0)
    assert dp.cost.seconds > 0


class Network(nn.Module):
    """Images (B, 3, 16, 16), noise levels (B,) and class ids to images, with weights at random."""

    def __init__(self):
        super().__init__()
        self.body, self.classes = nn.Conv2d(3, 3, 3, padding=1), nn.Embedding(3, 3)

    def forward(self, y, noise, labels):
        condition = self.classes(labels) * noise[:, None].cos()
        return self.body(y + condition[:, :, None, None]).tanh()


def test_a_network_of_one_s_own_is_sampled(prints):
    runpy.run_path(str(FOLDER / "own_denoiser.py"), run_name="__main__")
    prints("own_denoiser")


def test_a_network_of_one_s_own_is_sampled_and_guided_as_its_paper_says():
    """Karras et al.'s algorithm 1 with classifier-free guidance, and autograd through it."""
    own = example("own_denoiser")
    torch.manual_seed(0)
    network = Network().requires_grad_(False)
    pipeline = own.pipeline_of(network, ("cat", "dog"), 16)
    learner = tiny_pipelines.learner(2, 3).eval()
    labels, steps, scale = torch.tensor([0, 1, 1]), 12, 2.5

    def denoised(y, s, labels):
        size = (s * s + 0.25).sqrt()
        found = network(y / size, (s.log() / 4).expand(len(y)), labels)
        return y * 0.25 / size**2 + found * s * 0.5 / size

    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    grid = (80.0 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80.0 ** (1 / 7))) ** 7
    grid = [*grid.float(), torch.tensor(0.0)]
    sampler = dpfast.GuidedSampler(
        pipeline,
        learner,
        guidance=dpfast.GuidanceConfig(omega=0.05),
        steps=steps,
        cfg_scale=scale,
        compile=False,
    )
    state = sampler.begin(labels, [3, 5, 9], omega=0.0)
    y = state.x * (1 + grid[0] ** 2).sqrt()
    for s, following in pairwise(grid):
        empty = denoised(y, s, torch.full_like(labels, 2))
        x0 = empty + scale * (denoised(y, s, labels) - empty)
        y = y + (following - s) * (y - x0) / s
    torch.testing.assert_close(sampler.advance(state).x, y, rtol=0, atol=1e-4)

    s, x = grid[4], torch.randn(3, 3, 16, 16)
    alpha, sigma = (1 + s * s).rsqrt(), s * (1 + s * s).rsqrt()
    path, t = sampler.runner.parts.path, sampler.table.timesteps[4]
    gradient, _, _ = path.gradient(x, t, labels, alpha, sigma)
    leaf = x.clone().requires_grad_()
    log_p = learner(denoised(leaf / alpha, s, labels)).log_softmax(1)
    (truth,) = torch.autograd.grad(-(log_p.exp() * log_p).sum(), leaf)
    assert float((gradient - truth).norm() / truth.norm()) < 1e-4
