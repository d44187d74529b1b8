"""Rounds after known steps: exactly there, whatever the accuracies, and once each."""

import pytest
import torch

from dpfast.config import Recipe
from dpfast.errors import InputError, RecipeError
from dpfast.planning.plan import plan
from dpfast.planning.simulation import job_of
from dpfast.practice.branch import prepare_branch
from dpfast.practice.callbacks import Callback
from dpfast.practice.disk import samples_to_come
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.loop_state import LoopState
from dpfast.practice.patience import next_chance
from dpfast.practice.run_writer import RunWriter
from dpfast.practice.stopping import Stop, Stopped
from dpfast.rehearsal.timeline import timeline
from dpfast.sources.source import Source
from tests.practice.small import REAL
from tests.practice.test_changes import At, resumed
from tests.practice.test_loop import run, with_

MOMENTS = (7, 35, 79)  # in the warm-up, at an evaluation, and right before the cool-down


@pytest.fixture
def timed(recipe):
    return with_(recipe, "practice", sources=("dp",), add_at=MOMENTS)


def steps(metrics, event):
    return [line["step"] for line in metrics if line["event"] == event]


def test_rounds_are_added_after_exactly_these_steps(timed, tmp_path):
    (dp,), metrics = run(timed, tmp_path / "run")
    assert steps(metrics, "addition") == list(MOMENTS)
    assert dp.pool.column("learner_step").unique().tolist() == [0, *MOMENTS]
    # an evaluation comes before each, beside those of every interval
    assert steps(metrics, "evaluation") == sorted({*range(5, 101, 5), *MOMENTS})
    assert (len(dp.pool), dp.additions) == (70, 3)


def test_fewer_steps_than_the_most_rounds_make_fewer_samples(timed):
    once = with_(timed, "practice", add_at=(50,), sources=("dp", "static", "prune", "dynamic"))
    results = DeliberatePractice(once, real=REAL).run(progress=False)
    assert [len(result.pool) for result in results] == [45] * 4
    assert [result.additions for result in results] == [1, 0, 1, 1]


@pytest.mark.parametrize("name", ["prune", "dynamic"])
def test_a_source_alone_adds_after_them_too(timed, tmp_path, name):
    (alone,), metrics = run(with_(timed, "practice", sources=(name,)), tmp_path / "run")
    assert steps(metrics, "addition") == list(MOMENTS)
    assert len(alone.pool) == 70


def test_the_mean_loss_is_over_the_steps_since_the_evaluation_before(timed):
    told = {}

    class Hears(Callback):
        def on_evaluation(self, progress, evaluation, loss):
            told[progress.step] = loss

    DeliberatePractice(timed, real=REAL).run(progress=False, callbacks=[Hears()])
    assert all(0.5 < loss < 2 for loss in told.values()), told  # ln 3 is 1.1; not 2 / 5 of it


def test_who_watches_is_told_the_step_of_the_next_round(timed):
    told = {}

    class Hears(Callback):
        def on_step(self, progress):
            told[progress.step] = progress.next_round
            assert progress.patience is None

    DeliberatePractice(timed, real=REAL).run(progress=False, callbacks=[Hears()])
    assert [told[step] for step in (1, 7, 8, 35, 36, 79, 80)] == [7, 7, 35, 35, 79, 79, None]


@pytest.mark.parametrize("step", [6, 7, 8, 78, 79, 80])
def test_a_run_that_stops_beside_an_addition_goes_on_to_the_same_bits(timed, tmp_path, step):
    (whole,), _ = run(timed, tmp_path / "whole")
    stop = Stop()
    with RunWriter(tmp_path / "run", timed) as folder, pytest.raises(Stopped):
        DeliberatePractice(timed, real=REAL).run(
            folder, progress=False, callbacks=[At(stop, step)], stop=stop
        )
    (again,) = resumed(timed, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_text()
    for name, value in whole.learner.state_dict().items():
        assert torch.equal(value, again.learner.state_dict()[name]), name
    assert whole.pool.records().tobytes() == again.pool.records().tobytes()


@pytest.mark.parametrize("killed", [0, 1, 2, 3])
def test_a_run_killed_within_an_addition_goes_on_to_the_same_bits(timed, tmp_path, killed):
    (whole,), _ = run(timed, tmp_path / "whole")

    class Dies(Callback):
        def on_samples(self, progress, batch):
            if progress.round == killed - 1:
                raise KeyboardInterrupt

    with RunWriter(tmp_path / "run", timed) as folder, pytest.raises(KeyboardInterrupt):
        DeliberatePractice(timed, real=REAL).run(folder, progress=False, callbacks=[Dies()])
    (again,) = resumed(timed, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_text()
    assert whole.pool.records().tobytes() == again.pool.records().tobytes()


def test_a_run_that_is_made_longer_has_added_at_its_steps(timed, tmp_path):
    """The last one, 79, lies between the checkpoint from which it goes on and the cool-down."""
    long = with_(timed, "practice", iterations=200)
    run(timed, tmp_path / "run")
    (again,) = resumed(long, tmp_path / "run")
    (whole,), _ = run(with_(long, "learner", warmup=0.05), tmp_path / "whole")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_text()
    assert whole.pool.records().tobytes() == again.pool.records().tobytes()


def test_the_steps_of_a_run_stay_and_those_of_a_branch_may_go(timed, tmp_path):
    timed = with_(timed, "practice", keep_rounds=True)
    run(timed, tmp_path / "run")
    later = with_(timed, "practice", add_at=(7, 35, 78))
    with pytest.raises(RecipeError, match=r"add_at = \[7, 35, 78\] was \[7, 35, 79\] \(it decides"):
        RunWriter(tmp_path / "run", later, resume=True)
    shorter = with_(timed, "practice", iterations=60, add_at=(7, 35))
    prepare_branch(tmp_path / "run", 1, tmp_path / "branch", shorter)
    (branch,) = resumed(shorter, tmp_path / "branch")
    assert (len(branch.pool), branch.additions, branch.iterations) == (45, 1, 60)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"patience": 3}, r"patience = 3: expected 1, the recipe's, as no patience"),
        ({"patience": "3"}, r"patience = 3: expected 1, the recipe's, as no patience"),
        ({"practice.patience": 3}, r"patience = 3: expected 1"),
        ({"practice": {"patience": 3}}, r"patience = 3: expected 1"),
        ({"patience_growth": "pool"}, r"patience_growth = 'pool': expected 'fixed', the recipe's"),
    ],
)
def test_a_patience_beside_steps_is_refused(said, named, tmp_path):
    with pytest.raises(RecipeError, match=named):
        Recipe.load("fashion", add_at=(250,), **said)
    Recipe.load("fashion", **said)
    written = tmp_path / "timed.toml"
    written.write_text("[practice]\npatience = 1\npatience_growth = 'fixed'\nadd_at = [250]\n")
    with pytest.raises(RecipeError, match=named):
        Recipe.load(written, **said)
    assert not Recipe.load(written, add_at=(), **said).practice.add_at


def test_the_recipes_own_patience_is_no_choice_beside_steps():
    same = Recipe.load("fashion", add_at=(250,), patience="1", patience_growth="fixed")
    assert same == Recipe.load("fashion", add_at=(250,))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"add_at": (35, 7)}, r"add_at = '35,7': expected rising steps, each once"),
        ({"add_at": (7, 7)}, r"add_at = '7,7': expected rising steps, each once"),
        ({"add_at": (0, 7)}, r"add_at = \(0, 7\): expected a list of whole numbers of at least 1"),
        ({"add_at": (7.5,)}, r"add_at = \(7.5,\): expected a list of whole numbers"),
        ({"add_at": "7,x"}, r"add_at = '7,x': expected a list of whole numbers"),
        ({"add_at": (7, 8, 9, 10)}, r"add_at = '7,8,9,10': expected at most 3 steps, .* \(70\)"),
        ({"add_at": (7, 35), "maximum_rounds": 1}, r"add_at = '7,35': expected at most 1 steps"),
        (
            {"add_at": (7, 80)},
            r"add_at = '7,80': expected steps before the cool-down, the last",
        ),
        ({"add_at": (7, 101)}, r"add_at = '7,101': expected steps before the cool-down"),
        ({"add_at": (10**30,)}, r"add_at = '10*': expected steps before the cool-down"),
    ],
)
def test_steps_that_cannot_be_are_refused(recipe, changes, named):
    with pytest.raises(RecipeError, match=named):
        with_(recipe, "practice", **changes)


def test_the_paper_s_step_is_a_recipe_s_and_a_command_line_s(tmp_path):
    """Figure 5 adds once, after step 17,000, where no evaluation of the recipe is."""
    said = {"maximum_samples": 260_000, "round_samples": 130_000}
    recipe = Recipe.load("imagenet100-sd15", add_at="17000", **said)
    assert recipe.practice.add_at == (17_000,)
    interval = recipe.practice.interval(recipe.learner.batch_size)
    assert 17_000 % interval
    assert 17_000 in recipe.practice.evaluations(recipe.learner.batch_size)
    job = job_of(recipe, recipe.practice.most_samples)
    assert job.rounds == (130_000,)
    assert job.segments == (17_000, recipe.practice.iterations - 17_000)


def test_a_plan_knows_the_rounds(timed):
    assert timed.practice.most_samples == 70
    job = job_of(timed, 70)
    assert (job.initial, job.rounds) == (30, (15, 15, 10))
    assert job.segments == (7, 28, 44, 21)
    assert job_of(timed, 45).segments == (7, 93)
    with pytest.raises(InputError, match=r"samples = 100: expected at most 70, to which the steps"):
        job_of(timed, 100)


@pytest.mark.parametrize("rounds", [{"add_at": MOMENTS}, {"maximum_rounds": 1}, {}])
def test_a_plan_of_static_alone_has_no_round(recipe, rounds):
    """Whatever the other sources would be told: it makes its samples before the first step."""
    alone = with_(recipe, "practice", sources=("static",), keep_rounds=True, **rounds)
    job = job_of(alone, alone.practice.most_samples)
    assert (job.initial, job.rounds, job.segments) == (70, (), (100,))
    made = plan(alone, "h100")
    assert made.turns.generation == 80 * made.unit.unguided  # in batches of 20
    line = timeline(alone, made, saves=0.0, checkpoint_bytes=1, timeout=600.0)
    assert len(line.rounds) == 1
    # two, the one before the cool-down and the one that is being written; none of a round
    assert made.disk.kept == alone.practice.checkpoints_kept + 2


def test_a_plan_and_a_timeline_have_these_rounds_and_evaluations():
    recipe = Recipe.load("fashion", add_at=(250, 333), sources=("dp",))
    made = plan(recipe, "h100")
    units = {phase.name: phase.units for phase in made.phases}
    assert (units["unguided samples"], units["guided samples"]) == (1000, 1000)
    # 1,200 / 25 and the one after 333, each of the validation, and both halves at the end
    assert units["evaluation"] == 49 * 5000 + 10_000
    line = timeline(recipe, made, saves=0.0, checkpoint_bytes=1, timeout=600.0)
    assert (len(line.rounds), line.evaluations) == (3, 49)


def test_the_most_samples_are_those_of_the_rounds_that_may_be(recipe):
    def most(**changes):
        return with_(recipe, "practice", **changes).practice.most_samples

    assert most() == 70
    assert most(add_at=(20,)) == 45
    assert most(add_at=MOMENTS) == 70
    assert most(maximum_rounds=0) == 30
    assert most(maximum_rounds=2) == 60
    assert most(maximum_rounds=9) == 70
    # it takes them at once, where no other source has run before
    assert most(add_at=(20,), sources=("static",)) == 70


def test_the_disk_is_asked_for_the_samples_of_these_rounds_alone(timed):
    class Own(Source):
        moments = (7, 35)

        def available(self, pool_size):
            return 15

        def make(self, request, done=0):
            raise NotImplementedError

    state = LoopState()
    assert samples_to_come(Own(30), timed.practice, state, 0) == 60


class Timed(Source):
    """A source of the caller's own that adds after steps that are no evaluation's."""

    name = "timed"
    moments = (3, 12)

    def begin(self, loop):
        self.loop = loop

    def available(self, pool_size):
        return 15

    def make(self, request, done=0):
        count = self.loop.ranks.share(request.count, 20, turn=request.turn)
        first = request.start + done
        yield from self.loop.unguided.stream(first, count - done, self.cost, cfg_scale=1.0)


def test_a_source_of_the_caller_s_own_adds_after_its_steps_as_well(recipe):
    seen = []

    class Hears(Callback):
        def on_round(self, progress, addition):
            seen.append(progress.step)

    (result,) = DeliberatePractice(recipe, real=REAL, sources=[Timed(30)]).run(
        progress=False, callbacks=[Hears()]
    )
    assert seen == [0, 3, 12]
    assert len(result.pool) == 60


def test_the_next_chance_is_a_moment_or_an_evaluation():
    assert [next_chance(step, 5, None) for step in (0, 1, 5, 6)] == [0, 5, 5, 10]
    assert [next_chance(step, 5, (3, 12)) for step in (0, 3, 4, 12, 13)] == [3, 3, 12, 12, None]
    assert next_chance(1, 5, ()) is None
