"""The seconds for which ``dpfast run --dry-run`` times the stages on a device, by the plan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from dpfast.hardware.flops import Counts
from dpfast.planning import measure
from dpfast.planning.plan import Plan
from dpfast.rehearsal.standins import put

MOST = 30.0  # seconds that a dry run may take beside loading and counting


class _Time:
    """Stands for the module ``time``: seconds pass where a call says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


def dry_run_seconds(planned: Plan) -> float:
    """Returns seconds in which ``measure`` times all stages of the plan's recipe on one of its
    devices.

    Its own clock decides on batches and rounds; a call takes what the plan says.
    """
    recipe = planned.recipe
    stages = planned.stages
    unit = planned.unit
    simulated, device = _Time(), torch.device("cpu")
    clock = measure.StageClock(planned.device, measure.SECONDS / 4, device)
    work: list[tuple[str, Counts, float, int]] = [
        ("unguided samples", stages.unguided, unit.unguided, recipe.generator.at_once),
        ("guided samples", stages.guided, unit.guided, recipe.generator.at_once),
        ("training", stages.training, unit.image, recipe.learner.batch_size),
        ("evaluation", stages.evaluation, unit.evaluation, measure.EVALUATED),
    ]

    def calls(
        each: float,
    ) -> Callable[[int], contextlib.AbstractContextManager[Callable[[], object]]]:
        @contextlib.contextmanager
        def prepared(size: int) -> Iterator[Callable[[], object]]:
            def call() -> None:
                simulated.seconds += size * each

            yield call

        return prepared

    with put([(measure, "time", simulated)]):
        for name, counts, each, most in work:
            clock.time(name, calls(each), counts, most=most, dtype=recipe.generator.dtype, least=2)
    return simulated.seconds
