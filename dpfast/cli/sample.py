"""``dpfast sample``: images of given classes, guided or not."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpfast.cli.parser import Commands, add_command
from dpfast.cli.recipes import add_fields, recipe_of
from dpfast.config import fields
from dpfast.errors import InputError
from dpfast.extras import require
from dpfast.textfiles import to_json

# A learner guides as it was saved, in one stream of batches that finds its size and whether
# compiling pays.
ELSEWHERE = ("guidance.omega", "guidance.guide_with", "generator.compile")
OWN = ("seed", "device")
FIELDS = [
    name
    for name in fields()
    if name in OWN or (name.startswith(("generator.", "guidance.")) and name not in ELSEWHERE)
]


def add(commands: Commands) -> None:
    usage = "dpfast sample --labels LABEL,... --out FOLDER [--OPTION VALUE ...]"
    parser = add_command(commands, "sample", sample, "write images of given classes", usage=usage)
    parser.add_argument(
        "--labels",
        required=True,
        metavar="LABEL,...",
        help="class ids or names, or all; to be given",
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
        metavar="X",
        help="strength of guidance (default: 0, unguided)",
    )
    parser.add_argument(
        "--learner",
        metavar="FOLDER",
        help="folder of the run whose learner guides (default: the embedded judge network)",
    )
    parser.add_argument(
        "--recipe",
        default="fashion",
        metavar="RECIPE",
        help="the recipe whose [generator] and [guidance] hold (default: fashion)",
    )
    add_fields(parser, FIELDS)


def sample(arguments: argparse.Namespace) -> int:
    recipe = recipe_of(arguments, omega=arguments.omega)
    omega = recipe.guidance.omega
    if arguments.count < 1:
        raise InputError(f"count = {arguments.count}: expected at least 1")
    require("matplotlib")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise InputError(f"out = {str(arguments.out)!r}: exists and is not an empty folder")
    if not omega:
        _check_unguided(arguments)
    recipe.need_folders("pipeline")

    from dpfast.generate.from_recipe import fetched, load_pipeline, new_sampler
    from dpfast.hardware.device import device_named
    from dpfast.learn.models import load_learner
    from dpfast.report.samples import write_samples

    generator = fetched(recipe.generator)
    pipeline = load_pipeline(generator, device=device_named(recipe.device))
    labels = _labels(arguments.labels, pipeline.class_names)
    learner = load_learner(arguments.learner, pipeline) if omega else None
    ordered = [label for label in labels for _ in range(arguments.count)]
    sampler = new_sampler(recipe, pipeline, learner, compile="auto")
    batches = sampler.stream(ordered)
    sheet = write_samples(batches, pipeline.class_names, arguments.out)
    whole = recipe.to_dict()
    made = {name: whole[name] for name in ("seed", "generator", "guidance")}
    made["learner"] = (arguments.learner or "the embedded judge") if omega else None
    (arguments.out / "settings.json").write_text(to_json(made) + "\n", encoding="utf-8")
    print(f"{len(ordered)} images in {arguments.out}, overview {sheet}")
    return 0


def _check_unguided(arguments: argparse.Namespace) -> None:
    """Raises ``InputError`` for what was given and says how to guide, where nothing is guided."""
    given = {"learner": arguments.learner} | {
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
    for part in (p.strip() for p in text.split(",")):
        found = classes.called(text_of(part))
        if len(found) > 1:
            raise InputError(f"labels = {part!r}: may be any of {classes.several(found)}")
        if not found:
            raise InputError(
                f"labels = {part!r}: expected 0 to {len(names) - 1}, 'all', or one of: "
                f"{', '.join(names)}"
            )
        labels += found
    return labels
