"""The ways of a round's guided samples beside the paper's: what they keep, what they cost, and that
they resume.
"""

import dataclasses

import pytest
import torch
from torch import nn

from dpfast.errors import InputError, RecipeError
from dpfast.evaluate.measures import predict
from dpfast.generate.from_recipe import new_sampler
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from dpfast.generate.step import Trajectory
from dpfast.parallel import Ranks
from dpfast.pool.pool import SamplePool
from dpfast.pool.sharded import ShardLayout, pool_of_ranks
from dpfast.practice.callbacks import Callback
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.run_writer import RunWriter
from dpfast.practice.stopping import Stop, Stopped
from dpfast.sources.costs import Cost
from dpfast.sources.guided_methods import EarlyRejection, GuidedRequest, RePractice, joined
from dpfast.sources.labels import allotted_labels
from dpfast.sources.strengths import Strengths
from tests.practice.small import REAL
from tests.practice.test_loop import run, with_
from tests.ranks import spawned

REJECTING = {"early_candidates": 2.5, "early_until": 0.5}
LABELS = torch.arange(9) % 3


@pytest.fixture
def short(recipe):
    """Five steps, guided in 0, 2 and 4; one source, two rounds of 15 in batches of 6."""
    recipe = with_(recipe, "practice", iterations=40, maximum_samples=60, sources=("dp",))
    recipe = with_(recipe, "generator", steps=5, batch_size=6)
    return with_(recipe, "guidance", every=2)


def wanted(labels=LABELS, **changes):
    return GuidedRequest(
        **{"labels": labels, "start": 30, "done": 0, "cfg_scale": 1.5}
        | {"strengths": Strengths(omega=0.2)}
        | {"learner_step": 0}
        | changes
    )


@pytest.fixture
def rejection(short, pipeline, learner):
    chosen = with_(short, "practice", **REJECTING)
    sampler = new_sampler(chosen, pipeline, learner)
    return EarlyRejection(chosen, sampler, sampler)


def test_a_trajectory_may_stop_thin_out_and_go_on(pipeline, learner, short):
    sampler = new_sampler(with_(short, "generator", solver="dpmpp2m"), pipeline, learner)
    whole = sampler.generate(LABELS, torch.arange(9))
    halves = [
        sampler.advance(sampler.begin(LABELS[p], torch.arange(9)[p]), 3)
        for p in (slice(4), slice(4, 9))
    ]
    rows = torch.tensor([1, 5, 8])
    some = sampler.finish(sampler.advance(Trajectory.joined(halves).take(rows)))
    assert some.sample_ids.tolist() == rows.tolist()
    torch.testing.assert_close(some.latents, whole.latents[rows], rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match=r"before step 3 of 5"):
        sampler.finish(halves[0])
    with pytest.raises(ValueError, match=r"stop = 2: expected 3 to 5"):
        sampler.advance(halves[0], 2)
    with pytest.raises(ValueError, match=r"step = 2: a trajectory begins there only from latents"):
        sampler.begin([0], [0], step=2)
    with pytest.raises(
        ValueError, match=r"latents has shape \(1, 4, 4, 4\), expected \(1, 4, 8, 8\)"
    ):
        sampler.begin([0], [0], latents=torch.zeros(1, 4, 4, 4), step=2)


def test_a_batch_from_latents_begins_with_the_noise_of_its_step(pipeline, learner, short):
    """With the noise that the sampler itself arrives at x0 by, the rest of the way is the same."""
    sampler = new_sampler(short, pipeline, learner)
    zero, two = (
        sampler.begin([1], [7], latents=v * torch.ones(1, 4, 8, 8), step=3).x for v in (0.0, 2.0)
    )
    alpha, sigma = sampler.table.rows[3, :2]
    torch.testing.assert_close(two - zero, 2 * alpha * torch.ones_like(zero))
    torch.testing.assert_close(
        zero, sigma * sampler.begin([1], [7]).x / sampler.table.initial_scale
    )


@pytest.mark.parametrize("way", [{}, REJECTING, {"restart": 0.4}], ids=["noise", "early", "late"])
def test_every_way_anchors_its_samples(way, short):
    """By the anchor, and in nothing else: labels, ids, forwards and FLOPs are as without."""
    short = with_(short, "practice", **way)
    plain, anchored, again = (
        DeliberatePractice(with_(short, "guidance", anchor=anchor), real=REAL).run(progress=False)[
            0
        ]
        for anchor in (0.0, 0.5, 0.5)
    )
    pools = [result.pool for result in (plain, anchored, again)]
    before, after, repeated = (pool.images(torch.arange(len(pool))) for pool in pools)
    assert torch.equal(after, repeated)
    assert torch.equal(before[:30], after[:30])
    assert all(not torch.equal(a, b) for a, b in zip(before[30:45], after[30:45], strict=True))
    assert plain.cost.flops == anchored.cost.flops
    assert plain.cost.forwards == anchored.cost.forwards


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"none of the guided steps lies in cfg_interval = \(0.7, 1.0\)"),
        ({"restart": 0.5}, "none of the guided steps lies in cfg_interval"),
    ],
)
def test_a_run_that_could_anchor_nothing_is_refused_before_it_begins(changes, message, short):
    cfg = {"cfg_interval": (0.0, 0.3) if changes else (0.7, 1.0)}
    anchored = with_(with_(short, "guidance", anchor=0.5, every=3), "generator", **cfg)
    with pytest.raises(InputError, match=message):
        DeliberatePractice(with_(anchored, "practice", **changes), real=REAL)


def test_early_rejection_keeps_the_highest_of_each_class(rejection):
    assert rejection.stop == 3
    cost = Cost()
    batches = list(rejection.make(wanted(), cost))
    assert [len(b) for b in batches] == [6, 3]
    ids = torch.cat([b.sample_ids for b in batches])
    assert torch.cat([b.labels for b in batches]).bincount().tolist() == [3, 3, 3]
    first = torch.arange(30, 45)  # 2.5 candidates for each of the first six
    candidates = LABELS[torch.arange(15) % 6]
    value = rejection.sampler.advance(
        rejection.sampler.begin(candidates, first, omega=0.2), 3
    ).value
    for label in range(3):
        mine = candidates == label
        best = first[mine][value[mine].argsort(descending=True)[:2]]
        assert sorted(best.tolist()) == ids[:6][batches[0].labels == label].tolist()
    # 22 of three steps each and nine of two more, both with CFG
    assert (cost.samples, cost.forwards) == (9, 22 * 6 + 9 * 4)
    everything = rejection.sampler.generate(candidates, first, omega=0.2)
    torch.testing.assert_close(
        batches[0].latents, everything.latents[batches[0].sample_ids - 30], rtol=2e-3, atol=2e-3
    )


def short_of_memory(monkeypatch, sampler, most):
    """Steps of more than ``most`` samples run out of memory."""
    advance = sampler.advance

    def limited(trajectory, stop=None):
        if len(trajectory) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return advance(trajectory, stop)

    monkeypatch.setattr(sampler, "advance", limited)


@pytest.mark.parametrize("way", ["rejection", "practice"])
def test_out_of_memory_halves_what_is_made_at_once_and_keeps_the_same_samples(
    way, short, pipeline, learner, rejection, monkeypatch
):
    if way == "practice":
        recipe = with_(short, "practice", restart=0.5)
        pool = SamplePool(shape=(1, 16, 16))
        sampler = new_sampler(recipe, pipeline, learner)
        pool.append(sampler.generate(torch.arange(30) % 3), round=0, omega=0.0)
        chosen = RePractice(recipe, sampler, new_sampler(recipe, pipeline, learner), lambda: pool)
    else:
        chosen = rejection
        chosen.eager = new_sampler(rejection.recipe, pipeline, learner)
    usual, tight = Cost(), Cost()
    whole = list(chosen.make(wanted(), usual))
    short_of_memory(monkeypatch, chosen.sampler, 2)
    parts = list(chosen.make(wanted(), tight))
    for name in ("images", "labels", "sample_ids"):
        joined = [
            torch.cat([getattr(batch, name) for batch in batches]).float()
            for batches in (whole, parts)
        ]
        torch.testing.assert_close(*joined, atol=2 if name == "images" else 0, rtol=0)
    assert (usual.retries, tight.retries) == (0, 2)  # six are too many, three as well
    assert {k: v for k, v in usual.state_dict().items() if k not in ("seconds", "retries")} == {
        k: v for k, v in tight.state_dict().items() if k not in ("seconds", "retries")
    }
    short_of_memory(monkeypatch, chosen.sampler, 0)
    with pytest.raises(torch.OutOfMemoryError):
        list(chosen.make(wanted(), Cost()))


def test_early_rejection_goes_on_in_the_middle_of_a_round(rejection):
    whole, rest = (
        list(rejection.make(wanted(), Cost())),
        list(rejection.make(wanted(done=6), Cost())),
    )
    assert torch.equal(whole[1].images, rest[0].images)
    assert torch.equal(whole[1].sample_ids, rest[0].sample_ids)


@pytest.mark.parametrize("codec", ["pixels", "latents"])
def test_re_practice_begins_at_samples_of_the_pool(short, codec):
    """From the last step on nearly nothing is left to change: the new samples look like their
    parents.
    """
    recipe = with_(with_(short, "practice", restart=0.8), "pool", codec=codec)
    recipe = with_(recipe, "guidance", omega=1e-6)
    (dp,) = DeliberatePractice(recipe, real=REAL).run(progress=False)
    assert dp.pool.column("steps").tolist() == [5] * 30 + [1] * 30
    assert dp.cost.forwards == 30 * 10 + 30 * 2
    assert dp.pool.column("label").tolist() == [i % 3 for i in range(60)]
    if codec == "pixels":  # the random autoencoder does not bring them back
        return
    old, new = (
        dp.pool.payload(torch.arange(*ends)).flatten(1).float() for ends in ((0, 30), (30, 45))
    )
    labels = dp.pool.column("label")
    gap = torch.cdist(new, old).masked_fill(labels[30:45, None] != labels[None, :30], torch.inf)
    assert len(set(gap.argmin(1).tolist())) == 15  # each has a parent of its own
    assert float(gap.min(1).values.mean()) < 0.1 * float(
        torch.cdist(old, old)[~torch.eye(30, dtype=torch.bool)].mean()
    )


def practised(ranks, recipe, count, codec, done=0):
    """This rank's samples of a round of ``count``, from a pool of rounds of 20 and 10 in batches of
    6.
    """
    pipeline = Pipeline.from_pretrained(recipe.generator.pipeline)
    torch.manual_seed(1)
    learner = nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).eval()
    sampler = new_sampler(recipe, pipeline, learner)
    made = sampler.generate(torch.arange(30) % 3)
    layout = ShardLayout(ranks, 6, (20, 10))
    local = SamplePool(codec, shape=(1, 16, 16) if codec == "pixels" else None)
    for rows in layout.rows():
        local.append(made.take(slice(rows.start, rows.stop)), round=0, omega=0.0)
    pool = pool_of_ranks(local, layout)
    chosen = RePractice(recipe, sampler, sampler, lambda: pool)
    request = wanted(torch.arange(count) % 3, turn=pool.turn, ranks=ranks, done=done)
    return list(chosen.make(request, Cost()))


def same_on_ranks(ranks, recipe, count, codec):
    expected = joined(practised(Ranks(), recipe, count, codec))
    assert expected.sample_ids.tolist() == list(range(30, 30 + count))
    turn = ShardLayout(ranks, 6, (20, 10)).turn
    mine = ranks.indices(count, 6, turn=turn)
    done = min(ranks.rank, len(mine))  # a round that goes on: each has another part of it
    for found, rows in (
        (practised(ranks, recipe, count, codec), mine),
        (practised(ranks, recipe, count, codec, done), mine[done:]),
    ):
        assert (
            len(found) == 0
            if not len(rows)
            else torch.equal(joined(found).sample_ids, expected.sample_ids[rows])
        )
        if len(rows):
            gap = joined(found).images.int() - expected.images[rows].int()
            assert int(gap.abs().max()) <= 1  # other batches, other last bits


@pytest.mark.parametrize(("size", "count", "codec"), [(2, 15, "pixels"), (3, 9, "jpeg")])
def test_re_practice_begins_at_the_same_samples_on_any_number_of_ranks(short, size, count, codec):
    recipe = with_(with_(short, "practice", restart=0.5), "pool", codec=codec)
    spawned(size, same_on_ranks, recipe, count, codec)


def test_re_practice_needs_ranks_that_hold_samples(short):
    recipe = with_(with_(short, "practice", restart=0.5), "learner", batch_size=8)
    recipe.check_ranks(2)
    recipe = with_(recipe, "practice", overlap=1)
    with pytest.raises(RecipeError, match=r"restart = 0.5: expected 0 with overlap"):
        recipe.check_ranks(3)


@torch.no_grad()
def test_an_encoded_image_is_the_latents_that_it_was_decoded_from(fashion):
    made = GuidedSampler(fashion, steps=8, compile=False).generate(torch.arange(10))
    back = fashion.decoder.encode(made.images.float().div(127.5).sub(1))
    error = (back - made.latents.float()).square().mean().sqrt() / made.latents.float().std()
    assert float(error) < 0.2, float(error)


class Stopping(Callback):
    """Asks for a stop in the middle of round 1."""

    def __init__(self, stop):
        self.stop = stop

    def on_samples(self, progress, batch):
        if progress.round == 0 and progress.pool_size == 36:
            self.stop.requested = True


@pytest.mark.parametrize(
    "changes", [REJECTING, {"restart": 0.5}, {"allot": "difficulty"}, {}], ids=str
)
def test_every_option_resumes_in_the_middle_of_a_round_to_the_same_bits(short, tmp_path, changes):
    recipe = with_(short, "practice", **changes)
    if not changes:
        recipe = with_(recipe, "guidance", criterion="disagreement")
    (whole,), _ = run(recipe, tmp_path / "whole")
    stop = Stop()
    with RunWriter(tmp_path / "run", recipe) as folder, pytest.raises(Stopped):
        DeliberatePractice(recipe, real=REAL).run(
            folder, progress=False, callbacks=[Stopping(stop)], stop=stop
        )
    with RunWriter(tmp_path / "run", recipe, resume=True) as folder:
        (resumed,) = DeliberatePractice(recipe, real=REAL).run(folder, progress=False)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_text()
    assert whole.pool.records().tobytes() == resumed.pool.records().tobytes()
    assert torch.equal(whole.pool.images(torch.arange(60)), resumed.pool.images(torch.arange(60)))
    assert {k: v for k, v in whole.cost.state_dict().items() if k != "seconds"} == {
        k: v for k, v in resumed.cost.state_dict().items() if k != "seconds"
    }
    assert all(
        torch.equal(value, resumed.learner.state_dict()[key])
        for key, value in whole.learner.state_dict().items()
    )


def test_disagreement_guides_where_both_weights_differ(short):
    """One more learner in guided steps, no more of the denoiser; entropy stays that of the guiding
    weights.
    """
    usual, apart = (with_(short, "guidance", criterion=c) for c in ("entropy", "disagreement"))
    (one,), (both,) = (DeliberatePractice(r, real=REAL).run(progress=False) for r in (usual, apart))
    assert one.cost.forwards == both.cost.forwards
    assert one.cost.flops < both.cost.flops < 1.2 * one.cost.flops
    new = torch.arange(30, 45)
    assert not torch.equal(one.pool.images(new), both.pool.images(new))
    assert bool(torch.isfinite(both.pool.column("entropy")[30:]).all())
    assert both.learner.training is False
    assert predict(both.learner, both.pool.images(new)).shape == (15, 3)


def test_labels_follow_the_validation_error():
    labels = allotted_labels(torch.tensor([1.0, 0.9, 0.7]), 0, 400)
    assert labels.bincount().tolist() == [
        67,
        67 + 50,
        66 + 150,
    ]  # half evenly, half as 0 to 0.1 to 0.3
    for part in labels.split(100):  # any part of the round has about these shares
        assert (part.bincount() - torch.tensor([17, 29, 54])).abs().max() <= 2
    assert allotted_labels(torch.ones(3), 0, 9).bincount().tolist() == [3, 3, 3]


def test_a_round_by_difficulty_asks_for_the_hard_classes(short):
    recipe = with_(short, "practice", allot="difficulty")
    (dp,) = DeliberatePractice(recipe, real=REAL).run(progress=False)
    (even,) = DeliberatePractice(short, real=REAL).run(progress=False)
    labels, rounds = dp.pool.column("label"), dp.pool.column("round")
    assert labels[rounds == 0].bincount().tolist() == [10, 10, 10]
    assert labels[rounds > 0].bincount().tolist() != [10, 10, 10]
    assert even.pool.column("label").bincount().tolist() == [20, 20, 20]


@pytest.mark.parametrize(
    ("section", "changes", "named"),
    [
        (
            "practice",
            {"early_candidates": 0.5},
            "early_candidates = 0.5: expected a number of at least 1",
        ),
        (
            "practice",
            {"early_until": 1.0},
            "early_until = 1.0: expected a number above 0 and below 1",
        ),
        (
            "practice",
            {"restart": 0.5, "early_candidates": 2.0},
            r"restart = 0.5: expected 0 with early_candidates = 2",
        ),
        (
            "practice",
            {"early_candidates": 2.0, "omega_rounds": (0.1, 0.0)},
            "early_candidates = 2.0: expected 1 unless omega",
        ),
        (
            "learner",
            {"ema_decay": 0.0},
            "criterion = 'disagreement': expected another with ema_decay = 0",
        ),
    ],
)
def test_contradictory_values_are_refused(short, section, changes, named):
    short = with_(short, "guidance", criterion="disagreement") if section == "learner" else short
    with pytest.raises(RecipeError, match=named):
        with_(short, section, **changes)


@pytest.mark.parametrize(
    ("practice", "guidance", "named"),
    [
        (
            {"early_candidates": 2.0},
            {"start": 0.6},
            "early_until = 0.4: expected a guided step before",
        ),
        (
            {"early_candidates": 2.0},
            {"omega_schedule": ((0.0, 0.0),)},
            "early_until = 0.4: expected a guided step .* guided are none$",
        ),
        ({"restart": 0.9}, {}, "restart = 0.9: expected a guided step at or after step 5 of 5"),
        (
            {"restart": 0.5},
            {"until": 0.4},
            "restart = 0.5: expected a guided step .* guided are 0",
        ),
    ],
)
def test_steps_that_leave_nothing_to_do_are_refused_before_any_work(
    short, practice, guidance, named
):
    with pytest.raises(RecipeError, match=named):
        DeliberatePractice(
            with_(with_(short, "practice", **practice), "guidance", **guidance), real=REAL
        )


def test_re_practice_needs_an_encoder_or_latents(short, pipeline, learner):
    recipe = with_(short, "practice", restart=0.5)
    blind = dataclasses.replace(pipeline, decoder=lambda latents: pipeline.decoder(latents))
    sampler = new_sampler(recipe, blind, learner)
    with pytest.raises(RecipeError, match="codec = 'latents'"):
        RePractice(recipe, sampler, sampler, lambda: None)
    RePractice(with_(recipe, "pool", codec="latents"), sampler, sampler, lambda: None)
