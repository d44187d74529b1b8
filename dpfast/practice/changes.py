"""The fields that a run may change when it goes on: one table for ``--resume`` and ``--branch-at``.

born.json       the recipe of the run's first command
recipe.json     the recipe in force
changes.jsonl   every change in between: when, after which optimiser steps, and each field's value
                before and after
"""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpfast.config import RECIPE_FILE, Generator, Recipe, flat, is_import_path, read_recipe
from dpfast.errors import InputError, RecipeError
from dpfast.files import there
from dpfast.generate.pipelines import hub
from dpfast.pool.shards import durable
from dpfast.practice.contents import STRENGTHS, check_contents, note_contents

BORN, CHANGES = "born.json", "changes.jsonl"

FREE = "free"  # a resumed run and a branch may have another value
BRANCH = "branch"  # a branch may, which takes no more samples
FIXED = "fixed"  # as the run was born

SAMPLES = (
    "it makes the samples: those of later rounds would "
    "be of another recipe than those that are there"
)
TRAINING = "the weights so far were trained by it"
DATES = "it decides when samples are added, and has decided so far"
ROUNDING = "it changes the rounding of what comes, no more"
MEMORY = "it decides where things lie, not what they are"
ANCHORS = ("anchor", "anchor_rounds", "anchor_classes")
GIVEN_AT_BIRTH = (  # or not, whatever they are called by now
    "held_out",
    "class_counts",
    "real",
    "pool_from",
    "pretrained",
    "tiny_decoder",
    "lora",
    "prompts",
    *STRENGTHS,
)
MOVED = "a folder may move, and holds what it held at birth (contents.json)"

RULES: dict[str, tuple[str, str]] = {
    # the recipe
    "name": (FREE, "a name"),
    "seed": (FIXED, "it is in every sample and every batch"),
    "device": (FREE, ROUNDING),
    "validation": (FREE, MOVED),
    "held_out": (
        FREE,
        MOVED
        + "; but with a folder all of the validation's images drive the run, without one half",
    ),
    "evaluation": (FREE, "it is measured at the end"),
    "callbacks": (FREE, "they hear of the run, and change nothing"),
    "trackers": (FREE, "they hear of the run, and change nothing"),
    # the generator
    "pipeline": (FREE, MOVED),
    "revision": (
        FREE,
        "a branch may move, and has the commit that it had at birth (contents.json)",
    ),
    "variant": (FIXED, SAMPLES),
    "tiny_decoder": (FREE, MOVED + "; but a run has one from its birth, or that of its pipeline"),
    "lora": (FREE, MOVED + "; but a run has them from its birth, or none"),
    "class_names": (FIXED, "it says what the labels mean"),
    "image_size": (FIXED, "the pool's images have one size"),
    "prompt_template": (FIXED, SAMPLES),
    "prompts": (FREE, MOVED + "; but a run has them from its birth, or none"),
    "negative_prompt": (FIXED, SAMPLES),
    "height": (FIXED, SAMPLES),
    "width": (FIXED, SAMPLES),
    "dtype": (FIXED, SAMPLES),
    "solver": (FIXED, SAMPLES),
    "steps": (FIXED, SAMPLES),
    "cfg_scale": (FIXED, SAMPLES),
    "cfg_interval": (FIXED, SAMPLES),
    "cfg_schedule": (FIXED, SAMPLES),
    "cache_interval": (FIXED, SAMPLES),
    "eta": (FIXED, SAMPLES),
    "generator.compile": (FREE, ROUNDING),
    "compile_region": (FREE, ROUNDING),
    "generator.batch_size": (
        FREE,
        "who holds which samples stays as it was born; the sampler's batches are not larger",
    ),
    "generator.micro_batch": (FREE, MEMORY),
    "attention": (FREE, ROUNDING),
    "channels_last": (FREE, ROUNDING),
    "fused": (FREE, ROUNDING),
    # guidance
    "omega": (FIXED, SAMPLES),
    "every": (FIXED, SAMPLES),
    "start": (FIXED, SAMPLES),
    "until": (FIXED, SAMPLES),
    "mode": (FIXED, SAMPLES),
    "through": (FIXED, SAMPLES),
    "criterion": (FIXED, SAMPLES),
    "guide_with": (FIXED, SAMPLES),
    "anchor": (FIXED, SAMPLES),
    "omega_schedule": (FIXED, SAMPLES),
    "anchor_schedule": (FIXED, SAMPLES),
    "omega_classes": (FREE, MOVED + "; but a run has one from its birth, or none"),
    "anchor_classes": (FREE, MOVED + "; but a run has one from its birth, or none"),
    # the learner
    "model": (FIXED, "its weights are in the checkpoint"),
    "options": (FIXED, "they shape the weights in the checkpoint"),
    "pretrained": (
        FREE,
        "the run's folder keeps those weights (pretrained); but a run has them from its birth, or "
        "none",
    ),
    "freeze": (FIXED, TRAINING),
    "classes": (FIXED, "they shape the weights in the checkpoint"),
    "learner.batch_size": (
        FIXED,
        "the order of training and the learning rate go with it; micro_batch takes less memory",
    ),
    "learner.micro_batch": (FREE, MEMORY),
    "activation_checkpointing": (FREE, MEMORY),
    "lr": (FIXED, TRAINING),
    "weight_decay": (FIXED, TRAINING),
    "betas": (FIXED, TRAINING),
    "layer_decay": (FIXED, TRAINING),
    "label_smoothing": (FIXED, TRAINING),
    "ema_decay": (FIXED, TRAINING),
    "evaluate_with": (FIXED, "the accuracies so far are of these weights"),
    "clip_grad_norm": (FIXED, TRAINING),
    "precision": (FIXED, TRAINING),
    "learner.compile": (FREE, ROUNDING),
    "warmup": (FIXED, TRAINING),
    "cooldown": (FIXED, "it says until when samples are added"),
    "flip": (FIXED, TRAINING),
    "shift": (FIXED, TRAINING),
    "crop": (FIXED, TRAINING),
    "rand_augment": (FIXED, TRAINING),
    "rand_magnitude": (FIXED, TRAINING),
    "augment": (FIXED, TRAINING),
    "erase": (FIXED, TRAINING),
    "aug_repeats": (FIXED, TRAINING),
    "mixup": (FIXED, TRAINING),
    "cutmix": (FIXED, TRAINING),
    "loader": (FREE, ROUNDING),
    "learner.seed": (FIXED, "it is in the weights and in every batch"),
    # the pool
    "codec": (FIXED, "the samples that are there are kept so"),
    "device_gib": (FREE, MEMORY),
    "host_gib": (FREE, MEMORY),
    "mapped": (FREE, MEMORY),
    "save_samples": (
        FIXED,
        "a saved pool has files of one kind, and JPEG is what the learner has seen",
    ),
    # practice
    "initial_samples": (FIXED, "they are there"),
    "round_samples": (FIXED, DATES),
    "maximum_samples": (BRANCH, "a run that has reached it would have gone on adding"),
    "maximum_rounds": (BRANCH, "a run that has reached it would have gone on adding"),
    "iterations": (
        FREE,
        "they may grow: the warm-up keeps its steps, "
        "and from the cool-down a run goes back before it",
    ),
    "evaluate_every": (FIXED, DATES),
    "evaluate_unit": (FIXED, DATES),
    "patience": (FIXED, DATES),
    "patience_growth": (FIXED, DATES),
    "add_at": (BRANCH, DATES),
    "omega_rounds": (FIXED, SAMPLES),
    "anchor_rounds": (FIXED, SAMPLES),
    "cfg_scale_rounds": (FIXED, SAMPLES),
    "every_rounds": (FIXED, SAMPLES),
    "start_rounds": (FIXED, SAMPLES),
    "until_rounds": (FIXED, SAMPLES),
    "through_rounds": (FIXED, SAMPLES),
    "criterion_rounds": (FIXED, SAMPLES),
    "fresh_weight": (FIXED, TRAINING),
    "allot": (FIXED, SAMPLES),
    "class_counts": (FREE, MOVED + "; but a run has one from its birth, or none"),
    "early_candidates": (FIXED, SAMPLES),
    "early_until": (FIXED, SAMPLES),
    "restart": (FIXED, SAMPLES),
    "oversample": (FIXED, SAMPLES),
    "prune_within": (FIXED, SAMPLES),
    "sources": (
        BRANCH,
        "other sources take sizes and moments from dp; run them into a folder of their own",
    ),
    "real": (FREE, MOVED + "; but a run has one from its birth, or none"),
    "mix_with": (FIXED, SAMPLES),
    "real_share": (FIXED, "they are there"),
    "real_in_batch": (FIXED, TRAINING),
    "pool_from": (FREE, MOVED + "; but a run has one from its birth, or none"),
    "pool_rounds": (FIXED, "they are there"),
    "reuse": (FREE, "the samples are the same, taken or made"),
    "yardstick_samples": (FREE, "it is measured against, and trains nothing"),
    "checkpoint_share": (FREE, "it says when is saved, not what"),
    "checkpoint_minutes": (FREE, "it says when is saved, not what"),
    "checkpoints_kept": (FREE, "it says how many are kept from now on"),
    "overlap": (FIXED, SAMPLES),
    "overlap_staleness": (FIXED, SAMPLES),
    "keep_rounds": (FREE, "it says what is kept from now on"),
}


def _with_commits(generator: Generator, born: dict[str, Any]) -> Generator:
    """Returns the generator with the commits that a run began with, wherever branches are now."""
    kept: dict[str, Any] = {}
    if not generator.revision and generator.pipeline == born.get("pipeline"):
        kept["revision"] = str(born.get("revision", ""))
    tiny, lora = str(born.get("tiny_decoder", "")), [str(text) for text in born.get("lora", ())]
    if generator.tiny_decoder == hub.without_commit(tiny):
        kept["tiny_decoder"] = tiny
    if [*generator.lora] == [hub.without_commit(text) for text in lora]:
        kept["lora"] = tuple(lora)
    return replace(generator, **kept)


def continued(run: Path, recipe: Recipe, *, branch: bool = False) -> Recipe:
    """Returns ``recipe`` as the run in ``run`` goes on with it: the layout of its samples and its
    warm-up are those of birth.

    Raises ``InputError`` where the folder holds no run. Raises ``RecipeError`` with every field
    that must stay as the run was born, and why, where iterations fell, and where a folder holds
    other things than at birth.
    """
    if not there(run / RECIPE_FILE):
        raise InputError(f"{'branch_from' if branch else 'resume'} = {str(run)!r}: holds no run")
    born, now = _read(run, BORN), _read(run, RECIPE_FILE)
    recipe = replace(recipe, generator=_with_commits(recipe.generator, born))
    leaves, branch = branch, branch or (run / "branch.json").is_file()
    allowed = {
        name for name, (kind, _) in RULES.items() if kind == FREE or (branch and kind == BRANCH)
    }
    asked = _flat(recipe)
    if not any(each.get(name) for each in (asked, born) for name in ANCHORS):
        allowed.add("anchor_schedule")  # of no anchor
    refused = [
        f"{name} = {asked.get(name)!r} was {born.get(name)!r} ({_rule(name)})"
        for name in sorted(asked.keys() | born.keys())
        if asked.get(name) != born.get(name) and name not in allowed
    ]
    refused += [
        f"{name} = {asked[name]!r} was {born.get(name, '')!r} ({_rule(name)})"
        for name in GIVEN_AT_BIRTH
        if bool(asked[name]) != bool(born.get(name))
    ]
    loaders = {str(asked["loader"]), str(born.get("loader", asked["loader"]))}
    if len(loaders) > 1 and any(map(is_import_path, loaders)):
        refused.append(f"loader = {asked['loader']!r} was {born['loader']!r} ({TRAINING})")
    if not leaves and recipe.practice.iterations < now["iterations"]:
        refused.append(
            f"iterations = {recipe.practice.iterations} was {now['iterations']} "
            f"({RULES['iterations'][1]})"
        )
    if refused:
        whose = (
            "a branch has its run's recipe"
            if leaves
            else f"the run in {str(run)!r} has another recipe"
        )
        raise RecipeError(
            f"{f'branch_from = {str(run)!r}' if leaves else 'resume'}: {whose}: "
            f"{'; '.join(refused)}"
        )
    check_contents(run, recipe)
    generator, learner = recipe.generator, recipe.learner
    if generator.batch_size != born["generator.batch_size"]:
        most = min(generator.micro_batch or generator.batch_size, born["generator.batch_size"])
        generator = replace(generator, batch_size=born["generator.batch_size"], micro_batch=most)
    iterations, warm = recipe.practice.iterations, born["warmup"] * born["iterations"]
    if iterations != born["iterations"]:
        if warm + learner.cooldown * iterations > iterations:
            raise RecipeError(
                f"iterations = {iterations}: the run's "
                f"warm-up took {warm:.0f}, before the cool-down"
            )
        learner = replace(learner, warmup=warm / iterations)
    return replace(recipe, generator=generator, learner=learner)


def _rule(name: str) -> str:
    """Returns the reason why a field stays as it is."""
    return RULES[name][1] if name in RULES else "this dpfast knows no such field"


def write_recipe(run: Path, recipe: Recipe, *, born: str | None = None) -> None:
    """Begins the folder of a run. born: the text of another run's ``BORN``, whose branch it is."""
    note_contents(run, recipe)
    text = json.dumps(recipe.to_dict(), indent=2) + "\n"
    # the recipe last: it makes a folder a run
    for name, words in (
        (BORN, born or text),
        (RECIPE_FILE, text),
    ):
        with durable(run, name) as file:
            file.write(words.encode())


def record_changes(run: Path, recipe: Recipe, steps: dict[str, int]) -> dict[str, list[Any]]:
    """Puts ``recipe`` in force for the run and notes what changes: each field's value before and
    after, returned.

    steps: of its sources' checkpoints.
    """
    before, now = _read(run, RECIPE_FILE), _flat(recipe)
    changes = {
        name: [before.get(name), now.get(name)]
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }
    if not changes:
        return changes
    if not (run / BORN).is_file():
        with durable(run, BORN) as file:
            file.write((run / RECIPE_FILE).read_bytes())
    moment = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    with (run / CHANGES).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"time": moment, "steps": steps, "changes": changes}) + "\n")
    with durable(run, RECIPE_FILE) as file:
        file.write(json.dumps(recipe.to_dict(), indent=2).encode() + b"\n")
    return changes


def _read(run: Path, name: str) -> dict[str, Any]:
    """Returns the fields of a recipe in a run's folder; one that was never changed is as it was
    born.

    Raises ``InputError`` with the path where a number is missing that the run goes on with.
    """
    path = run / name if (run / name).is_file() else run / RECIPE_FILE
    found = flat(read_recipe(path))
    for field in ("iterations", "warmup", "generator.batch_size"):
        if type(found.get(field)) not in (int, float):
            raise InputError(f"{path}: {field} = {found.get(field)!r}: expected a number")
    return found


def _flat(recipe: Recipe) -> dict[str, Any]:
    return flat(json.loads(json.dumps(recipe.to_dict())))
