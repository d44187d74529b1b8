"""The folder of a run: where its parts lie, and whether a run may begin or go on there.

recipe.json     the recipe in force, with every default filled in; born.json the first one, and
                changes.jsonl what changed in between (``dpfast.practice.changes``)
contents.json   what the folders of the generator and the real images held
                (``dpfast.practice.contents``)
objects.json    the kinds of the objects that the run was given in place of what its recipe says
                (``dpfast.config.objects``)
metrics.jsonl   one line per evaluation, addition and result; a function of the recipe alone, so
                without times
timings.jsonl   what was done how fast: a line per round, per interval between evaluations, per
                checkpoint and per training
events.*        the numbers of both for TensorBoard
tracking.json   what other trackers know the run by (``dpfast.practice.trackers``)
wandb/          what the tracker "wandb" keeps
logs/           the log of every rank (``dpfast.logs``)
pretrained/     what its learners began with, where the recipe names weights
                (``dpfast.learn.pretrained``)
learner_*       the evaluated weights of every source's classifier, safetensors
checkpoints_*/  the states of every source's loop (``dpfast.practice.checkpoint``)
pool_*/         every source's samples, webdataset shards with a manifest (``dpfast.pool.shards``),
                or a sub-folder of them for each rank
held_*/         the best candidates so far of a round that is being made (``dpfast.sources.held``)
progress_*      what is saved of a round that is being made
branch.json     where a branch began: run, round and iteration
.launch         which call of torchrun made it
index.html      the report of a finished run, with its plots and contact sheets as *.png
"""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import nn

from dpfast import launch
from dpfast.config import OBJECTS_FILE, RECIPE_FILE, Recipe
from dpfast.errors import InputError, RecipeError, SaveWarning, unsaved
from dpfast.files import listed, there
from dpfast.learn.pretrained import KEPT
from dpfast.parallel import ALONE, Ranks
from dpfast.pool.owner import owner_of
from dpfast.pool.rank_folders import rank_folder_name
from dpfast.pool.shards import durable
from dpfast.practice.callbacks import Callback
from dpfast.practice.changes import BORN, CHANGES, continued
from dpfast.practice.checkpoint import check_version
from dpfast.practice.contents import CONTENTS
from dpfast.practice.throughput import Throughput
from dpfast.textfiles import read_whole_json

SHARED = ".shared"  # what the first rank writes for the others to see
PARTS = (  # what a run's folder has before the first sample
    RECIPE_FILE,
    CHANGES,
    OBJECTS_FILE,
    "metrics.jsonl",
    "timings.jsonl",
    "events.*",
    "tracking.json",
    "wandb",
    KEPT,
    "logs",
    "checkpoints_*",
    "pool_*",
    SHARED,
    ".launch",
)
SEEN = 30.0  # seconds in which a network's file system shows it to them


class RunPaths:
    """The paths of the parts of a run's folder; every rank has its own for samples and progress.

    It writes none of the files that a run has once: those are the first rank's, whose paths are a
    ``RunWriter``.
    """

    writes = False  # whether this process writes the run's own files

    def __init__(self, path: Path, ranks: Ranks = ALONE) -> None:
        self.path, self.ranks = path, ranks

    def checkpoints(self, source: str) -> Path:
        """Returns the folder of the checkpoints of a source's loop."""
        return self.path / f"checkpoints_{source}"

    def pool(self, source: str) -> Path:
        """Returns the folder of a source's samples: one saved pool, or a folder of one for each
        rank.
        """
        return self.path / f"pool_{source}"

    def held(self, source: str) -> Path:
        """Returns the folder of what a source holds of a round that is being made."""
        return self.path / f"held_{source}"

    def progress(self, source: str) -> dict[str, Any] | None:
        """Returns the note that ``save_progress`` kept; None where there is nothing, or nothing
        that can be read.
        """
        kept = read_whole_json(self.path / self._progress(source))
        whole = isinstance(kept, dict) and all(
            isinstance(kept.get(name), kind)
            for name, kind in (("round", int), ("samples", int), ("source", dict))
        )
        return kept if whole else None

    def save_progress(self, source: str, progress: dict[str, Any]) -> None:
        """Notes what is saved of this rank's part of a round that is being made."""
        name = self._progress(source)
        with unsaved(f"{name} was not written"), durable(self.path, name) as file:
            file.write(json.dumps(progress).encode())

    def _progress(self, source: str) -> str:
        part = "" if self.ranks.alone else f"-{rank_folder_name(self.ranks)}"
        return f"progress_{source}{part}.json"

    def watchers(self, throughput: Throughput) -> Sequence[Callback]:
        """Returns the callbacks that write down what a loop tells."""
        return ()

    def keep_objects(self, objects: Mapping[str, str]) -> None:
        """Names the objects that the run was given in place of what its recipe says."""

    def keep_learner(self, new_learner: Callable[[], nn.Module]) -> None:
        """Keeps the weights that the run's learners begin with, where somebody has trained them."""

    def sync(self) -> None:
        """Makes the lines last that a checkpoint is to speak of; from any thread."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the lengths of the run's files of lines, for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Drops the lines that came after ``state``; all lines, where it is empty."""


def check_vacant(
    path: Path, recipe: Recipe, *, overwrite: bool = False, resume: bool = False
) -> Recipe:
    """Returns the recipe with which the run in ``path`` begins, or goes on.

    Raises ``InputError`` when ``path`` may not become, or continue, the folder of a run of
    ``recipe``: only a run is ever replaced, none in which a process still writes, and unasked only
    one that is ``unbegun``. What a run may change is in ``dpfast.practice.changes``.
    """
    for field in ("pool_from", "reuse"):
        other = getattr(recipe.practice, field)
        if other and path.resolve() in (Path(other).resolve(), *Path(other).resolve().parents):
            raise InputError(
                f"{field} = {other!r}: lies in the run's own folder, out = {str(path)!r}; expected "
                "another run's"
            )
    if resume:
        if not there(path / RECIPE_FILE):
            raise InputError(f"resume: {str(path)!r} holds no run")
        if recipe.pool.save_samples == "none":
            raise InputError(
                f"resume: {str(path)!r} has kept no samples (save_samples = 'none'); run it anew"
            )
        for folder in listed(path, "checkpoints_*"):
            check_version(folder)
        return continued(path, recipe)
    if not there(path) or (path.is_dir() and all(_early(p.name) for p in path.iterdir())):
        return recipe  # a run that was killed before it began
    if not there(path / RECIPE_FILE):
        raise InputError(f"out = {str(path)!r}: exists and holds no run; choose another folder")
    if not overwrite and not unbegun(path):
        raise InputError(
            f"out = {str(path)!r}: holds another run; "
            "--resume continues it, --overwrite replaces it (in Python resume=True, overwrite=True)"
        )
    living = owner_of(path)
    if living is not None:
        raise InputError(f"out = {str(path)!r}: {living} writes there")
    return recipe


def unbegun(path: Path) -> bool:
    """Returns True if a folder holds a run without any sample, as one that the disk refuses at its
    start, and nothing else.
    """
    metrics = path / "metrics.jsonl"
    return (
        metrics.is_file()
        and not metrics.stat().st_size
        and not any(path.glob("pool_*/**/*.tar"))
        and all(
            _early(p.name) or any(fnmatch(p.name, part) for part in PARTS) for p in path.iterdir()
        )
    )


def check_saving(recipe: Recipe, *, resume: bool, branch: bool) -> None:
    """Raises ``InputError`` where a run without saved samples would be asked to go on; warns of
    one that begins.
    """
    if recipe.pool.save_samples != "none":
        return
    again = launch.max_restarts()
    for asked, what in (
        (resume, "--resume"),
        (branch, "--branch-at"),
        (again, f"--max-restarts {again} of torchrun"),
    ):
        if asked:
            raise RecipeError(
                "save_samples = 'none': nothing is kept that "
                f"{what} could go on from; expected 'png'"
            )
    if not launch.rank():
        warnings.warn(
            "save_samples = 'none': no samples and no checkpoints are kept, so this run cannot be "
            "resumed, branched or "
            "exported, and the report has no errors by round",
            SaveWarning,
            stacklevel=2,
        )


def check_shared(out: Path, ranks: Ranks) -> None:
    """Raises ``InputError``, naming a rank and its host, unless all ranks see what the first one
    writes in ``out``.
    """
    if ranks.alone:
        return
    token = ranks.broadcast_object(f"{time.time_ns()} {os.getpid()}" if ranks.first else None)
    with ranks.all_or_none():
        if ranks.first:
            with durable(out, SHARED) as file:
                file.write(token.encode())
    with ranks.all_or_none():
        deadline = time.monotonic() + SEEN
        while not (out / SHARED).is_file() or (out / SHARED).read_text(encoding="utf-8") != token:
            if time.monotonic() > deadline:
                raise InputError(
                    f"out = {str(out)!r}: on {socket.gethostname()} it is not the folder in which "
                    "rank 0 writes; "
                    "expected one that all nodes share"
                )
            ranks.beat()
            time.sleep(0.1)


def _early(name: str) -> bool:
    """Returns True if a file may be there before a run's recipe is."""
    return name.startswith(".owner-") or name in (
        BORN,
        CONTENTS,
        *(f".{each}.tmp" for each in (BORN, CONTENTS, RECIPE_FILE)),
    )
