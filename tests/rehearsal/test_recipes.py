"""The ImageNet recipes go from start to end on the GPUs that people have, at their true size."""

import os
from dataclasses import replace

import pytest

from dpfast.cli.main import main
from dpfast.config import Recipe
from dpfast.errors import InputError
from dpfast.generate import preflight
from dpfast.planning import measure
from dpfast.planning.memory import usable
from dpfast.planning.plan import plan
from dpfast.rehearsal import rehearse
from dpfast.rehearsal.dry_run import MOST, dry_run_seconds
from dpfast.rehearsal.timeline import timeline

RECIPES = ("imagenet100-sd15", "imagenet1k-sd15", "imagenet1k-dit")
PLACES = (("h100", 8), ("h100", 32), ("a100", 8), ("h200", 8), ("h100", 1), ("rtx4090", 1))
ALWAYS = {  # each recipe, each kind of place; the A100s walk as the H100s
    *((name, device, 8) for name in RECIPES for device in ("h100", "a100")),
    (RECIPES[0], "rtx4090", 1),
    (RECIPES[1], "h200", 8),
    (RECIPES[2], "h100", 32),
    (RECIPES[2], "h100", 1),
}


@pytest.mark.parametrize(("device", "count"), PLACES)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_or_adapts(name, device, count):
    if (name, device, count) not in ALWAYS and "DPFAST_REHEARSALS" not in os.environ:
        pytest.skip("DPFAST_REHEARSALS=1 walks every recipe everywhere, in some minutes more")
    # a second rank holds the order of the collectives: of one place is enough
    found = rehearse(
        Recipe.load(name),
        device,
        count=count,
        ranks=2 if (name, device, count) == (RECIPES[0], "h100", 8) else 1,
    )
    pool = found.plan.fit.pool
    wanted = [failure for failure in found.failures if not failure.startswith("pool")]
    assert not wanted
    assert found.margin > 0
    # all that does not fit is the pool of the largest recipes on one card, and there a size is
    # proposed that does
    assert pool.fits or (device == "rtx4090" and found.plan.fit.proposals)
    assert not any(wait.in_step for wait in found.walks[0].waits)
    assert max(phase.peak for phase in found.walks[0].phases.values()) < usable(found.plan.device)


def test_an_anchored_recipe_is_walked_where_its_cfg_begins_late():
    """As many steps as it takes to meet a guided one with CFG, without which an anchor is
    refused.
    """
    changes = {"anchor": 0.5, "cfg_interval": (0.6, 1.0), "every": 2}
    assert not rehearse(Recipe.load("fashion", **changes), "h100", ranks=1).failures


def test_a_late_anchor_is_walked_at_its_true_size_to_a_step_in_which_it_acts(caplog):
    preflight._warn_of_idle_anchor.cache_clear()  # another test may have heard it
    late = {"omega": 0.12, "anchor": 1.0, "anchor_schedule": "0.499:0,0.5:1"}
    found = rehearse(Recipe.load(RECIPES[2], **late), "h100", count=8, ranks=1)
    assert not found.failures
    # without such a step the walk would be that of the paper's guidance, and say so
    assert not [line for line in caplog.messages if "anchor has no effect" in line]


def test_a_disk_that_cannot_hold_the_samples():
    recipe = Recipe.load(RECIPES[1], save_samples="npy")
    found = rehearse(recipe, "h100", count=8, disk=1e12, ranks=1)
    assert [failure for failure in found.failures if failure.startswith("disk: the run writes 1.")]
    assert not rehearse(recipe, "h100", count=8, disk=2e12, ranks=1).failures


def test_a_dry_run_that_times_whole_batches(monkeypatch):
    planned = plan(Recipe.load(RECIPES[1]), "h100")
    assert dry_run_seconds(planned) < MOST

    def whole(self, name, prepared, counts, *, most, dtype, least=1):
        with prepared(most) as call:
            for _ in range(4 * (40 if name == "training" else 1)):
                call()

    monkeypatch.setattr(measure.StageClock, "time", whole)
    assert dry_run_seconds(planned) > MOST


def test_the_command_prints_what_it_found(capsys):
    assert main(["rehearse", "fashion", "--device", "h100", "--disk", "0.001"]) == 1
    told = capsys.readouterr().out
    for words in (
        "fashion on H100, rehearsed without data",
        "guided samples",
        "clock, by",
        "FAILS disk: the run writes",
    ):
        assert words in told
    assert "0 alive while the learner trains" in told


def test_prune_on_ranks_goes_from_start_to_end():
    """Two of eight ranks make the same collectives in the same order, and the clock is prune's."""
    found = rehearse(Recipe.load("fashion", sources=("prune",)), "h100", count=8, ranks=2)
    # so short a run waits for its checkpoints
    assert not [each for each in found.failures if not each.startswith("checkpoints: the loop")]
    assert not any(wait.in_step for wait in found.walks[0].waits)
    recipe = Recipe.load("fashion", sources=("prune",), add_at=(250, 333), oversample=8.0)
    made = plan(recipe, "h100")
    rounds = [
        timeline(
            replace(recipe, practice=replace(recipe.practice, sources=(source,))),
            made,
            saves=0.0,
            checkpoint_bytes=1,
            timeout=600.0,
        ).rounds
        for source in ("prune", "dynamic", "static")
    ]
    assert rounds[0][1] == pytest.approx(8 * rounds[1][1], rel=0.15)  # in whole batches
    assert rounds[0][0] == rounds[1][0]
    assert len(rounds[2]) == 1


def test_the_clock_of_a_rehearsal_adds_no_more_rounds_than_the_recipe_allows():
    def rounds(**fields):
        recipe = Recipe.load("fashion", sources="dp", **fields)
        made = plan(recipe, "h100")
        return len(timeline(recipe, made, saves=0.0, checkpoint_bytes=1, timeout=600.0).rounds)

    assert rounds() == 1 + 6  # 1,500 samples, and 750 a round up to 6,000
    assert rounds(maximum_rounds=2) == 1 + 2
    assert rounds(maximum_rounds=0) == 1
    assert rounds(maximum_rounds=9) == 1 + 6


def test_class_counts_that_do_not_fit_are_refused_by_a_rehearsal_too(tmp_path):
    file = tmp_path / "counts.txt"
    file.write_text("".join(f"{label} 700\n" for label in range(9)))
    with pytest.raises(InputError, match=r"no count of class 9 \('Ankle boot'\); expected one"):
        rehearse(Recipe.load("fashion", class_counts=str(file)), "h100")
    file.write_text(file.read_text() + "boots 700\n")
    with pytest.raises(InputError, match="'boots' is no class; expected a name, or an id"):
        rehearse(Recipe.load("fashion", class_counts=str(file)), "h100")
