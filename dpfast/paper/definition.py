"""Tables and figures as data: a TOML file each, in ``dpfast/recipes/paper``.

title      what it shows, a line
also       other figures that the same runs make
says       what the paper says about it, where that is no number of a row
recipe     of its runs; [fields]: what all of them have other than the recipe
seeds      of each run
measures   columns of the paper: validation, held-out, or the name of an evaluation set
baseline   the run over which gains are counted
group_by   fields that tell curves of accuracy against samples apart, beside the source

[[runs]]   a row of the paper, and the run that makes it
  name       of the run's folder
  row        where the paper prints it
  paper      its numbers, measure = per cent
  fields     of this run alone; recipe: in place of the table's
  branch     name and round of the run that it leaves: {run = "dp", at = 3}
  reuse      the run whose unguided samples it takes
  left_out   why there is no run
  note       what a reader should know
  small      the fields of its twin in small; a branch has at alone

[small]    recipe, seeds, fields and about of the twins; runs without small have none
[[commands]]  what is made by another command than a run: name, words, makes (a folder of pictures)
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpfast.config import RECIPES
from dpfast.errors import InputError
from dpfast.textfiles import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = RECIPES / "paper"
RESULTS = ("validation", "held-out")  # accuracies that every run measures


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of a table and the run that makes it, with its recipe and its fields whole.

    branch: name and round of the run that it leaves. left_out: why no run makes it.
    """

    name: str
    recipe: str
    row: str = ""
    paper: dict[str, float] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    branch: tuple[str, int] | None = None
    reuse: str = ""
    left_out: str = ""
    note: str = ""

    @property
    def needs(self) -> set[str]:
        """The names of the runs that must be finished before this one begins."""
        return {*((self.branch[0],) if self.branch else ()), *filter(None, (self.reuse,))}


@dataclass(frozen=True, kw_only=True)
class Command:
    """A row that another command than ``dpfast run`` makes. words: after ``dpfast``, in which {out}
    is the table's folder, {pipeline} the generator's and {seed} the first of those that are asked
    for;
    makes: the folder in {out} that it writes, with its pictures.
    """

    name: str
    words: tuple[str, ...]
    makes: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table or figure of the paper, at its size or in small."""

    name: str
    title: str
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...]
    measures: tuple[str, ...]
    also: tuple[str, ...] = ()
    says: str = ""
    about: str = ""
    baseline: str = ""
    group_by: tuple[str, ...] = ()
    commands: tuple[Command, ...] = ()

    @property
    def runs(self) -> tuple[Entry, ...]:
        """The entries that are runs, each after those that it needs."""
        waiting, found = [e for e in self.entries if not e.left_out], list[Entry]()
        while waiting:
            ready = [e for e in waiting if not e.needs - {each.name for each in found}]
            if not ready:
                raise InputError(f"{self.name}: {waiting[0].name} needs a run that is not there")
            found += ready
            waiting = [e for e in waiting if e not in ready]
        return tuple(found)


def names() -> dict[str, str]:
    """Maps the name of each table and figure to that of the file that defines it, in the paper's
    order.
    """
    found = {}
    for path in FOLDER.glob("*.toml"):
        for name in (path.stem, *_read(path).get("also", ())):
            found[name] = path.stem
    return dict(sorted(found.items(), key=lambda item: _place(item[0])))


def load_table(name: str, *, small: bool = False) -> Table:
    """Reads the definition of a table or figure by its name, "table4" or "figure4".

    Raises ``InputError`` for an unknown name, and for small where it has no runs in small.
    """
    known = names()
    wanted = name.lower().replace(" ", "").replace("fig.", "figure")
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise InputError(f"table = {name!r}: no such table or figure; {hint}")
    whole = _read(FOLDER / f"{known[wanted]}.toml")
    less = whole.get("small", {})
    commands = tuple(
        Command(
            name=each["name"],
            words=tuple(each.get("small", each["words"]) if small else each["words"]),
            makes=each["makes"],
        )
        for each in whole.get("commands", ())
    )
    if small and not less and not commands:
        raise InputError(
            f"small: {known[wanted]} has no runs in small, since what it compares is not embedded; "
            "leave --small out"
        )
    entry = _small if small else _entry
    told = [e for row in whole.get("runs", ()) if (e := entry(row, whole)) is not None]
    return Table(
        name=known[wanted],
        title=whole["title"],
        entries=tuple(told),
        seeds=tuple((less if small else whole).get("seeds", (0,))),
        measures=tuple(
            name
            for name in whole.get("measures", ("validation",))
            if not small or name in RESULTS  # there are no such sets of the small images
        ),
        also=tuple(whole.get("also", ())),
        says=whole.get("says", ""),
        about=less.get("about", "") if small else "",
        baseline=whole.get("baseline", ""),
        group_by=tuple(whole.get("group_by", ())),
        commands=commands,
    )


def _entry(row: dict[str, Any], whole: dict[str, Any]) -> Entry:
    """Returns a row at the paper's size."""
    branch = row.get("branch")
    own = row if branch is None else _named(whole, branch["run"])
    return Entry(
        name=row["name"],
        recipe=own.get("recipe", whole.get("recipe", "")),
        row=row.get("row", ""),
        paper=dict(row.get("paper", {})),
        fields=whole.get("fields", {}) | own.get("fields", {}),
        branch=None if branch is None else (branch["run"], branch["at"]),
        reuse=row.get("reuse", ""),
        left_out=row.get("left_out", ""),
        note=row.get("note", ""),
    )


def _small(row: dict[str, Any], whole: dict[str, Any]) -> Entry | None:
    """Returns a row's twin in small; None where it has none."""
    if "small" not in row:
        return None
    branch, less = row.get("branch"), whole["small"]
    own = row if branch is None else _named(whole, branch["run"])
    return Entry(
        name=row["name"],
        recipe=less["recipe"],
        row=row.get("row", ""),
        paper=dict(row.get("paper", {})),
        fields=less.get("fields", {}) | own["small"],
        branch=None if branch is None else (branch["run"], row["small"]["at"]),
        reuse=row.get("reuse", ""),
        note=row.get("note", ""),
    )


def _named(whole: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in whole["runs"] if row["name"] == name)
    return found


def _read(path: Path) -> dict[str, Any]:
    return tomllib.loads(read_text(path))


def _place(name: str) -> tuple[bool, int]:
    """Returns tables before figures, by number."""
    number = "".join(filter(str.isdecimal, name))
    return name.startswith("figure"), int(number)
