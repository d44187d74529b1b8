"""Paths that no file system takes, or that lead nowhere, wherever a caller names one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dpfast.config import Recipe
from dpfast.data.folders import open_folder
from dpfast.data.real import RealSet, check_real, load_real
from dpfast.evaluate.sets import evaluation_sets
from dpfast.generate.pipelines.folder import PipelineFolder
from dpfast.learn.models import load_learner
from dpfast.pool.importing import import_pool
from dpfast.pool.reader import open_pool
from dpfast.report.runs import read_run
from tests.bad_inputs.case import Case, listed
from tests.bad_inputs.learners import pipeline

SET = RealSet(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.arange(2))
CLASSES = ("cat", "dog")
DOORS: dict[str, Callable[[str], Any]] = {
    "recipe": lambda path: Recipe.load(path + ".toml"),
    "folder": lambda path: open_folder(Path(path), CLASSES, (1, 8, 8), ids=None),
    "validation": lambda path: load_real(path, classes=CLASSES, shape=(1, 8, 8)),
    "held-out": lambda path: check_real("fashion", path),
    "evaluation": lambda path: evaluation_sets([path], SET, CLASSES),
    "named-evaluation": lambda path: evaluation_sets([f"mine={path}"], SET, CLASSES),
    "pipeline": PipelineFolder,
    "pool": lambda path: open_pool(path),
    "import": lambda path: import_pool(Path(path)),
    "run": lambda path: read_run(Path(path)),
    "learner": lambda path: load_learner(path, pipeline()),
}
PATHS: dict[str, Callable[[Path], str]] = {
    "long": lambda folder: str(folder / ("x" * 5000)),
    "deep": lambda folder: str(folder) + "/x" * 5000,
    "null-byte": lambda folder: str(folder / "a\0b"),
    "line-feed": lambda folder: str(folder / "a\nb"),
    "no-unicode": lambda folder: str(folder / "a\udce9b"),
    "circle": lambda folder: _link(folder / "circle", folder / "circle"),
    "dead-link": lambda folder: _link(folder / "dead", folder / "gone"),
    "in-a-file": lambda folder: str(_file(folder / "file") / "inside"),
}


def _link(path: Path, target: Path) -> str:
    path.symlink_to(target)
    return str(path)


def _file(path: Path) -> Path:
    path.write_bytes(b"x")
    return path


def door(given: tuple[str, str], random: random.Random, folder: Path) -> Case:
    name, path = DOORS[given[0]], PATHS[given[1]](folder)
    return Case(lambda: name(path), (ascii(path)[1:20],))


listed(
    "paths",
    {f"{door}-{path}": (door, path) for door in DOORS for path in PATHS},
    door,
)
