"""What a run's new samples are at their birth: still what their labels say, hard, and diverse.

    practice = DeliberatePractice(recipe, unguided=unguided)
    births = Births(practice)
    (result,) = practice.run(progress=False, callbacks=[births])
    line["births"] = births.measured()

It asks the embedded judges and the learner of the moment; the run itself computes what it would
without, and its seconds are not those of this. On one core 2,000 samples take 0.6 seconds and the
real images, once in a process, 2.5: less than a twentieth of a run of 1,200 steps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.data.real import load_real
from dpfast.evaluate.measures import (
    features,
    frechet_distance,
    neighbour_radii,
    precision_and_recall,
    predict,
)
from dpfast.learn.models import JUDGES, load_judge
from dpfast.pool.pool import SamplePool
from dpfast.pool.protocol import Pool
from dpfast.practice.callbacks import Addition, Callback, Progress
from dpfast.practice.experiment import DeliberatePractice

Fields = dict[str, Any]


def nearest_earlier(pool: SamplePool) -> float | None:
    """How far the added samples are from what the pool held before: the mean distance to the
    nearest of the same class.

    In root-mean-square pixels of a range of 1; None without additions. A low one says that new
    samples repeat old ones.
    """
    rounds, labels = pool.column("round"), pool.column("label")
    pixels = pool.images(torch.arange(len(pool))).flatten(1).float() / 255
    gaps = [
        torch.cdist(
            pixels[(rounds == number) & (labels == label)],
            pixels[(rounds < number) & (labels == label)],
        )
        for number in range(1, int(rounds.max()) + 1)
        for label in labels.unique()
    ]
    nearest = torch.cat([gap.min(1).values for gap in gaps if len(gap)]) if gaps else torch.empty(0)
    return float(nearest.mean()) / pixels.shape[1] ** 0.5 if len(nearest) else None


@functools.cache
def judges() -> tuple[nn.Module, ...]:
    """The embedded judges; the first one's features measure diversity."""
    return tuple(load_judge(number) for number in JUDGES)


@functools.cache
def real_features() -> tuple[Tensor, Tensor]:
    """The first judge's features (5,000, D) of the held-out real images, and their
    ``neighbour_radii``.
    """
    points = features(judges()[0], load_real("fashion").test.images)
    return points, neighbour_radii(points)


class Births(Callback):
    """Asks the learner about the samples of each round, before it is trained on them.

    practice: whose loops are watched. In eval mode, and on the weights that guide
    (``Loop.guide``); a run of several sources ends with the measures of the last one.
    """

    def __init__(self, practice: DeliberatePractice) -> None:
        self.practice = practice
        self.rounds: list[Fields] = []
        self.learner_right: list[Tensor] = []

    def on_start(self, progress: Progress) -> None:
        self.rounds, self.learner_right = [], []

    def on_round(self, progress: Progress, addition: Addition) -> None:
        if not addition.number:
            return
        loop = self.practice.loop
        assert loop is not None
        rows = torch.arange(addition.total - addition.added, addition.total)
        self.learner_right.append(_right(loop.guide, loop.pool, rows))
        self.rounds.append(
            {"round": addition.number, "step": progress.step, "entropy": addition.entropy}
        )

    def measured(self) -> Fields:
        """What ``shares`` and ``diversity`` say of the samples that rounds added, None without
        any; of the initial ones ("initial"); of each round ("rounds", with the step of its birth);
        and the diversity of the whole pool ("pool").
        """
        loop = self.practice.loop
        assert loop is not None
        pool, number = loop.pool, loop.pool.column("round")
        every = torch.arange(len(pool))
        right = [_right(judge, pool, every) for judge in judges()]
        points = features(judges()[0], pool.images(every))
        new = number > 0
        learner = torch.cat(self.learner_right) if self.learner_right else None
        rounds = [
            {**told, **shares([each[number == told["round"]] for each in right], asked)}
            for told, asked in zip(self.rounds, self.learner_right, strict=True)
        ]
        added = None
        if learner is not None:
            added = shares([each[new] for each in right], learner) | diversity(points[new])
        return {
            "added": added,
            "initial": shares([each[~new] for each in right]),
            "rounds": rounds,
            "pool": diversity(points),
        }


def _right(model: nn.Module, pool: Pool, rows: Tensor) -> Tensor:
    """Whether a classifier gives samples of the pool their label, (n,) bool."""
    return predict(model, pool.images(rows)).argmax(1).cpu() == pool.column("label")[rows]


def shares(judges_right: Sequence[Tensor], learner_right: Tensor | None = None) -> Fields:
    """Shares of n samples, in [0, 1].

    judges: of each judge, those that it gives their label; agreed: those to which all of them do.
    With the learner's answers also learner_wrong: those that it gives another label, and useful:
    those among all n, to which every judge gives their own nevertheless.

    Args:
        judges_right, learner_right: (n,) bool of each, whether it gives a sample its label.
    """
    agreed = torch.stack(list(judges_right)).all(0)
    found: Fields = {
        "samples": len(agreed),
        "judges": [_share(right) for right in judges_right],
        "agreed": _share(agreed),
    }
    if learner_right is not None:
        found["learner_wrong"] = _share(~learner_right)
        found["useful"] = _share(~learner_right & agreed)
    return found


def diversity(points: Tensor) -> Fields:
    """How samples with these features (n, D) of the first judge cover the held-out real images: the
    Fréchet distance, precision and recall. They depend on n: only equally many compare.
    """
    real, radii = real_features()
    precision, recall = precision_and_recall(points, real, real_radii=radii)
    return {
        "frechet": round(frechet_distance(points, real), 4),
        "precision": round(precision, 4),
        "recall": round(recall, 4),
    }


def _share(of: Tensor) -> float:
    return round(float(of.float().mean()), 4)
