"""Branch-outs: a run continued from the end of a round without further additions (arXiv 2502.15588,
section C.2).

So one long run yields every point of a scaling curve: the pool of each round, trained to the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dpfast.config import RECIPE_FILE, Recipe, objects_of
from dpfast.errors import InputError, RecipeError
from dpfast.files import is_folder
from dpfast.learn.pretrained import KEPT
from dpfast.parallel import Ranks
from dpfast.pool.rank_folders import rank_folder
from dpfast.pool.saver import copy_saved
from dpfast.pool.sharded import ShardLayout
from dpfast.practice import checkpoint
from dpfast.practice.changes import BORN, continued
from dpfast.practice.run_writer import RunWriter
from dpfast.textfiles import lines, read_text

SOURCE = "dp"


def prepare_branch(
    trunk: Path,
    round: int,
    out: Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    beat: Callable[[], None] = lambda: None,
) -> None:
    """Makes ``out`` a run of ``recipe`` that stands at the end of a round of the run in ``trunk``;
    resume it.

    The trunk is only read. ``beat`` is called after each of its shards. Raises ``InputError`` when
    it is no run, has another recipe (the fields are named; a branch may have other ``iterations``),
    kept no checkpoint of that round, or is past the start of the new cool-down there.
    """
    recipe = continued(trunk, recipe, branch=True)
    if trunk.resolve() == out.resolve():
        raise InputError(
            f"out = {str(out)!r}: is the run that the branch leaves; choose another folder"
        )
    folder = trunk / f"checkpoints_{SOURCE}"
    path = checkpoint.at_round(folder, round)
    if path is None:
        kept = checkpoint.rounds(folder)
        rounds = (
            f"there are those of {', '.join(map(str, kept))}"
            if kept
            else "run it with --keep-rounds true"
        )
        raise InputError(
            f"branch_at = {round}: {str(trunk)!r} kept no checkpoint of that round's end; {rounds}"
        )
    start = checkpoint.load(path)
    last = recipe.practice.iterations * (1 - recipe.learner.cooldown)
    if start.step > last:
        raise RecipeError(
            f"iterations = {recipe.practice.iterations}: the branch begins at {start.step}, after "
            "the start of the "
            f"cool-down at {last:.0f}; expected at least "
            f"{start.step / (1 - recipe.learner.cooldown):.0f}"
        )
    told = (trunk / "metrics.jsonl").read_bytes()[: start.components["folder"]["metrics"]]
    past = [line for line in lines(told.decode()) if json.loads(line)["source"] == SOURCE]
    try:
        born = read_text(trunk / (BORN if (trunk / BORN).is_file() else RECIPE_FILE))
        with RunWriter(out, recipe, overwrite=overwrite, born=born) as branch:
            branch.keep_objects(objects_of(trunk))
            if is_folder(trunk / KEPT):
                shutil.copytree(trunk / KEPT, out / KEPT)
            (out / "metrics.jsonl").write_bytes("".join(f"{line}\n" for line in past).encode())
            components = start.components
            for rank in range(start.ranks):
                ranks = Ranks(rank=rank, size=start.ranks)
                held = ShardLayout(
                    ranks, recipe.generator.batch_size, tuple(components["state"]["rounds"])
                ).held()
                part, copy = (
                    rank_folder(f, ranks) for f in (trunk / f"pool_{SOURCE}", branch.pool(SOURCE))
                )
                copy_saved(part, copy, held, beat=beat)
            state = {**components["state"], "pending": False, "frozen": True}
            written = {"metrics": (out / "metrics.jsonl").stat().st_size, "timings": 0}
            taken = replace(
                start,
                iterations=recipe.practice.iterations,
                components={**components, "state": state, "folder": written},
            )
            origin = {"run": str(trunk), "round": round, "step": start.step}
            (out / "branch.json").write_text(json.dumps(origin) + "\n", encoding="utf-8")
            keep = recipe.practice.checkpoints_kept
            checkpoint.save(branch.checkpoints(SOURCE), taken, keep=keep)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # half a branch would resume as another run
        raise
