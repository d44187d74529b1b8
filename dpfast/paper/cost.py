"""Hours and disk of a table's runs, by the plan of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dpfast.errors import InputError
from dpfast.paper.runs import PaperRun
from dpfast.planning.measure import Timings
from dpfast.planning.plan import Plan, plan

ALIKE = {"stable-diffusion-1.4": "stable-diffusion-1.5"}  # of the same architecture
GENERATION = ("unguided samples", "guided samples", "yardstick", "scoring")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a run. made: samples that the run makes; hours: of all devices side by side, at
    most; disk: bytes that its folder takes. why: hours and disk are not known, in words, and are 0.
    """

    made: int
    hours: float
    disk: float
    why: str = ""


def costs_of(
    runs: Sequence[PaperRun], device: str, count: int, timings: Timings | None = None
) -> list[Cost]:
    """Returns the cost of each run. A branch makes no samples and trains from its round on, at most
    all iterations; what a run takes from another one (``reuse``) it does not make again.

    Raises ``InputError`` as ``plan`` does, but for a generator that no plan knows.
    """
    ends = {run.folder: _kept(run) for run in runs}
    return [_cost(run, device, count, timings, ends) for run in runs]


def _cost(
    run: PaperRun, device: str, count: int, timings: Timings | None, ends: dict[Path, int]
) -> Cost:
    recipe, practice = run.recipe, run.recipe.practice
    # what it takes is counted here, as the run that it takes it from need not be there
    recipe = replace(recipe, practice=replace(practice, reuse=""))
    name = ALIKE.get(recipe.generator.pipeline)
    if name is not None:
        recipe = replace(recipe, generator=replace(recipe.generator, pipeline=name))
    samples = None
    if run.entry.branch is not None:
        samples = practice.initial_samples + run.entry.branch[1] * practice.round_samples
    try:
        planned = plan(recipe, device, count=count, timings=timings, samples=samples)
    except InputError as error:
        if not str(error).startswith("pipeline"):
            raise
        return Cost(made=0, hours=0.0, disk=0.0, why="hours and disk by its folder")
    return _priced(planned, run, ends)


def _kept(run: PaperRun) -> int:
    """Returns the unguided samples that another run may take from it, by id from the first on."""
    practice = run.recipe.practice
    return practice.most_samples if practice.sources == ("static",) else practice.initial_samples


def _priced(planned: Plan, run: PaperRun, ends: dict[Path, int]) -> Cost:
    shared = 0
    if run.entry.reuse:
        shared = ends.get(run.table / f"{run.entry.reuse}-seed{run.seed}", 0)
    seconds, made = 0.0, 0
    for phase in planned.phases:
        if phase.name not in GENERATION:
            seconds += phase.seconds
            continue
        if run.entry.branch is not None or not phase.units:
            continue
        left = phase.units
        if phase.name == "unguided samples":
            left = max(0, left - shared)
        seconds += phase.seconds * left / phase.units
        made += left if phase.name.endswith("guided samples") else 0
    return Cost(made=made, hours=seconds / 3600, disk=planned.disk.total)
