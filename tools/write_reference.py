#!/usr/bin/env python3
"""Writes recipe, cli, api, run_folder and errors of docs/reference from the code they describe.

python tools/write_reference.py
"""

from __future__ import annotations

import argparse
import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dpfast
from dpfast.cli.main import new_parser
from dpfast.config import RECIPES, SECTIONS, Option, Recipe, fields, flat, short_name
from dpfast.textfiles import lines, read_text

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "reference"
LAYOUT = ROOT / "dpfast" / "practice" / "run_paths.py"
WRITTEN = "<!-- Written by tools/write_reference.py: change the code that it reads. -->"
RECIPE = f"""{WRITTEN}

# The fields of a recipe

A recipe is a TOML file with up to five sections. Every field has a default, so that a file says
only what is its own. `dpfast init my.toml` writes one to start from. Before any work starts each
value is checked, and an error names the field, its value and what was expected.

- On a command line every field but `name` is an option with its section's name,
  `--guidance.omega 0.05`. The last word alone, `--omega 0.05`, is enough where one section has it.
  A list is written with commas: `--sources dp,static`; a table as TOML in one line:
  `--options 'depths = [1, 1], groups_width = 8'`.
- In Python fields are arguments of `Recipe.load`:
  `Recipe.load("fashion", omega=0.1, learner={{"batch_size": 32}})`.
- `dpfast run RECIPE --help` prints all options with the values that the recipe has.

"""
SHIPPED = """## What the recipes of the package say

Fields that no recipe names are left out. An empty cell is the default.

"""
COMMANDS = f"""{WRITTEN}

# The command line

An input that cannot work ends with one line on stderr and exit code 2, before any work starts.
`dpfast COMMAND --help` prints what is below.

"""
RUN_FOLDER = f"""{WRITTEN}

# The folder of a run

`dpfast run RECIPE --out FOLDER` writes all that it makes into one folder. The values in its files
of numbers are explained in [the numbers of a run](metrics.md).

"""
API = f"""{WRITTEN}

# The Python API

These names are public: `import dpfast` offers them, each imported on first use. A name leads to its
documentation, and the last column to a page or a file that uses it. Everything else in the package
may change without notice.

"""
SAMPLER, LOOP = "../guides/embed_sampler.md", "../guides/embed_loop.md"
POOL, EXAMPLES = "../guides/pool_and_loader.md", "../../examples"
INSIDE, DATA = "../guides/inside_diffusers.md", "../guides/own_data.md"
EXTEND = "../guides/extend.md"
# what a reader does, then each name with the place that shows it
NAMES = {
    "Guided samples": {
        "GuidedSampler": SAMPLER,
        "GuidanceConfig": SAMPLER,
        "Pipeline": f"{SAMPLER}#your-generator-in-place-of-fashion-mnist",
        "SampleBatch": f"{POOL}#the-pool",
    },
    "Guidance inside another sampler": {
        "GuidanceCallback": f"{INSIDE}#a-callback",
        "GuidedDDIMScheduler": f"{INSIDE}#a-scheduler",
        "LearnerGuidance": f"{INSIDE}#a-guider",
        "make_cond_fn": f"{INSIDE}#a-cond_fn",
    },
    "The loop": {
        "DeliberatePractice": LOOP,
        "Recipe": LOOP,
        "RealData": f"{DATA}#tensors-and-datasets",
        "Result": f"{LOOP}#a-callback",
        "Callback": f"{LOOP}#a-callback",
        "Progress": f"{LOOP}#a-callback",
        "Addition": f"{LOOP}#a-callback",
    },
    "Parts of your own": {
        "Source": f"{EXTEND}#a-source",
        "LoopView": f"{EXTEND}#a-source",
        "RoundRequest": f"{EXTEND}#a-source",
        "Loader": f"{EXAMPLES}/own_loader.py",
        "OwnPipeline": f"{LOOP}#your-generator",
        "Sampler": f"{LOOP}#your-generator",
    },
    "Pool and loader": {
        "SamplePool": f"{POOL}#the-pool",
        "Pool": f"{POOL}#pools-and-loaders-of-your-own",
        "open_pool": f"{POOL}#on-a-disk",
        "make_loader": f"{POOL}#the-loader",
        "Augment": f"{POOL}#the-loader",
        "BatchFormat": f"{POOL}#the-loader",
    },
    "Single operations": {
        "entropy": f"{EXAMPLES}/own_pipeline.py",
        "entropy_and_grad": f"{SAMPLER}#single-operations",
        "guided_step": f"{SAMPLER}#single-operations",
        "gather_batch": f"{POOL}#the-loader",
        "normal": f"{SAMPLER}#single-operations",
    },
    "Errors": {
        "InputError": f"{LOOP}#what-can-be-yours",
        "RecipeError": f"{LOOP}#what-can-be-yours",
    },
}


def recipe_page() -> str:
    text = RECIPE
    for section in ("", *SECTIONS):
        mine = {name: each for name, each in fields().items() if name.rpartition(".")[0] == section}
        about = (
            SECTIONS[section].__doc__ if section else "At the top of the file, before any section."
        )
        text += f"## {f'[{section}]' if section else 'The recipe itself'}\n\n{_line(about)}\n\n"
        text += table(("field", "value", "default", "meaning"), map(_row, mine, mine.values()))
    recipes = [Recipe.load(path.stem) for path in sorted(RECIPES.glob("*.toml"))]
    said = [flat(recipe.to_dict()) for recipe in recipes]
    rows = []
    for full, option in fields().items():
        values = [each[short_name(full)] for each in said]
        if full != "name" and any(value != option.default for value in values):
            rows.append([f"`{short_name(full)}`", *(_said(option, value) for value in values)])
    return (
        f"{text}{SHIPPED}{table(['field', *(f'`{r.name}`' for r in recipes)], rows)}".rstrip()
        + "\n"
    )


def cli_page() -> str:
    return COMMANDS + "".join(_sections(new_parser())).rstrip() + "\n"


def run_folder_page() -> str:
    rows: list[list[str]] = []
    about = ast.get_docstring(ast.parse(read_text(LAYOUT))) or ""
    for line in lines(about.split("\n\n")[1]):
        name, _, text = line.partition("  ")
        if name:
            rows.append([f"`{name}`", text.strip()])
        else:
            rows[-1][1] += f" {text.strip()}"
    rows = [[name, _cell(text.replace("``", "`"))] for name, text in rows]
    return RUN_FOLDER + table(("file", "what it holds"), rows).rstrip() + "\n"


def api_page() -> str:
    """The site shows in place of each comment what mkdocstrings makes of the docstring."""
    text = API
    for about, names in NAMES.items():
        rows = []
        for name, shown in names.items():
            file, documented = _definition(name)
            first = re.split(r"(?<=\.)\s|:\s", _line(documented).replace("``", "`"))[0]
            place = shown.partition("#")[0].rpartition("/")[2]
            where = f"[{place}]({shown})" if shown else ""
            rows.append(
                [f"[`{name}`](../../{file.relative_to(ROOT)})", _cell(first.rstrip(":,")), where]
            )
        text += f"## {about}\n\n{table(('name', 'what it is', 'shown in'), rows)}"
        text += "".join(f"<!-- ::: dpfast.{name} -->\n" for name in names) + "\n"
    return text.rstrip() + "\n"


def _definition(name: str) -> tuple[Path, str | None]:
    """Returns the file that defines a public name and its docstring, without importing it."""
    home = ROOT / dpfast._HOME[name].replace(".", "/")
    file = home.with_suffix(".py")
    for path in [file] if file.exists() else sorted(home.rglob("*.py")):
        for node in ast.parse(read_text(path)).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return path, ast.get_docstring(node)
    raise LookupError(name)


def _sections(parser: Any) -> Iterator[str]:
    """The sections of all commands below a parser, in the order of its help."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in dict.fromkeys(action.choices.values()):
                yield from _sections(command)
            return
    rows, of_recipe = [], False
    for action in parser._actions:
        of_recipe |= action.dest.startswith("field.")
        if not action.dest.startswith("field.") and action.dest != "help":
            value = "" if action.nargs == 0 else action.metavar or action.dest.upper()
            value = "|".join(map(str, action.choices)) if action.choices else str(value)
            name = min(action.option_strings, key=len) if action.option_strings else ""
            rows.append([_code(f"{name} {value}".strip()), _cell((action.help or "") % {})])
    yield f"## {parser.prog}\n\n{parser.description}\n\n    {parser.example}\n\n"
    if rows:
        yield table(("argument", "meaning"), rows)
    if of_recipe:
        yield "The options of [the recipe's fields](recipe.md) as well.\n\n"


def table(heads: Any, rows: Any) -> str:
    """A Markdown table of rows of cells, with an empty line after it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n"


def _row(full: str, option: Option) -> list[str]:
    default = option.unset or _code(option.default_text)
    values = option.expected.removesuffix(", or leave it out")
    if option.unit and (str(option.range) or values == "a text"):
        values += f" ({option.unit})"
    return [f"`{short_name(full)}`", *map(_cell, (values, default, option.help))]


def _said(option: Option, value: Any) -> str:
    if value == option.default:
        return ""
    return _code(option.text(value))


def _code(text: str) -> str:
    return f"`{_cell(text)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def errors_page() -> str:
    return str(runpy.run_path(str(Path(__file__).with_name("error_messages.py")))["page"]())


PAGES = {
    "recipe.md": recipe_page,
    "cli.md": cli_page,
    "api.md": api_page,
    "run_folder.md": run_folder_page,
    "errors.md": errors_page,
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
        print(FOLDER / name)
