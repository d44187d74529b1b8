"""Algorithm 1 end to end on a random pipeline: what is added, when, and that a run is a function of
its recipe.
"""

import dataclasses
import json
import shutil

import pytest
import torch

from dpfast.errors import InputError, RecipeError
from dpfast.learn.models import load_learner
from dpfast.practice import checkpoint
from dpfast.practice.branch import prepare_branch
from dpfast.practice.checkpointer import LoopCheckpointer
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.run_writer import RunWriter
from dpfast.practice.stopping import LossError
from dpfast.report.metrics import result_table
from tests.practice.small import REAL


def with_(recipe, section, **changes):
    return dataclasses.replace(
        recipe, **{section: dataclasses.replace(getattr(recipe, section), **changes)}
    )


def run(recipe, path):
    with RunWriter(path, recipe) as folder:
        results = DeliberatePractice(recipe, real=REAL).run(folder, progress=False)
    return results, [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_dp_adds_rounds_and_static_gets_the_same_budget(recipe, tmp_path):
    (dp, static), metrics = run(recipe, tmp_path / "run")
    additions = [m for m in metrics if m["event"] == "addition"]
    assert [m["samples"] for m in additions] == [
        45,
        60,
        70,
    ]  # the last round is cut at maximum_samples
    assert all(10 <= m["step"] < 80 for m in additions)  # neither in warm-up nor in cool-down
    assert (len(dp.pool), len(static.pool)) == (70, 70)
    assert (dp.iterations, static.iterations) == (100, 100)
    # static holds the samples that plain sampling gives for the same ids; the first ones are shared
    assert torch.equal(dp.pool.images(torch.arange(30)), static.pool.images(torch.arange(30)))
    assert not torch.equal(
        dp.pool.images(torch.arange(30, 70)), static.pool.images(torch.arange(30, 70))
    )
    assert dp.pool.column("label").tolist() == [i % 3 for i in range(70)]
    assert dp.pool.column("sample_id").tolist() == list(range(70))
    assert dp.pool.column("round").tolist() == [0] * 30 + [1] * 15 + [2] * 15 + [3] * 10
    assert dp.pool.column("omega").tolist() == pytest.approx([0.0] * 30 + [0.2] * 40)
    assert [m["source"] for m in metrics if m["event"] == "result"] == ["dp", "static"]


def test_the_same_recipe_twice_writes_the_same_metrics(recipe, tmp_path):
    run(recipe, tmp_path / "a")
    run(recipe, tmp_path / "b")
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == (
        tmp_path / "b" / "metrics.jsonl"
    ).read_text()
    run(dataclasses.replace(recipe, seed=1), tmp_path / "c")
    assert (tmp_path / "a" / "metrics.jsonl").read_text() != (
        tmp_path / "c" / "metrics.jsonl"
    ).read_text()


@pytest.mark.parametrize("guide_with", ["ema", "raw"])
def test_the_current_learner_guides(recipe, guide_with):
    """New samples of a later round have another learner behind them, and its entropy is
    recorded.
    """
    (dp,) = DeliberatePractice(
        with_(with_(recipe, "practice", sources=("dp",)), "guidance", guide_with=guide_with),
        real=REAL,
    ).run(progress=False)
    steps, entropy = dp.pool.column("learner_step"), dp.pool.column("entropy")
    assert len(set(steps[30:].tolist())) == 3
    assert bool(torch.isfinite(entropy[30:]).all())
    assert bool(torch.isnan(entropy[:30]).all())  # made before there was a learner


def test_static_alone_uses_the_maximum(recipe):
    (static,) = DeliberatePractice(with_(recipe, "practice", sources=("static",)), real=REAL).run(
        progress=False
    )
    assert len(static.pool) == 70
    assert static.additions == 0


def test_the_learner_of_a_run_can_be_loaded(recipe, tmp_path, pipeline):
    (dp, _), _ = run(recipe, tmp_path / "run")
    images = torch.randn(4, 1, 16, 16)
    torch.testing.assert_close(load_learner(tmp_path / "run", pipeline)(images), dp.learner(images))
    with pytest.raises(InputError, match="not the folder of a finished run"):
        load_learner(tmp_path, pipeline)


@pytest.mark.parametrize(
    ("section", "changes", "named"),
    [
        (
            "practice",
            {"initial_samples": 2},
            "initial_samples = 2: expected at least one for each of 3 classes",
        ),
        ("practice", {"round_samples": 2}, "round_samples = 2"),
        ("learner", {"classes": 10}, "classes = 10"),
        ("learner", {"model": "transformers:Nope"}, "Nope"),
        ("generator", {"pipeline": "/nowhere"}, "no such folder"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(recipe, section, changes, named):
    with pytest.raises(InputError, match=named):
        DeliberatePractice(with_(recipe, section, **changes), real=REAL)


class Killed(Exception):
    pass


@pytest.mark.parametrize("saves", [1, 7, 20, 21, 30])
@pytest.mark.parametrize("lost", [False, True], ids=["written", "half written"])
def test_a_killed_run_resumes_to_the_same_bits(recipe, tmp_path, monkeypatch, saves, lost):
    """20 evaluations a source: the kills fall into both sources' training, and right after the
    first one's end.

    The checkpoint of that moment may be on the disk or not: the thread that writes it dies with the
    run.
    """
    (dp, static), _ = run(recipe, tmp_path / "whole")
    begin, count = LoopCheckpointer._begin, 0

    def killing(self, moment):
        nonlocal count
        count += 1
        with monkeypatch.context() as patched:
            if lost and count == saves > 1:
                # the weights' file is there, the JSON is not
                patched.setattr(checkpoint, "durable", None)
                self.writer.clear()
            begin(self, moment)
            self.writer.wait()
        if count == saves:
            self.writer.collect()
            # a line that came after the checkpoint
            self.folder.log("evaluation", self.samples.source, 10**6)
            raise Killed

    monkeypatch.setattr(LoopCheckpointer, "_begin", killing)
    with pytest.raises(Killed):
        run(recipe, tmp_path / "killed")
    monkeypatch.setattr(LoopCheckpointer, "_begin", begin)
    with RunWriter(tmp_path / "killed", recipe, resume=True) as folder:
        resumed = DeliberatePractice(recipe, real=REAL).run(folder, progress=False)
    assert (tmp_path / "killed" / "metrics.jsonl").read_text() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_text()
    for before, after in zip((dp, static), resumed, strict=True):
        for name, tensor in before.learner.state_dict().items():
            assert torch.equal(tensor, after.learner.state_dict()[name]), name
        assert before.pool.records().tobytes() == after.pool.records().tobytes()
        everything = torch.arange(len(before.pool))
        assert torch.equal(before.pool.images(everything), after.pool.images(everything))


def test_a_run_resumes_with_its_own_recipe_only(recipe, tmp_path):
    run(recipe, tmp_path / "run")
    with pytest.raises(
        RecipeError, match=r"another recipe: omega = 0\.3 was 0\.2 \(it makes .*; seed = 5 was 0 \("
    ):
        RunWriter(
            tmp_path / "run",
            dataclasses.replace(with_(recipe, "guidance", omega=0.3), seed=5),
            resume=True,
        )
    with pytest.raises(InputError, match="holds no run"):
        RunWriter(tmp_path, recipe, resume=True)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(recipe, tmp_path):
    run(recipe, tmp_path / "run")
    whole = (tmp_path / "run" / "metrics.jsonl").read_text()
    newest = checkpoint.paths(tmp_path / "run" / "checkpoints_static")[-1]
    newest.with_suffix(".safetensors").write_bytes(b"torn")
    with (
        RunWriter(tmp_path / "run", recipe, resume=True) as folder,
        pytest.warns(UserWarning, match=newest.name),
    ):
        DeliberatePractice(recipe, real=REAL).run(folder, progress=False)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == whole
    for path in checkpoint.paths(tmp_path / "run" / "checkpoints_dp"):
        path.with_suffix(".safetensors").write_bytes(b"torn")
    with (
        RunWriter(tmp_path / "run", recipe, resume=True) as folder,
        pytest.warns(checkpoint.DamagedCheckpointWarning),
        pytest.raises(InputError, match="none of the 3 checkpoints"),
    ):
        DeliberatePractice(recipe, real=REAL).run(folder, progress=False)


def test_all_four_sources_share_moments_and_sizes_and_count_their_cost(recipe):
    recipe = with_(recipe, "practice", sources=("dp", "static", "prune", "dynamic"), oversample=2.0)
    dp, static, prune, dynamic = DeliberatePractice(recipe, real=REAL).run(progress=False)
    assert [len(r.pool) for r in (dp, static, prune, dynamic)] == [70] * 4
    steps = dp.pool.column("learner_step")
    assert torch.equal(prune.pool.column("learner_step"), steps)
    assert torch.equal(dynamic.pool.column("learner_step"), steps)
    assert [r.cost.samples for r in (dp, static, prune, dynamic)] == [70, 70, 30 + 2 * 40, 70]
    # 3 steps, each with CFG
    assert all(r.cost.forwards == 6 * r.cost.samples for r in (dp, static, prune, dynamic))
    assert dp.cost.flops > dynamic.cost.flops == static.cost.flops
    assert len(set(prune.pool.column("sample_id").tolist())) == 70
    assert float(prune.pool.column("omega").abs().sum()) == 0


def test_a_branch_goes_on_without_additions_and_refuses_another_generator(recipe, tmp_path):
    recipe = with_(recipe, "practice", sources=("dp",), keep_rounds=True)
    run(recipe, tmp_path / "run")
    prepare_branch(tmp_path / "run", 1, tmp_path / "branch", recipe)
    with RunWriter(tmp_path / "branch", recipe, resume=True) as folder:
        (branch,) = DeliberatePractice(recipe, real=REAL).run(folder, progress=False)
    assert (len(branch.pool), branch.additions, branch.iterations) == (45, 1, 100)
    with pytest.raises(RecipeError, match="steps = 4 was 3"):
        prepare_branch(tmp_path / "run", 1, tmp_path / "other", with_(recipe, "generator", steps=4))
    (kept,) = (tmp_path / "run" / "checkpoints_dp").glob("*-round-01.json")
    shutil.copy(kept, kept.with_name(f"{kept.stem} (copy).json"))
    with pytest.raises(InputError, match=r"branch_at = 7: .* there are those of 0, 1"):
        prepare_branch(tmp_path / "run", 7, tmp_path / "other", recipe)
    late = with_(recipe, "practice", iterations=20)
    with pytest.raises(
        InputError,
        match=r"iterations = 20: the branch begins at \d+, after the start of the cool-down",
    ):
        prepare_branch(tmp_path / "run", 1, tmp_path / "other", late)
    assert not (tmp_path / "other").exists()


class Failing(torch.nn.Sequential):
    """A learner whose logits are not finite at its training step 23."""

    trained = 0

    def forward(self, images):
        self.trained += self.training
        return super().forward(images) * (float("nan") if self.trained == 23 else 1.0)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(recipe, tmp_path):
    learner = Failing(torch.nn.Flatten(), torch.nn.Linear(256, 3))
    named = r"iteration 23, on the samples (\d+, ){7}\d+; .*checkpoint-0+\d+.json"
    practice = DeliberatePractice(recipe, real=REAL, learner=learner)
    with RunWriter(tmp_path / "run", recipe) as folder, pytest.raises(LossError, match=named):
        practice.run(folder, progress=False)


def test_further_evaluation_sets_end_in_the_table_and_in_the_metrics(recipe, tmp_path):
    small = with_(recipe, "practice", sources=("static",), iterations=10, maximum_samples=30)
    results, metrics = run(dataclasses.replace(small, evaluation=("blur",)), tmp_path / "run")
    lines = [m for m in metrics if m["event"] == "set"]
    assert [(m["name"], m["severity"], m["images"]) for m in lines] == [
        ("blur", s, 30) for s in range(1, 6)
    ]
    assert [m["top1"] for m in lines] == [row.result.top1 for row in results[0].sets]
    assert f"blur 5      30  {lines[-1]['top1']:.2%}" in result_table(results)


def test_an_unknown_evaluation_set_is_named_before_any_work(recipe):
    with pytest.raises(InputError, match="nowhere"):
        DeliberatePractice(dataclasses.replace(recipe, evaluation=("nowhere",)), real=REAL)
