"""The learners that a run has saved: the one that it ended with, and those of its checkpoints."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from dpfast.config import RECIPE_FILE, Recipe, read_recipe
from dpfast.errors import InputError
from dpfast.files import there
from dpfast.generate.pipelines import Pipeline
from dpfast.learn.models import learner_of_run, load_learner
from dpfast.practice import checkpoint
from dpfast.practice.checkpoint import Checkpoint

NEWEST = "newest"
MOMENT = re.compile("(?P<round>[0-9]{1,9})|step-(?P<step>[0-9]{1,18})")  # beside NEWEST


@dataclass(frozen=True)
class SavedLearner:
    """A run's learner at one moment.

    module: in eval mode and its run's precision; moment: "end", "round 3" or "step 1200"; step: the
    optimiser steps that it has taken; source: the samples that it was trained on.
    """

    module: nn.Module
    moment: str
    step: int
    source: str


def saved_learners(
    run: Path, pipeline: Pipeline, moments: Sequence[str] = (NEWEST,)
) -> list[SavedLearner]:
    """Returns the learners of a run, finished or not, at each of these moments.

    Of a run with several sources they are those of "dp", or of the first source where "dp" is not
    among them. A checkpoint gives the weights that guide in its run (``guide_with``), the end of
    the run those whose accuracy counts.

    moments: each the number of a round, whose end ``keep_rounds`` keeps; "step-N", any checkpoint
    that is there; or "newest", the end of a finished run and the newest checkpoint of another.

    Raises ``InputError`` for a folder that is no run or has no learner yet, for a moment that is
    none or that is named twice, and for one without a checkpoint, where it says what there is; and
    as ``learner_of_run`` does.
    """
    for moment, count in Counter(moments).items():
        if moment != NEWEST and not MOMENT.fullmatch(moment):
            raise InputError(
                f"at = {moment!r}: expected the number of a round, step-N or {NEWEST!r}"
            )
        if count > 1:
            raise InputError(f"at = {moment!r}: is named {count} times")
    if not there(run / RECIPE_FILE):
        hint = ""
        if run.name.startswith("checkpoint"):
            hint = "; name the run that the checkpoint is of, and the checkpoint by --at"
        raise InputError(
            f"learner = {str(run)!r}: not the folder of a run, it has no {RECIPE_FILE}{hint}"
        )
    recipe = Recipe.from_dict(read_recipe(run / RECIPE_FILE))
    sources = recipe.practice.sources
    source = "dp" if "dp" in sources else sources[0]
    found = [_learner_at(moment, run, recipe, pipeline, source) for moment in moments]
    for name, count in Counter(learner.moment for learner in found).items():
        if count > 1:
            raise InputError(f"at = {','.join(moments)!r}: {count} of these are {name}")
    return found


def _learner_at(
    moment: str, run: Path, recipe: Recipe, pipeline: Pipeline, source: str
) -> SavedLearner:
    if moment == NEWEST and there(run / f"learner_{source}.safetensors"):
        module = load_learner(run, pipeline, source=source)
        return SavedLearner(module, "end", recipe.practice.iterations, source)
    taken = _taken(moment, run, run / f"checkpoints_{source}")
    weights = weights_of(taken, recipe.guidance.guide_with)
    name = f"round {int(moment)}" if moment.isdecimal() else f"step {taken.step}"
    return SavedLearner(learner_of_run(run, pipeline, weights), name, taken.step, source)


def _taken(moment: str, run: Path, folder: Path) -> Checkpoint:
    """Returns the checkpoint of a moment, out of the ``folder`` of those of its source."""
    if moment == NEWEST:
        newest = checkpoint.latest(folder)
        if newest is None:
            raise InputError(
                f"learner = {str(run)!r}: the run has no learner yet, {folder.name} holds no "
                "checkpoint"
            )
        return newest
    named = MOMENT.fullmatch(moment)
    assert named is not None
    found = {path: checkpoint.step_of(path) for path in checkpoint.paths(folder)}
    steps = {step: path for path, step in found.items() if step is not None}
    if named["round"] is not None:
        what, path = "that round's end", checkpoint.at_round(folder, int(named["round"]))
    else:
        what, path = "that step", steps.get(int(named["step"]))
    if path is None:
        rounds = [str(number) for number in checkpoint.rounds(folder)]
        known = [*rounds, *(f"step-{step}" for step in sorted(steps))]
        there_are = f"there are {', '.join(known)}" if known else "there is none"
        more = "" if rounds else "; rounds are kept with --keep-rounds true"
        raise InputError(
            f"at = {moment!r}: {str(run)!r} keeps no checkpoint of {what}; {there_are}{more}"
        )
    return checkpoint.load(path)


def weights_of(taken: Checkpoint, which: str) -> dict[str, Tensor]:
    """Returns the "ema" or the "raw" weights of a checkpoint's learner, as a module loads them."""
    prefix = f"{'ema' if which == 'ema' else 'model'}/"
    trained = taken.components["trainer"]
    return {
        name.removeprefix(prefix): value
        for name, value in trained.items()
        if name.startswith(prefix)
    }
