"""What a run holds in memory at once: batches of a bounded size, and nothing of one phase while
another runs.
"""

import pytest

from dpfast.generate.models.decoder import TinyDecoder, VaeDecoder
from dpfast.generate.runner import Runner
from dpfast.generate.sampler import GuidedSampler
from dpfast.learn.trainer import Trainer
from dpfast.practice.callbacks import Callback
from dpfast.practice.experiment import DeliberatePractice
from tests.generate.standin import StandInRecorder, force_reference
from tests.practice.small import REAL
from tests.practice.test_loop import with_

BATCH = 7


@pytest.fixture
def short(recipe):
    """Two rounds of 15 samples, batches of seven."""
    recipe = with_(
        recipe, "practice", iterations=20, maximum_samples=60, maximum_rounds=2, evaluate_every=2
    )
    return with_(with_(recipe, "learner", warmup=0.1), "generator", steps=4, batch_size=BATCH)


class Sizes:
    """The most samples that each part of a sampler was given at once."""

    def __init__(self, monkeypatch):
        self.most = {}
        self.seen(monkeypatch, Runner, "step", len)
        self.seen(monkeypatch, Runner, "finish", len)
        self.seen(monkeypatch, VaeDecoder, "__call__", len)
        self.seen(monkeypatch, VaeDecoder, "encode", len)
        self.seen(monkeypatch, TinyDecoder, "__call__", len)

    def seen(self, monkeypatch, owner, name, size):
        plain = getattr(owner, name)

        def noted(it, *arguments):
            key = f"{owner.__name__}.{name}"
            self.most[key] = max(self.most.get(key, 0), size(*arguments))
            return plain(it, *arguments)

        monkeypatch.setattr(owner, name, noted)


OPTIONS = {
    "dp and static": ("practice", {"sources": ("dp", "static")}),
    "prune and dynamic": ("practice", {"sources": ("prune", "dynamic"), "oversample": 2.0}),
    "early rejection": (
        "practice",
        {"sources": ("dp",), "early_candidates": 2.5, "allot": "difficulty"},
    ),
    "re-practice": ("practice", {"sources": ("dp",), "restart": 0.5}),
    "disagreement": ("guidance", {"criterion": "disagreement"}),
    "no cfg in the second round": (
        "practice",
        {"sources": ("dp",), "cfg_scale_rounds": (1.5, 1.0)},
    ),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_no_more_than_a_generation_batch_is_made_at_once(short, options, monkeypatch):
    section, changes = OPTIONS[options]
    recipe, sizes = with_(short, section, **changes), Sizes(monkeypatch)
    results = DeliberatePractice(recipe, real=REAL).run(progress=False)
    assert any(result.additions for result in results)
    assert sizes.most["Runner.step"] == sizes.most["Runner.finish"] == BATCH
    assert max(sizes.most.values()) == BATCH, sizes.most


def test_nothing_stays_captured_while_the_learner_trains(short, monkeypatch):
    force_reference(monkeypatch)
    recorder, alive, start, step = StandInRecorder(), [], GuidedSampler.__init__, Trainer.step

    def recorded(self, *arguments, **options):
        start(self, *arguments, **{"cuda_graphs": recorder} | options)

    def counted(self, *batch):
        alive.append(recorder.alive)
        return step(self, *batch)

    monkeypatch.setattr(GuidedSampler, "__init__", recorded)
    monkeypatch.setattr(Trainer, "step", counted)
    recipe = with_(short, "practice", sources=("dp", "prune"), oversample=2.0)
    dp, prune = DeliberatePractice(recipe, real=REAL).run(progress=False)
    assert dp.additions == prune.additions == 2
    # a step and the decoding in each round; prune takes over round 0
    assert recorder.recorded == 5 * 2
    # one step more, of the learner's trial before the run
    assert alive == [0] * (1 + 2 * recipe.practice.iterations)


def test_what_training_leaves_is_given_back_before_samples_are_made(short):
    """Gradients, and batches that were prepared."""
    held = []

    class Looking(Callback):
        def on_step(self, progress):
            held.append(self.of(practice.loop))

        def on_samples(self, progress, batch):
            held.append(self.of(practice.loop))

        def of(self, loop):
            gradients = sum(p.grad is not None for p in loop.trainer.model.parameters())
            return gradients, len(loop.loader._queue)

    practice = DeliberatePractice(with_(short, "practice", sources=("dp",)), real=REAL)
    practice.run(progress=False, callbacks=[Looking()])
    of_samples = [i for i, (gradients, _) in enumerate(held) if not gradients]
    assert len(of_samples) == 5 + 2 * 3  # batches of the rounds
    assert all(held[i] == (0, 0) for i in of_samples)
    assert any(queue for gradients, queue in held if gradients)
