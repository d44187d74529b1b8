"""A fault that would stop a run of the true size makes its rehearsal fail."""

import pytest
import torch

from dpfast.config import Recipe
from dpfast.generate.sampler import GuidedSampler
from dpfast.learn.ema import Ema
from dpfast.parallel import RankError
from dpfast.parallel.heartbeat import Heartbeat
from dpfast.planning import fitting
from dpfast.practice import background
from dpfast.rehearsal import ranks, rehearsal, rehearse
from dpfast.rehearsal.rehearsal import _walked
from dpfast.rehearsal.timeline import outwaits
from dpfast.sources import yardstick


@pytest.fixture(autouse=True)
def anew():
    """What was walked with a fault is not what another test walks."""
    _walked.cache_clear()
    yield
    _walked.cache_clear()


def failures(name="imagenet100-sd15", device="h100", count=8, ranks=1):
    return rehearse(Recipe.load(name), device, count=count, ranks=ranks).failures


def test_a_yardstick_in_one_batch(monkeypatch):
    def images(self):
        labels = yardstick.spread_labels(250, self.labels)
        return [self.sampler.generate(labels).images.cpu()[: self.batch]]

    monkeypatch.setattr(yardstick.Yardstick, "images", property(images))
    assert any("account of a round holds 1" in failure for failure in failures())


def test_graphs_that_stay_while_the_learner_trains(monkeypatch):
    monkeypatch.setattr(GuidedSampler, "release", lambda self: None)
    found = failures()
    assert any("captured graphs are alive while the learner trains" in failure for failure in found)
    assert any("memory: training" in failure for failure in found)


def test_a_plan_that_takes_half_of_what_training_holds(monkeypatch):
    full = fitting.training_bytes
    monkeypatch.setattr(
        fitting, "training_bytes", lambda *args, **named: full(*args, **named) * 0.48
    )
    assert any("memory: training" in failure for failure in failures("imagenet1k-sd15", count=4))


def test_ranks_that_wait_for_a_time_and_not_for_progress(monkeypatch):
    def wait(self, done, late):
        deadline = self.clock.now() + self.timeout
        while not done():
            if self.clock.now() > deadline:
                raise RankError(f"ranks {list(late())} did not answer")
            self.clock.sleep(0.05)

    # of a round of imagenet1k-sd15 on eight GPUs: one is half as fast again
    batch, batches = (
        8.7,
        2_500,
    )
    assert outwaits(8, batch, batches) is None
    monkeypatch.setattr(Heartbeat, "wait", wait)
    assert "did not answer" in outwaits(8, batch, batches)


def test_an_exchange_beside_the_gradients(monkeypatch):
    monkeypatch.setattr(ranks, "feeds", lambda host, learn, device: {"cpu": host, device: host})
    assert any("may be in flight together" in failure for failure in failures("fashion"))


def test_ranks_that_call_collectives_in_another_order(monkeypatch):
    made = rehearsal.ranks_of

    def with_one_more(count, rank, *rest):
        found = made(count, rank, *rest)
        if rank:
            found.control.all_gather(torch.zeros(1))
        return found

    monkeypatch.setattr(rehearsal, "ranks_of", with_one_more)
    assert any("in another order" in failure for failure in failures("fashion", ranks=2))


def test_checkpoints_that_the_loop_writes_itself_at_every_evaluation(monkeypatch):
    def begin(self, ready, write):
        self._run(ready, write)

    monkeypatch.setattr(background.BackgroundWriter, "begin", begin)
    monkeypatch.setattr(background.CheckpointTimer, "due", lambda self: True)
    assert any("checkpoints: the loop waits" in failure for failure in failures())


def test_a_counter_that_goes_to_the_device_in_every_step(monkeypatch):
    update = Ema.update

    def counted(self, decay):
        torch.tensor(1).to(next(self.module.parameters()).device)
        update(self, decay)

    monkeypatch.setattr(Ema, "update", counted)
    assert any("a step waits for the host" in failure for failure in failures("fashion"))
