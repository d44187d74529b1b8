"""What was in the folders that a run was born with, so that one that goes on has moved folders at
most.

contents.json   field -> what its folder holds: of the generator the bytes of each file of weights
                and a checksum of
                each file of JSON, of real images how many files each class has, of class counts
                the count of each class
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

from dpfast.config import Recipe, pipeline_folder
from dpfast.data.class_counts import count_rows
from dpfast.data.class_folders import sub_folders
from dpfast.data.pictures import pictures_in
from dpfast.data.real import is_fashion
from dpfast.errors import InputError, RecipeError
from dpfast.files import below
from dpfast.pool.shards import durable
from dpfast.textfiles import read_json

CONTENTS = "contents.json"


class UnknownContentsWarning(UserWarning):
    """A run was begun before its contents were noted."""


def contents_of(recipe: Recipe) -> dict[str, dict[str, int | str]]:
    """The table of ``CONTENTS``, by names and sizes: no weights and no images are read. {} for what
    is not there.
    """
    generator: dict[str, int | str] = {}
    folder = pipeline_folder(recipe.generator.pipeline)
    for file in below(folder) if (folder / "model_index.json").is_file() else ():
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            generator[name] = file.stat().st_size
        elif file.suffix == ".json":
            generator[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    found: dict[str, dict[str, int | str]] = {"pipeline": generator}
    counts = recipe.practice.class_counts
    if counts and Path(counts).is_file():
        found["class_counts"] = dict(count_rows(counts))
    for field, place in (("validation", recipe.validation), ("held_out", recipe.held_out)):
        if is_fashion(place):
            found[field] = {"fashion": 1}
        elif place and Path(place).is_dir():
            found[field] = {
                entry.name: count
                for entry in sub_folders(Path(place))
                if (count := sum(1 for _ in pictures_in(entry)))
            }
    return found


def note_contents(run: Path, recipe: Recipe) -> None:
    """Keeps ``contents_of`` the recipe in the folder of a run that begins."""
    with durable(run, CONTENTS) as file:
        file.write(json.dumps(contents_of(recipe), indent=2).encode() + b"\n")


def check_contents(run: Path, recipe: Recipe) -> None:
    """Raises ``RecipeError`` where a folder of ``recipe`` holds other things than the run in
    ``run`` was born with.

    A folder that is not there is left to those who read it. Warns where the run is older than
    ``CONTENTS``.
    """
    if not (run / CONTENTS).is_file():
        warnings.warn(
            f"{str(run)!r} was begun without {CONTENTS}: that generator and images are still the "
            "same is up to you",
            UnknownContentsWarning,
            stacklevel=2,
        )
        return
    born = read_json(run / CONTENTS)
    if not isinstance(born, dict) or not all(isinstance(each, dict) for each in born.values()):
        raise InputError(f"{run / CONTENTS}: expected a table of what each folder held")
    now = contents_of(recipe)
    for field, place in (
        ("pipeline", recipe.generator.pipeline),
        ("validation", recipe.validation),
        ("held_out", recipe.held_out),
        ("class_counts", recipe.practice.class_counts),
    ):
        before = born.get(field)
        found = now.get(field)
        if not before or not found or before == found:
            continue
        other = sorted(
            name for name in before.keys() | found.keys() if before.get(name) != found.get(name)
        )
        was, value = (each.get(other[0], "not there") for each in (before, found))
        more = f", and {len(other) - 1} more differ" if len(other) > 1 else ""
        raise RecipeError(
            f"{field} = {place!r}: holds other things than the run in {str(run)!r} began with: "
            f"{other[0]} is {value}, was {was}{more}"
        )
