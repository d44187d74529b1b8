"""The runs of a table: their commands, their folders, and how far each has come."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dpfast.config import RECIPE_FILE, USER_FOLDERS, Recipe, fields, full_name, short_name
from dpfast.errors import InputError
from dpfast.files import is_folder, listed, there
from dpfast.paper.definition import Entry, Table
from dpfast.pool.shards import durable
from dpfast.practice.changes import FREE, RULES
from dpfast.report.runs import Run, read_run
from dpfast.textfiles import read_json

DEFINED = "paper.json"  # of a table's folder: which runs it holds
# option -> the names by which the definitions call a folder that only their user has
PLACES = {
    "pipeline": (
        *USER_FOLDERS["pipeline"],
        "stable-diffusion-1.4",
        "stable-diffusion-2.1",
        "stable-diffusion-xl",
    ),
    "validation": USER_FOLDERS["validation"],
    "real": ("imagenet-train",),
}
PAGE = "index.html"  # that a run writes last


@dataclass(frozen=True, kw_only=True)
class Folders:
    """The folders that the user has. options: what each run is given, by option. pipelines: the
    folder of each generator that the table's recipes name.
    """

    given: Mapping[str, str]
    pipelines: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class PaperRun:
    """One run of a table: an entry with a seed.

    folder: its own; table: that of all runs; ours: the folders of its user.
    """

    entry: Entry
    seed: int
    table: Path
    ours: Folders

    @property
    def name(self) -> str:
        return f"{self.entry.name}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.table / self.name

    @property
    def trunk(self) -> Path | None:
        """The folder of the run that it leaves."""
        return None if self.entry.branch is None else self._beside(self.entry.branch[0])

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The recipe's fields that it names: short name -> value. Folders that are not given yet
        stand as in the recipe.
        """
        own = {short_name(full_name(name)): value for name, value in self.entry.fields.items()}
        if self.entry.reuse:
            own["reuse"] = str(self._beside(self.entry.reuse))
        recipe = Recipe.load(self.entry.recipe, **own)
        pipeline = recipe.generator.pipeline
        sources = recipe.practice.sources
        for name, value in self.ours.given.items():
            if name != "real" or {"real", "mix"} & {*sources}:
                own[name] = value
        found = self.ours.pipelines.get(pipeline, self.ours.pipelines.get(""))
        if found is not None and pipeline in PLACES["pipeline"]:
            own["pipeline"] = found
        return own | {"seed": self.seed}

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe with the run's fields. Raises ``RecipeError`` as ``Recipe.load`` does."""
        recipe = Recipe.load(self.entry.recipe, **self.fields)
        if self.entry.branch is None:
            return recipe
        return replace(recipe, practice=replace(recipe.practice, sources=("dp",)))

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The command after ``dpfast``, as one would type it."""
        options: list[str] = []
        for name, value in self.fields.items():
            shown = fields()[full_name(name)].text(_tuples(value))
            options += [f"--{name.replace('_', '-')}", shown]
        if self.entry.branch is not None:
            options += ["--branch-at", str(self.entry.branch[1]), "--branch-from", str(self.trunk)]
        return ("run", self.entry.recipe, *options, "--out", str(self.folder))

    @property
    def lacking(self) -> dict[str, str]:
        """The options that its user has yet to name a folder for, and the recipe's names for
        them.
        """
        recipe = self.recipe
        values = {
            "pipeline": recipe.generator.pipeline,
            "validation": recipe.validation,
            "real": recipe.practice.real,
        }
        return {
            option: value
            for option, value in values.items()
            if value in PLACES[option] and not is_folder(Path(value))
        }

    @property
    def command(self) -> str:
        """The command as one would type it; folders that are lacking are named in capitals."""
        missing = [(f"--{name}", f"FOLDER-OF-{value}") for name, value in self.lacking.items()]
        known = {name for name in self.lacking if name in self.fields}
        words = [*self.words]
        for name in known:  # the definition's own name for it
            place = words.index(f"--{name}")
            del words[place : place + 2]
        return shlex.join(("dpfast", *words, *(each for pair in missing for each in pair)))

    def read(self) -> Run | None:
        """Reads the run's folder; None where it has not begun."""
        return read_run(self.folder) if there(self.folder / RECIPE_FILE) else None

    @property
    def result(self) -> dict[str, Any] | None:
        """The line that tells its accuracies, None before it is finished."""
        run = self.read()
        found = [] if run is None else run.events("result", self.recipe.practice.sources[-1])
        return found[-1] if found else None

    @property
    def finished(self) -> bool:
        return there(self.folder / PAGE) and self.result is not None

    @property
    def state(self) -> str:
        """The run's progress, in words."""
        run = self.read()
        if run is None:
            return "missing"
        if self.finished:
            return "finished"
        last = max((line["step"] for line in run.metrics), default=0)
        return f"missing: at iteration {last}"

    @property
    def going_on(self) -> tuple[str, ...]:
        """The option with which its command continues what is there; none for a run to begin.

        Where a kill came while a branch was being made there is no checkpoint, which is written
        last, and it is made anew.
        """
        if not there(self.folder / RECIPE_FILE):
            return ()
        if self.trunk is not None and not listed(self.folder / "checkpoints_dp", "*.json"):
            return ("--overwrite",)
        return ("--resume",)

    def out_of_reach(self) -> str:
        """Returns the reason why it cannot be made, in words; "" where it can, or its trunk is not
        finished.
        """
        if self.entry.branch is None or self.trunk is None or not there(self.trunk / RECIPE_FILE):
            return ""
        ends = read_run(self.trunk).events("result", "dp")
        made, wanted = (ends[-1].get("additions", 0) if ends else None), self.entry.branch[1]
        if made is None or made >= wanted:
            return ""
        return f"missing: {self.trunk.name} ended after {made} of {wanted} additions"

    def _beside(self, name: str) -> Path:
        return self.table / f"{name}-seed{self.seed}"


def paper_runs(table: Table, out: Path, seeds: Sequence[int], folders: Folders) -> list[PaperRun]:
    """Returns all runs of a table in the order in which they can be made, all seeds of one after
    another.

    Raises ``RecipeError`` where a recipe cannot be.
    """
    runs = [
        PaperRun(entry=entry, seed=seed, table=out, ours=folders)
        for entry in table.runs
        for seed in seeds
    ]
    for run in runs:
        run.recipe.check()
    return runs


def lacking(runs: Sequence[PaperRun]) -> dict[str, list[str]]:
    """Maps the options whose folders the user has yet to name to the recipes' names for them."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for option, value in run.lacking.items():
            if value not in found.setdefault(option, []):
                found[option].append(value)
    return found


def claim(table: Table, runs: Sequence[PaperRun], out: Path, *, small: bool) -> None:
    """Notes in ``out`` which runs it holds.

    Raises ``InputError`` where it holds those of another table, and where a run was defined
    otherwise when it was noted, or where nothing can be written. Folders, and what else a resumed
    run may change, are not compared.
    """
    now = {run.entry.name: _essence(run) for run in runs}
    if there(out) and not out.is_dir():
        raise InputError(f"out = {str(out)!r}: expected a folder")
    known: Any = read_json(out / DEFINED) if there(out / DEFINED) else {}
    held_runs = known.get("runs", {}) if isinstance(known, dict) else None
    if not isinstance(held_runs, dict) or not all(isinstance(v, dict) for v in held_runs.values()):
        raise InputError(f"{out / DEFINED}: expected the runs of a table")
    size = " in small" if small else ""
    if known:
        held = known.get("table"), known.get("small")
        if held != (table.name, small):
            their = f"{held[0]}{' in small' if held[1] else ''}"
            raise InputError(
                f"out = {str(out)!r}: holds the runs of {their}, not of {table.name}{size}; choose "
                "another folder"
            )
        changed = [
            f"{name}, {field} = {new!r} was {old!r}"
            for name, fields_now in now.items()
            if name in held_runs
            for field in sorted(fields_now.keys() | held_runs[name].keys())
            if (new := fields_now.get(field)) != (old := held_runs[name].get(field))
        ]
        if changed:
            raise InputError(
                f"out = {str(out)!r}: its runs were defined otherwise: {'; '.join(changed)}; "
                "choose another folder"
            )
    elif out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise InputError(
            f"out = {str(out)!r}: holds other things than the runs of a table; choose another "
            "folder"
        )
    told = {"table": table.name, "small": small, "runs": held_runs | now}
    if told == known:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        with durable(out, DEFINED) as file:
            file.write(json.dumps(told, indent=1).encode() + b"\n")
    except OSError as error:
        raise InputError(f"out = {str(out)!r}: cannot be written: {error.strerror}") from error


def _essence(run: PaperRun) -> dict[str, Any]:
    """Returns the identity of a run, without its seed."""
    own = {
        name: _tuples(value)
        for name, value in run.fields.items()
        if RULES[name][0] != FREE or name == "iterations"
    }
    found = own | {"recipe": run.entry.recipe, "branch": run.entry.branch, "seed": None}
    return dict(json.loads(json.dumps({key: value for key, value in found.items() if value})))


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
