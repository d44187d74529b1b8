"""Unguided samples that another run has saved, in place of making them again.

A sample is a function of its id, its label, the generator's settings and the seed. A larger run of
the source "static" so makes only what a smaller one has not saved, and a run of another learner
nothing. Guided samples depend on their learner and are never taken.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpfast.config import OBJECTS_FILE, RECIPE_FILE, Recipe, flat, read_recipe, short_name
from dpfast.errors import InputError, RecipeError
from dpfast.files import listed, there
from dpfast.pool.rank_folders import saved_folders
from dpfast.pool.shards import DamagedPoolError, LostSamplesWarning
from dpfast.pool.stored import OnDisk
from dpfast.sources.labels import LabelOrder
from dpfast.textfiles import lines, read_text, read_whole_json

CONTENTS = "contents.json"  # of a run's folder: what its generator's folder held
# field -> what of that says whether it makes the same samples; a commit says more than sizes
HELD = {"pipeline": ("pipeline of the Hub", "pipeline"), "lora": ("lora",), "prompts": ("prompts",)}
# fields of [generator] that do not: folders, which may move (HELD says what they hold), what
# guides, and what changes the rounding; cfg_scale is looked at by sample
FREE = {"pipeline", "revision", "tiny_decoder", "lora", "prompts", "cfg_scale", "batch_size"}
FREE |= {"micro_batch", "compile", "compile_region", "attention", "channels_last", "fused"}
# source -> whether the samples of all rounds are functions of their ids, or those of round 0 alone:
# where some classes are not guided, the others' guide may still have chosen. What "real", "pool"
# and sources of the user's own hold, other things have made
SOURCES = {"static": True, "prune": True, "dynamic": True, "dp": False, "mix": False}


class ReusedSamples:
    """The unguided samples of a run's saved pools, by id.

    They are those of the pools of ``SOURCES``, and of pixels that are kept exactly: latents and
    JPEG give back other images than were made. A sample counts where its seed, its steps and its
    label are those of this run and nothing has guided it. A damaged shard is named in a
    ``LostSamplesWarning``, and its samples are made again.

    run: its folder. recipe, labels: of this run; contents: what its folders hold (``CONTENTS``).
    ``seconds``: that a sample took there, 0 where it is not known.

    Raises ``InputError`` for a folder that is no run or has saved no pixels, ``RecipeError`` with
    the first field that would make other samples.
    """

    def __init__(
        self,
        run: str,
        recipe: Recipe,
        labels: LabelOrder,
        *,
        contents: dict[str, Any],
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        folder = Path(run)
        sources = _saved(run)
        _check_same(run, recipe, contents)
        pools = _pools(run, sources, beat)
        self._pools = list(pools.values())
        found = [
            _unguided(pool.records, number, recipe, labels, every=SOURCES[source])
            for number, (source, pool) in enumerate(pools.items())
        ]
        known = np.concatenate(found)
        _, first = np.unique(known["id"], return_index=True)
        self._known = known[first]  # by rising id, each once
        self.seconds = _seconds(folder)

    def __len__(self) -> int:
        return len(self._known)

    def images(self, ids: Tensor, cfg_scale: float) -> Tensor | None:
        """Returns (n, C, H, W) uint8 of the samples ``ids`` (n,), made with ``cfg_scale``; None
        unless all of them are there.
        """
        asked = ids.numpy()
        places = np.searchsorted(self._known["id"], asked)
        if not len(self._known) or places.max(initial=0) >= len(self._known):
            return None
        rows = self._known[places]
        same = (rows["id"] == asked) & (rows["cfg_scale"] == np.float32(cfg_scale))
        if not same.all():
            return None
        images: Tensor | None = None
        for number in np.unique(rows["pool"]).tolist():
            chosen = np.flatnonzero(rows["pool"] == number)
            try:
                part = self._pools[number].payload(rows["row"][chosen])
            except DamagedPoolError as error:
                warnings.warn(
                    f"reuse: {error}; its samples are made again", LostSamplesWarning, stacklevel=2
                )
                self._known = self._known[self._known["pool"] != number]
                return None
            assert isinstance(part, Tensor)
            if images is None:
                images = part.new_empty(len(asked), *part.shape[1:])
            images[torch.from_numpy(chosen)] = part
        return images


def count_known(recipe: Recipe) -> int:
    """Counts the first unguided samples that the recipe's ``reuse`` has saved, for a plan; whether
    the generator is the same is not looked at.
    """
    run = recipe.practice.reuse
    if not run:
        return 0
    found = [
        pool.records["sample_id"][_made_so(pool.records, recipe, every=SOURCES[source])]
        for source, pool in _pools(run, _saved(run)).items()
    ]
    ids = np.unique(np.concatenate(found))
    return int(np.argmin(np.append(ids, -1) == np.arange(len(ids) + 1)))


KNOWN = np.dtype([("id", "<i8"), ("row", "<i8"), ("pool", "<i4"), ("cfg_scale", "<f4")])


def _unguided(
    records: np.ndarray, number: int, recipe: Recipe, labels: LabelOrder, *, every: bool
) -> np.ndarray:
    """Returns ``KNOWN`` of the records of a pool that this run would make just so."""
    expected = labels.of(torch.from_numpy(records["sample_id"].astype(np.int64))).numpy()
    rows = np.flatnonzero(_made_so(records, recipe, every=every) & (records["label"] == expected))
    known = np.empty(len(rows), KNOWN)
    known["id"], known["row"], known["pool"] = records["sample_id"][rows], rows, number
    known["cfg_scale"] = records["cfg_scale"][rows]
    return known


def _made_so(records: np.ndarray, recipe: Recipe, *, every: bool) -> np.ndarray:
    """Returns (n,) bool: which records are of unguided samples of this recipe's seed and steps.
    every: whether those of all rounds count (``SOURCES``).
    """
    return (
        (records["omega"] == 0)
        & (records["seed"] == recipe.seed)
        & (records["steps"] == recipe.generator.steps)
        & (every | (records["round"] == 0))
    )


def _saved(run: str) -> dict[str, Path]:
    """Maps the ``SOURCES`` of a run to their saved pools. Raises ``InputError`` for a folder that
    is none, or has none.
    """
    folder = Path(run)
    if not there(folder / RECIPE_FILE):
        raise InputError(f"reuse = {run!r}: not the folder of a run, it has no {RECIPE_FILE}")
    saved = {path.name.removeprefix("pool_"): path for path in listed(folder, "pool_*")}
    found = {source: saved[source] for source in SOURCES if source in saved}
    found = {source: path for source, path in found.items() if saved_folders(path)}
    if not found:
        raise InputError(
            f"reuse = {run!r}: the run has saved no samples of the sources {', '.join(SOURCES)}"
        )
    return found


def _pools(
    run: str, saved: dict[str, Path], beat: Callable[[], None] = lambda: None
) -> dict[str, OnDisk]:
    """Maps the sources that keep exact pixels to their pools. Raises ``InputError`` where none
    does.
    """
    pools = {source: OnDisk(path, beat=beat) for source, path in saved.items()}
    exact = {source: pool for source, pool in pools.items() if pool.codec == "pixels"}
    if not exact:
        codec = next(iter(pools.values())).codec
        raise InputError(
            f"reuse = {run!r}: its samples are kept as {codec}, which are not the pixels that were "
            "made; expected a run with codec = 'pixels' and save_samples = 'png' or 'npy'"
        )
    return exact


def _check_same(run: str, recipe: Recipe, contents: dict[str, Any]) -> None:
    """Raises ``RecipeError`` with the first field in which a run's generator differs."""
    theirs = flat(Recipe.from_dict(read_recipe(Path(run) / RECIPE_FILE)).to_dict())
    mine = flat(recipe.to_dict())
    fields = (each.name for each in dataclasses.fields(recipe.generator) if each.name not in FREE)
    for name in ("seed", *(short_name(f"generator.{each}") for each in fields)):
        if theirs[name] != mine[name]:
            raise RecipeError(
                f"reuse = {run!r}: {name} = {_shown(theirs[name])} there, {_shown(mine[name])} "
                "here; expected samples of the same generator"
            )
    given = read_whole_json(Path(run) / OBJECTS_FILE)
    if isinstance(given, dict) and "pipeline" in given:
        raise InputError(
            f"reuse = {run!r}: its generator was an object of the caller's, {given['pipeline']}; "
            "expected one of a folder"
        )
    born = read_whole_json(Path(run) / CONTENTS)
    held = born if isinstance(born, dict) else {}
    for name, kinds in HELD.items():
        # the first kind that both know; without one the fields themselves
        known = [kind for kind in kinds if held.get(kind) and contents.get(kind)]
        there_now, here = theirs[name], mine[name]
        if known:
            there_now, here = held[known[0]], contents[known[0]]
        if there_now != here:
            raise RecipeError(
                f"reuse = {run!r}: {name} = {theirs[name]!r} there holds other things than "
                f"{mine[name]!r} here; expected samples of the same generator"
            )


def _shown(value: object) -> str:
    listed_values = isinstance(value, (tuple, list))
    text = ",".join(map(str, value)) if isinstance(value, Sequence) and listed_values else value
    return repr(text)


def _seconds(folder: Path) -> float:
    """Returns seconds that an initial sample took in a run, by its timings; 0 where they are not
    there.
    """
    path = folder / "timings.jsonl"
    made, seconds = 0.0, 0.0
    for line in lines(read_text(path)) if there(path) else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # cut short by a kill
            continue
        if isinstance(row, dict) and row.get("event") == "generation" and row.get("round") == 0:
            count, took = row.get("made"), row.get("seconds")
            if isinstance(count, (int, float)) and isinstance(took, (int, float)):
                made, seconds = made + count, seconds + took
    return seconds / made if made else 0.0
