"""How a round is guided by its number and by its samples' classes."""

import dataclasses

import pytest
import torch

from dpfast.errors import InputError, RecipeError
from dpfast.generate.from_recipe import new_sampler
from dpfast.pool.pool import SamplePool
from dpfast.practice.changes import continued
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.run_writer import RunWriter
from dpfast.sources.deliberate_practice import DeliberatePracticeSource
from dpfast.sources.guided_methods import check_guided_method
from dpfast.sources.source import RoundRequest
from dpfast.sources.strengths import Strengths
from dpfast.sources.unguided import UnguidedSamples
from tests.practice.small import REAL
from tests.practice.test_loop import with_

FIRST = 30
CLASSES = ("cat", "dog", "red bicycle")


@pytest.fixture
def dp(recipe):
    """Five steps, guided in 0, 2 and 4; two rounds of 15 in batches of 6."""
    recipe = with_(recipe, "practice", iterations=40, maximum_samples=60, sources=("dp",))
    recipe = with_(recipe, "generator", steps=5, batch_size=6)
    return with_(recipe, "guidance", every=2, omega=0.2)


@pytest.fixture
def files(tmp_path):
    """omega of two classes, anchor of one."""
    (tmp_path / "omega").write_text("dog 0\nred bicycle 0.4\n")
    (tmp_path / "anchor").write_text("2 0.5\n")
    return {
        name: str(tmp_path / name.split("_")[0]) for name in ("omega_classes", "anchor_classes")
    }


def source(recipe, pipeline, learner):
    unguided = UnguidedSamples(recipe, pipeline)
    return DeliberatePracticeSource(
        recipe, pipeline, unguided, learner, guides=learner, pool=SamplePool
    )


def made(source, number, count=9):
    batches = list(source.make(RoundRequest(number=number, start=FIRST, count=count)))
    return {
        name: torch.cat([getattr(each, name) for each in batches])
        for name in ("images", "labels", "latents", "sample_ids")
    }


def test_a_class_has_its_strength_in_any_batch(dp, files, pipeline, learner):
    recipe = with_(dp, "guidance", **files)
    found = made(source(recipe, pipeline, learner), 1)
    omegas, anchors = torch.tensor([0.2, 0.0, 0.4]), torch.tensor([0.0, 0.0, 0.5])
    sampler = new_sampler(recipe, pipeline, learner)
    for row, label in enumerate(found["labels"].tolist()):
        one = sampler.generate(
            [label],
            found["sample_ids"][row : row + 1],
            omega=omegas[label : label + 1],
            anchor=anchors[label : label + 1],
        )
        torch.testing.assert_close(
            found["latents"][row : row + 1], one.latents, rtol=0.01, atol=0.01
        )
    halves = made(source(with_(recipe, "generator", batch_size=3), pipeline, learner), 1)
    torch.testing.assert_close(found["latents"], halves["latents"], rtol=0.01, atol=0.01)
    plain = made(source(dp, pipeline, learner), 1)
    same = (plain["latents"] == found["latents"]).flatten(1).all(1)
    assert same.tolist() == [label == 0 for label in found["labels"].tolist()]


def test_the_pool_tells_the_omega_of_each_sample(dp, files):
    recipe = with_(dp, "guidance", **files)
    recipe = with_(recipe, "practice", omega_rounds=(0.1, 0.0))
    (result,) = DeliberatePractice(recipe, real=REAL).run(progress=False)
    labels, omega = result.pool.column("label"), result.pool.column("omega")
    by_round = torch.tensor([[0.0] * 3, [0.1, 0.0, 0.4], [0.0, 0.0, 0.4]])
    assert torch.equal(
        omega.cpu(), by_round[result.pool.column("round").cpu().long(), labels.cpu()]
    )


def test_each_round_is_made_as_its_recipe_says(dp, pipeline, learner):
    rounds = {"every_rounds": (2, 1), "until_rounds": (1.0, 0.5), "anchor_rounds": (0.0, 0.7)}
    more = {"criterion_rounds": ("loss", "margin"), "through_rounds": ("denoiser", "latent")}
    scheduled = source(with_(dp, "practice", **rounds, **more), pipeline, learner)
    for number in (1, 2, 7):
        later = number > 1
        guidance = dataclasses.replace(
            dp.guidance,
            every=1 if later else 2,
            until=0.5 if later else 1.0,
            anchor=0.7 if later else 0.0,
            criterion="margin" if later else "loss",
            through="latent" if later else "denoiser",
        )
        alone = source(dataclasses.replace(dp, guidance=guidance), pipeline, learner)
        found, expected = made(scheduled, number), made(alone, 1)
        assert torch.equal(found["latents"], expected["latents"])
        assert scheduled.method(number).prices.at(1.5) == alone.method(1).prices.at(1.5)
    assert scheduled.method(2) is scheduled.method(7)


def test_rounds_of_strengths_alone_share_a_sampler(dp, pipeline, learner):
    rounds = {
        "omega_rounds": (0.1, 0.2),
        "anchor_rounds": (0.0, 0.7),
        "cfg_scale_rounds": (2.0, 3.0),
    }
    scheduled = source(with_(dp, "practice", **rounds), pipeline, learner)
    assert scheduled.method(1) is scheduled.method(2)


@pytest.mark.parametrize(
    ("omega", "anchor", "practice", "said"),
    [
        ("dog -0.1\n", "1 0.5\n", {}, r"class 1 \('dog'\) has anchor 0.5 with omega -0.1, which"),
        ("cow 0.1\n", "", {}, "omega_classes = .*'cow' is no class"),
        ("", "dog -1\n", {}, "anchor_classes = .*expected a number of at least 0"),
        (
            "dog 0\n",
            "",
            {"early_candidates": 2.0},
            "omega_classes = .*has 0; expected numbers above",
        ),
        ("", "dog 1\n", {"cfg_scale_rounds": (2.0, 1.0)}, "anchor = 1: needs the two predictions"),
    ],
)
def test_strengths_that_do_not_go_together_are_refused(
    omega, anchor, practice, said, dp, pipeline, tmp_path
):
    guidance = {}
    for name, text in (("omega", omega), ("anchor", anchor)):
        if text:
            (tmp_path / name).write_text(text)
            guidance[f"{name}_classes"] = str(tmp_path / name)
    recipe = with_(with_(dp, "guidance", **guidance), "practice", **practice)
    with pytest.raises((InputError, RecipeError), match=said) as raised:
        check_guided_method(recipe, pipeline)
    assert "\n" not in str(raised.value)


def test_a_round_without_a_guided_step_is_refused(dp, pipeline):
    recipe = with_(dp, "practice", start_rounds=(0.0, 0.9))
    with pytest.raises(InputError, match="none of the 5 steps begins there"):
        check_guided_method(recipe, pipeline)


def test_a_run_goes_on_with_the_strengths_of_its_birth(dp, files, tmp_path):
    recipe = with_(dp, "guidance", **files)
    with RunWriter(tmp_path / "run", recipe):
        pass
    moved = tmp_path / "moved"
    moved.write_bytes((tmp_path / "omega").read_bytes())
    assert continued(tmp_path / "run", with_(recipe, "guidance", omega_classes=str(moved)))
    moved.write_text("dog 0.1\n")
    with pytest.raises(RecipeError, match=r"omega_classes = .*: holds other things"):
        continued(tmp_path / "run", with_(recipe, "guidance", omega_classes=str(moved)))
    with pytest.raises(RecipeError, match="anchor_classes = '' was"):
        continued(tmp_path / "run", with_(recipe, "guidance", anchor_classes=""))
    with pytest.raises(RecipeError, match=r"omega_schedule = .* was"):
        continued(tmp_path / "run", with_(recipe, "guidance", omega_schedule=((0.0, 2.0),)))


def test_a_class_that_no_file_names_has_the_usual_strength(files, dp):
    found = Strengths.of(with_(dp, "guidance", **files).guidance, CLASSES)
    rows = found.rows(torch.tensor([2, 0, 1]))
    assert torch.equal(rows["omega"], torch.tensor([0.4, 0.2, 0.0]))
    assert torch.equal(rows["anchor"], torch.tensor([0.5, 0.0, 0.0]))
    assert Strengths.of(dp.guidance, CLASSES).rows(torch.tensor([2])) == {
        "omega": 0.2,
        "anchor": 0.0,
    }
