"""``dpfast sample``: images of given classes, guided or not, under one setting or several."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from dpfast.cli import Next, vacant, without
from dpfast.cli.parser import Commands, add_command
from dpfast.cli.recipes import (
    add_fields,
    folder_words,
    guiding_words,
    recipe_of,
    recipe_words,
)
from dpfast.config import Recipe, fields
from dpfast.config.kinds import joined, parted
from dpfast.errors import InputError
from dpfast.extras import require
from dpfast.textfiles import to_json

# A learner guides as it was saved, in one stream of batches that finds its size and whether
# compiling pays.
STRENGTHS = ("guidance.omega", "guidance.anchor")  # of which several may be given
ELSEWHERE = (*STRENGTHS, "guidance.guide_with", "generator.compile")
OWN = ("seed", "device")
EMBEDDED = "fashion"  # the recipe and its generator
FIELDS = [
    name
    for name in fields()
    if name in OWN or (name.startswith(("generator.", "guidance.")) and name not in ELSEWHERE)
]


def add(commands: Commands) -> None:
    usage = "dpfast sample --labels LABEL,... --out FOLDER [--OPTION VALUE ...]"
    parser = add_command(
        commands,
        "sample",
        sample,
        "write images of given classes",
        example="dpfast sample --labels 0,1 --omega 0,0.12 --out samples",
        page="guides/embed_sampler.md",
        usage=usage,
    )
    parser.add_argument(
        "--labels",
        required=True,
        metavar="LABEL,...",
        help="class ids or names, one with commas between double quotes "
        "('\"bonnet, poke bonnet\",3'), or all; to be given",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder for the PNG files, empty or new; to be given",
    )
    parser.add_argument(
        "--count", type=int, default=8, metavar="N", help="images of each label (default: 8)"
    )
    parser.add_argument(
        "--guidance.omega",
        "--omega",
        dest="omega",
        default="0",
        metavar="X,...",
        help="strength of guidance, or several, the same samples with each in a folder of its own "
        "and all in grid.png (default: 0, unguided)",
    )
    parser.add_argument(
        "--guidance.anchor",
        "--anchor",
        dest="anchor",
        metavar="X,...",
        help=f"{fields()['guidance.anchor'].help}; or several, as of --omega (default: the "
        "recipe's; 0 for another generator than that of the default recipe)",
    )
    parser.add_argument(
        "--learner",
        metavar="FOLDER",
        help="folder of the run whose learner guides, finished or not (default: the embedded judge "
        "network)",
    )
    parser.add_argument(
        "--at",
        metavar="MOMENT,...",
        help="which learner of the run, or several, as of --omega: 2 for the end of round 2, which "
        "--keep-rounds keeps, step-N for any checkpoint that is there, newest (default: newest, "
        "the end of a finished run)",
    )
    parser.add_argument(
        "--trajectory",
        action="store_true",
        help="write trajectory.png as well: the image that each step predicts",
    )
    parser.add_argument(
        "--recipe",
        default=EMBEDDED,
        metavar="RECIPE",
        help="the recipe whose [generator] and [guidance] hold (default: fashion)",
    )
    add_fields(parser, FIELDS)


def sample(arguments: argparse.Namespace) -> Next:
    recipes = _recipes(arguments)
    recipe = recipes[0]
    guided = any(each.guidance.omega or each.guidance.omega_classes for each in recipes)
    if arguments.count < 1:
        raise InputError(f"count = {arguments.count}: expected at least 1")
    require("matplotlib")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise InputError(f"out = {str(arguments.out)!r}: exists and is not an empty folder")
    if not guided:
        _check_unguided(arguments)
    if arguments.at is not None and arguments.learner is None:
        raise InputError(f"at = {arguments.at!r}: names the learner of a run; say --learner RUN")
    recipe.need_folders("pipeline")

    from dpfast.generate.from_recipe import fetched, load_pipeline, new_sampler
    from dpfast.hardware.device import device_named
    from dpfast.learn.models import load_learner
    from dpfast.practice.saved_learners import NEWEST, saved_learners
    from dpfast.report.cells import cells_of, write_cells

    generator = fetched(recipe.generator)
    pipeline = load_pipeline(generator, device=device_named(recipe.device))
    labels = _labels(arguments.labels, pipeline.class_names)
    learner, saved = None, []
    if guided and arguments.learner is None:
        learner = load_learner(None, pipeline)
    elif guided:
        moments = (NEWEST,) if arguments.at is None else _members(arguments.at)
        saved = saved_learners(Path(arguments.learner), pipeline, moments)
        learner = saved[0].module
    cells = cells_of([each.guidance for each in recipes], pipeline.class_names, saved)
    sampler, stepwise = new_sampler(recipe, pipeline, learner, compile="auto"), None
    if arguments.trajectory:  # of so few samples that nothing is prepared for them
        stepwise = new_sampler(recipe, pipeline, learner, compile=False, cuda_graphs=False)
    pictures = write_cells(
        cells, sampler, labels, arguments.count, arguments.out, stepwise=stepwise
    )
    made = _settings(recipe, len(cells) > 1)
    made["learner"] = (arguments.learner or "the embedded judge") if guided else None
    made["cells"] = [cell.described(cells) for cell in cells]
    settings = arguments.out / "settings.json"
    settings.write_text(to_json(made) + "\n", encoding="utf-8")
    count = f"{len(labels) * arguments.count} images"
    if len(cells) > 1:
        count += f" under each of {len(cells)} settings"
    print(f"{count} in {arguments.out}, overview {', '.join(map(str, pictures))}")
    return _next(arguments, recipe, guided=guided)


def _next(arguments: argparse.Namespace, recipe: Recipe, *, guided: bool) -> Next:
    """Returns the next commands: the same samples guided; after those a learner that guides, or the
    page of the one that did.
    """
    out = arguments.out
    if not guided:
        words = without(arguments.words, "--out", "--omega", "--guidance.omega")
        guided_out = str(vacant(out.with_name(f"{out.name}-guided")))
        words += [*guiding_words(arguments, recipe), "--out", guided_out]
        if recipe.generator.pipeline != Recipe().generator.pipeline:  # no embedded judge knows it
            words += ["--learner", "FOLDER"]
            return Next(("the same samples, guided by the learner of a run", ["dpfast", *words]))
        return Next(("the same samples, guided as well", ["dpfast", *words]))
    if arguments.learner is None:
        words = [*recipe_words(arguments), *folder_words(recipe)]
        return Next(("a learner of your own that guides", ["dpfast", "run", *words]))
    return Next(("the page of the run that guided", ["dpfast", "report", arguments.learner]))


def _settings(recipe: Recipe, several: bool) -> dict[str, Any]:
    """Returns the settings that all samples share; of ``several`` strengths each cell has its
    own.
    """
    whole = recipe.to_dict()
    made = {name: whole[name] for name in ("seed", "generator", "guidance")}
    if several:
        strengths = [name.rpartition(".")[2] for name in STRENGTHS]
        made["guidance"] = {k: v for k, v in made["guidance"].items() if k not in strengths}
    return made


def _recipes(arguments: argparse.Namespace) -> list[Recipe]:
    """Returns the recipe with each omega and anchor that are given. Raises ``InputError`` for a
    value that is given twice.
    """
    given = {"omega": arguments.omega, "anchor": arguments.anchor}
    pipeline = recipe_of(arguments, omega="0").generator.pipeline
    if given["anchor"] is None and arguments.recipe == EMBEDDED != pipeline:
        given["anchor"] = "0"  # the recipe's is for the generator that it names
    texts = {name: _members(text) for name, text in given.items() if text is not None}
    recipes = [
        recipe_of(arguments, **dict(zip(texts, values, strict=True)))
        for values in itertools.product(*texts.values())
    ]
    for name, members in texts.items():
        if len({getattr(recipe.guidance, name) for recipe in recipes}) < len(members):
            raise InputError(f"{name} = {given[name]!r}: names a value twice")
    return recipes


def _members(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _check_unguided(arguments: argparse.Namespace) -> None:
    """Raises ``InputError`` for what was given and says how to guide, where nothing is guided."""
    given = {name: getattr(arguments, name) for name in ("learner", "at", "anchor")} | {
        key.removeprefix("field.guidance."): value
        for key, value in vars(arguments).items()
        if key.startswith("field.guidance.")
    }
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name} = {value!r}: guides only with omega, which is 0")


def _labels(text: str, names: tuple[str, ...]) -> list[int]:
    if text == "all":
        return list(range(len(names)))
    from dpfast.data.class_folders import ClassNames, text_of

    classes = ClassNames(names)
    labels = []
    try:
        parts = parted(text)
    except ValueError:
        raise InputError(f"labels = {text!r}: expected quotes around whole names") from None
    for part in parts:
        found = classes.called(text_of(part))
        if len(found) > 1:
            raise InputError(f"labels = {part!r}: may be any of {classes.several(found)}")
        if not found:
            quoted = joined([text.strip()])
            if len(parts) > 1 and classes.called(text_of(text.strip())):
                raise InputError(f"labels = {text!r}: a name with commas is quoted: {quoted!r}")
            raise InputError(
                f"labels = {part!r}: expected 0 to {len(names) - 1}, 'all', or one of: "
                f"{joined(names)}"
            )
        labels += found
    return labels
