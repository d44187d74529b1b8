"""What a checkpoint holds, and what callbacks and sources of a caller's own meet in a loop."""

import dataclasses
import json

import pytest
import torch

from dpfast.errors import InputError
from dpfast.practice import checkpoint
from dpfast.practice.callbacks import Callback
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.loop import Loop
from dpfast.practice.run_writer import RunWriter
from dpfast.samples import SampleBatch
from dpfast.sources.source import RoundRequest, Source
from tests.practice.small import REAL
from tests.practice.test_loop import run, with_


class Noise(Source):
    """Random images of random classes, in rounds of 15 up to 60."""

    streams = True

    def __init__(self):
        super().__init__(initial_samples=30)

    def available(self, pool_size):
        return min(15, 60 - pool_size)

    def make(self, request, done=0):
        for number in range(request.start + done, request.start + request.count):
            generator = torch.Generator().manual_seed(number)
            yield SampleBatch(
                images=torch.randint(0, 256, (1, 1, 16, 16), generator=generator).byte(),
                labels=torch.tensor([number % 3]),
                sample_ids=torch.tensor([number]),
                entropy=torch.tensor([float("nan")]),
            )


class Average:
    """A component of a caller's own: the mean of what it is told, beside a word."""

    def __init__(self):
        self.sum, self.count, self.word = torch.zeros(()), 0, ""

    def state_dict(self):
        return {"sum": self.sum, "count": self.count, "word": self.word}

    def load_state_dict(self, state):
        self.sum, self.count, self.word = state["sum"], state["count"], state["word"]


class AveragingLoop(Loop):
    """A loop with one component more."""

    def __init__(self, *args, **kwargs):
        self.average = Average()
        super().__init__(*args, **kwargs)

    def components(self):
        return {**super().components(), "average": self.average}

    def _stands_still(self):
        self.average.sum += self.trainer.step_count
        self.average.count += 1
        self.average.word = "evaluated"
        return super()._stands_still()


@pytest.fixture
def short(recipe):
    return with_(recipe, "practice", sources=("dp",), iterations=20)


@pytest.fixture
def practice(short):
    return DeliberatePractice(short, real=REAL)


def new_loop(practice, folder, *callbacks):
    options = {"folder": folder, "callbacks": callbacks}
    return AveragingLoop(practice.recipe, "dp", practice.pipeline, practice.real, **options)


def test_a_checkpoint_holds_whatever_the_components_give_and_gives_it_back(practice, tmp_path):
    with RunWriter(tmp_path / "run", practice.recipe) as folder:
        first = new_loop(practice, folder)
        first.run(Noise())
        saved = checkpoint.latest(folder.checkpoints("dp"))
        assert saved.components.keys() == {*first.components(), "folder"}
        assert saved.components["average"] == {"sum": 50.0, "count": 4, "word": "evaluated"}
        second = new_loop(practice, folder)
        second.run(Noise(), start=saved)
    assert second.average.state_dict() == first.average.state_dict()
    for name, component in second.components().items():
        if name == "seconds":  # they go on
            continue
        state = component.state_dict()
        assert state.keys() == saved.components[name].keys(), name
        for key, value in saved.components[name].items():
            same = torch.equal(state[key], value) if torch.is_tensor(value) else state[key] == value
            assert same, (name, key)


def test_a_source_of_the_callers_own_adds_its_rounds(practice):
    heard = []

    class Listening(Callback):
        def on_round(self, progress, addition):
            heard.append((addition.number, progress.pool_size, addition.pruning_ratio))

    result = new_loop(practice, None, Listening()).run(Noise())
    assert heard[:2] == [(0, 30, None), (1, 45, None)]  # nothing to compare its entropy with
    assert result.pool.column("omega").tolist() == [0.0] * len(result.pool)
    assert result.pool.column("sample_id").tolist() == list(range(len(result.pool)))


def test_callbacks_hear_where_the_loop_stands_and_cannot_change_it(practice):
    heard = {}

    class Listening(Callback):
        def on_start(self, progress):
            heard["start"] = progress
            with pytest.raises(dataclasses.FrozenInstanceError):
                progress.step = 7

        def on_evaluation(self, progress, evaluation, loss):
            heard[progress.step] = progress
            assert progress.accuracy == evaluation.top1

        def on_end(self, progress):
            heard["end"] = progress

    new_loop(practice, None, Listening()).run(Noise())
    start, first, end = heard["start"], heard[5], heard["end"]
    assert (start.step, start.round, start.pool_size, start.accuracy) == (0, -1, 0, None)
    assert (first.step, first.iterations, first.round, first.pool_size) == (5, 20, 0, 30)
    assert (first.source, first.rank, first.patience) == ("dp", 0, 1)
    assert 0 < first.training_seconds < end.training_seconds
    assert end.step == 20


def test_a_request_survives_json_with_classes_that_have_no_images():
    known = torch.tensor([0.25, float("nan"), 1.0])
    request = RoundRequest(number=2, start=45, count=15, learner_step=20, per_class=known, turn=1)
    plain = json.loads(json.dumps(request.to_dict(), allow_nan=False))
    again = RoundRequest.from_dict(plain)
    assert torch.equal(again.per_class.isnan(), known.isnan())
    assert again.to_dict() == request.to_dict()


def test_checkpoints_of_another_version_are_refused_by_it_and_not_passed_over(short, tmp_path):
    run(short, tmp_path / "run")
    for path in checkpoint.paths(tmp_path / "run" / "checkpoints_dp"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"version": 5}))
    said = rf"{path.name} is a checkpoint of version 5 .* reads version 6: end the run with"
    with pytest.raises(InputError, match=said):  # before any work
        RunWriter(tmp_path / "run", short, resume=True)
    with pytest.raises(InputError, match=said):
        checkpoint.latest(path.parent)
