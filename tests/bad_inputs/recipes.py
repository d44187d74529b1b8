"""Recipes with a mistake, in their text, in their fields and in their values."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from dpfast.config import Recipe, fields, read_recipe
from dpfast.config.kinds import Choice, ChoiceOrPath, Number, Optional, Sequence, Table, Text, Truth
from tests.bad_inputs.case import NEVER, Case, generated, listed

TEXT = "seed = 3\n\n[guidance]\nomega = 0.25\nevery = 2\n\n[learner]\noptions = {depths = [1, 2]}\n"
RIGHT = (3, 0.25, 2, {"depths": [1, 2]})


def _read(path: Path) -> Any:
    recipe = Recipe.load(path)
    return recipe.seed, recipe.guidance.omega, recipe.guidance.every, recipe.learner.options


def _recipe(folder: Path, data: bytes, right: Any, *named: str, valid: bool = False) -> Case:
    path = folder / "mine.toml"
    path.write_bytes(data)
    return Case(lambda: _read(path), (*named, "mine.toml"), right, valid=valid)


def encoding(given: tuple[str, Any], random: random.Random, folder: Path) -> Case:
    name, right = given
    text = TEXT + "# Größe\n"
    return _recipe(folder, text.encode(name), right, valid=right is not NEVER)


listed(
    "recipes",
    {
        "utf-8": ("utf-8", RIGHT),
        "mark": ("utf-8-sig", RIGHT),
        "utf-16": ("utf-16", NEVER),
        "utf-16-le": ("utf-16-le", NEVER),
        "utf-16-be": ("utf-16-be", NEVER),
        "utf-32": ("utf-32", NEVER),
        "latin-1": ("latin-1", NEVER),
        "cp437": ("cp437", NEVER),
        "windows-lines": ("utf-8", RIGHT),
    },
    encoding,
)


def text(data: str, random: random.Random, folder: Path) -> Case:
    words = re.findall(r"\w+", data[:200])  # the field, or its section
    return _recipe(folder, data.encode(), NEVER, *words[:3], "'' =")


listed(
    "recipes",
    {
        "twice": "seed = 1\nseed = 2\n",
        "section-twice": "[learner]\n[learner]\n",
        "torn": "seed = ",
        "nul": "seed = 1\0\n",
        "comma": "omega = 0,05\n",
        "json": '{"seed": 1}',
        "yaml": "seed: 1\n",
        "unknown-field": "seeed = 1\n",
        "unknown-section": "[guidence]\nomega = 1\n",
        "field-of-another-section": "[learner]\nomega = 0.1\n",
        "field-without-section": "omega = 0.1\n",
        "section-as-number": "guidance = 3\n",
        "section-as-list": "[[guidance]]\nomega = 0.1\n",
        "section-in-section": "[guidance.omega]\nx = 1\n",
        "deep-list": "class_names = " + "[" * 5000 + "]" * 5000,
        "deep-tables": "learner" + ".a" * 400 + " = 1\n",
        "deep-options": "[learner]\noptions = " + "{a = " * 3000 + "1" + "}" * 3000,
        "endless-number": "seed = " + "9" * 5000 + "\n",
        "endless-hex": "seed = 0x" + "f" * 5000 + "\n",
        "date": "seed = 2024-01-01\n",
        "empty-key": '"" = 1\n',
        "odd-key": '"seed\\u2028" = 1\n',
        "names-blank": '[generator]\nclass_names = ["a", " "]\n',
        "names-of-numbers": "[generator]\nclass_names = [1, 2]\n",
        "template-without-name": '[generator]\nprompt_template = "a photo"\n',
    },
    text,
)


@generated(1)
def empty(random: random.Random, folder: Path) -> Case:
    default = Recipe()
    right = (0, default.guidance.omega, default.guidance.every, {})
    return _recipe(folder, b"", right, valid=True)


def path(kind: str, random: random.Random, folder: Path) -> Case:
    place = folder / "mine.toml"
    if kind == "folder":
        place.mkdir()
    elif kind == "broken-link":
        place.symlink_to(folder / "gone.toml")
    elif kind == "link-to-itself":
        place.symlink_to(place)
    elif kind == "long-name":
        place = folder / ("x" * 5000 + ".toml")
    elif kind == "nul":
        place = folder / "mi\0ne.toml"
    return Case(lambda: _read(place), (".toml",))


listed(
    "recipes",
    {k: k for k in ("missing", "folder", "broken-link", "link-to-itself", "long-name", "nul")},
    path,
)


NUMBERS = ("nan", "inf", "-inf", "1e400", "-1", "1e18", "9" * 400, "0.5", "-0.0")
OTHERS = ("true", '"x"', '""', "[]", "{}", "[1, 2, 3, 4]", "07:32:00", "[[1]]", '"nan"', '["a", 1]')


@generated(60)
def value(random: random.Random, folder: Path) -> Case:
    """A value of chance for a field of chance: taken as it stands, or refused by the field's
    name.
    """
    name = random.choice([n for n in fields() if "." in n])
    section, _, last = name.partition(".")
    written = random.choice(NUMBERS + OTHERS)
    data = f"[{section}]\n{last} = {written}\n"
    path = folder / "mine.toml"
    path.write_bytes(data.encode())

    def run() -> Any:
        found = getattr(getattr(Recipe.load(path), section), last)
        return found if isinstance(found, (str, bool, dict)) else _plain(found)

    return Case(run, (last, "mine.toml"), _taken(fields()[name].kind, written))


def _plain(found: Any) -> Any:
    return list(map(_plain, found)) if isinstance(found, tuple) else found


def _taken(kind: Any, written: str) -> Any:
    """What a field of this kind may hold when a recipe says ``written``; NEVER where nothing."""
    table: dict[str, Any] = {
        **{"true": True, '"x"': "x", '""': "", "[]": [], "{}": {}, "[1, 2, 3, 4]": [1, 2, 3, 4]},
        **{"-1": -1, "1e18": 10**18, "9" * 400: int("9" * 400), "0.5": 0.5, "-0.0": 0},
    }
    if written not in table:
        return NEVER
    given = table[written]
    if isinstance(kind, Optional):
        kind = kind.value
    if isinstance(kind, Truth):
        return given if isinstance(given, bool) else NEVER
    if isinstance(kind, (Text, Choice, ChoiceOrPath)):
        return given if isinstance(given, str) else NEVER
    if isinstance(kind, Table):
        # "" as on a command line
        return given if isinstance(given, dict) else {} if given == "" else NEVER
    if isinstance(kind, Sequence):
        item = kind.item
        if isinstance(given, str):  # as on a command line
            given = [given] if given else []
        if not isinstance(given, list):
            return NEVER
        fits = all(isinstance(i, str) is not isinstance(item, Number) for i in given)
        return given if fits else NEVER
    assert isinstance(kind, Number)
    whole = isinstance(given, int) and not isinstance(given, bool)
    fits = whole or (kind.type is float and isinstance(given, float))
    return given if fits and abs(given) < 1e300 else NEVER


NAMED = ("recipe.json", "seed", "omega", "sources", "cfg_from")


def of_a_run(given: bytes | str, random: random.Random, folder: Path) -> Case:
    """recipe.json of a run's folder."""
    path = folder / "recipe.json"
    path.write_bytes(given if isinstance(given, bytes) else given.encode())
    return Case(lambda: Recipe.from_dict(read_recipe(path)).seed, NAMED)


listed(
    "recipes",
    {
        "empty": b"",
        "torn": json.dumps(Recipe().to_dict())[:500],
        "list": "[]",
        "null": "null",
        "number": "3",
        "section-as-list": '{"guidance": []}',
        "section-null": '{"guidance": null}',
        "sources-number": '{"practice": {"sources": 3}, "seed": "a"}',
        "sources-null": '{"practice": {"sources": null}, "seed": -1}',
        "sources-of-lists": '{"practice": {"sources": [[1]]}, "seed": -1}',
        "cfg-alone": '{"generator": {"cfg_from": 0.5}, "seed": -1}',
        "utf-16": '{"seed": 1}'.encode("utf-16"),
        "latin-1": '{"name": "\xe9"}'.encode("latin-1"),
        "deep": "[" * 100_000,
        "nan": '{"guidance": {"omega": NaN}}',
        "infinity": '{"guidance": {"omega": 1e999}}',
        "text-number": '{"seed": "three"}',
        "nul": "\0" * 50,
    },
    of_a_run,
)
