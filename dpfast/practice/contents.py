"""The contents of the folders that a run was born with: a run that goes on may have moved them at
most.

contents.json   field -> what its folder holds: of the generator and a tiny decoder of its own the
                bytes of each file of weights and a checksum of each file of JSON, and where they
                are of the Hub their commit; of files of LoRA a checksum and the weight, of prompts
                a checksum of those of each class; of real images how many files each class has, of
                class counts and strengths the value of each class
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from pathlib import Path

from dpfast.config import Recipe
from dpfast.data import fashion
from dpfast.data.class_counts import count_rows
from dpfast.data.class_files import strength_rows
from dpfast.data.class_folders import sub_folders
from dpfast.data.pictures import pictures_in
from dpfast.data.real import is_fashion
from dpfast.errors import InputError, RecipeError
from dpfast.files import below, is_folder, there
from dpfast.generate.pipelines import hub
from dpfast.generate.pipelines.lora import LoraFile
from dpfast.pool.importing import saved_pool
from dpfast.pool.rank_folders import saved_folders
from dpfast.pool.shards import Manifest, durable
from dpfast.sources.reuse import CONTENTS
from dpfast.textfiles import read_json, to_json

OF_HUB = " of the Hub"


class UnknownContentsWarning(UserWarning):
    """A warning that a run was begun before its contents were noted."""


STRENGTHS = ("omega_classes", "anchor_classes")


def contents_of(recipe: Recipe) -> dict[str, dict[str, float | str]]:
    """Returns the table of ``CONTENTS``, by names and sizes: no weights and no images are read. {}
    for what is not there.
    """
    generator = recipe.generator
    found: dict[str, dict[str, float | str]] = {}
    for field, source, revision in (
        ("pipeline", generator.pipeline, generator.revision),
        ("tiny_decoder", generator.tiny_decoder, ""),
    ):
        with contextlib.suppress(hub.IncompleteError):
            found |= _models(field, hub.located(source, revision, field=field)) if source else {}
    with contextlib.suppress(hub.IncompleteError):
        files = [LoraFile.of(text) for text in generator.lora]
        if files:
            found["lora"] = {
                str(number): f"{_checksum(each.file.read_bytes())} times {each.weight:g}"
                for number, each in enumerate(files)
            }
    if generator.prompts and Path(generator.prompts).is_file():
        table = read_json(Path(generator.prompts))
        each = table.items() if isinstance(table, dict) else ()
        found["prompts"] = {name: _checksum(to_json(texts).encode()) for name, texts in each}
    counts = recipe.practice.class_counts
    if counts and Path(counts).is_file():
        found["class_counts"] = dict(count_rows(counts))
    for field in STRENGTHS:
        file = getattr(recipe.guidance, field)
        if file and Path(file).is_file():
            found[field] = dict(strength_rows(field, file))
    other = recipe.practice.pool_from
    if other and Path(other).is_dir() and (saved := saved_pool(Path(other))) is not None:
        found["pool_from"] = {
            f"{part.name}/{shard.name}": shard.sha256[:16]
            for part in saved_folders(saved)
            for shard in Manifest.read(part).shards
        }
    for field, place in (
        ("validation", recipe.validation),
        ("held_out", recipe.held_out),
        ("real", recipe.practice.real),
    ):
        if field != "real" and is_fashion(place):
            found[field] = {"fashion": 1}
        elif field == "real" and place and fashion.holds_split(Path(place), "train"):
            found[field] = {"Fashion-MNIST": 60000}
        elif place and Path(place).is_dir():
            found[field] = {
                entry.name: count
                for entry in sub_folders(Path(place))
                if (count := sum(1 for _ in pictures_in(entry)))
            }
    return found


def _models(field: str, folder: Path) -> dict[str, dict[str, float | str]]:
    """Returns the contents of a field's folder, and under "FIELD of the Hub" its commit there."""
    models: dict[str, float | str] = {}
    for file in below(folder) if is_folder(folder) else ():
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors" and there(file):
            models[name] = file.stat().st_size
        elif file.suffix == ".json" and there(file):
            models[name] = _checksum(file.read_bytes())
    commit = hub.commit_of(folder)
    return {field: models} | ({} if commit is None else {f"{field}{OF_HUB}": {"commit": commit}})


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


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
    for field in ("pipeline", "tiny_decoder"):
        if born.get(field + OF_HUB) and now.get(field + OF_HUB):
            now.pop(field)  # a commit says more than sizes; what it has may be there in part
    for field, place in (
        ("pipeline" + OF_HUB, recipe.generator.pipeline),
        ("tiny_decoder" + OF_HUB, recipe.generator.tiny_decoder),
        ("pipeline", recipe.generator.pipeline),
        ("tiny_decoder", recipe.generator.tiny_decoder),
        ("lora", ",".join(recipe.generator.lora)),
        ("prompts", recipe.generator.prompts),
        ("validation", recipe.validation),
        ("held_out", recipe.held_out),
        ("class_counts", recipe.practice.class_counts),
        *((field, getattr(recipe.guidance, field)) for field in STRENGTHS),
        ("real", recipe.practice.real),
        ("pool_from", recipe.practice.pool_from),
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
            f"{field.removesuffix(OF_HUB)} = {place!r}: holds other things than the run in "
            f"{str(run)!r} began with: {other[0]} is {value}, was {was}{more}"
        )
