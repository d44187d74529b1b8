"""A few of these inputs through the command line: exit code 2 and one line on stderr."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpfast.cli.main import main
from dpfast.errors import InputError
from tests.bad_inputs.case import Case, listed
from tests.bad_inputs.files import parquet, picture, tar


def command(make: Callable[[Path], list[str]], random: random.Random, folder: Path) -> Case:
    """What is said on stderr is raised again, so that one check serves all cases."""
    arguments = [str(a) for a in make(folder)]

    def run() -> Any:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code: Any = main(arguments)
            except SystemExit as exit:
                code = exit.code
        said = err.getvalue()
        if code == 0:
            return out.getvalue()
        assert code == 2, (code, said)
        assert said.startswith("dpfast: error: "), said
        raise InputError(said.removeprefix("dpfast: error: ").removesuffix("\n"))

    return Case(run, ("bad", "labels", "format"))


def _file(name: str, data: bytes, *arguments: str) -> Callable[[Path], list[str]]:
    """A command with a file of this content in place of FILE."""

    def make(folder: Path) -> list[str]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        given = {"FILE": str(path), "FOLDER": str(path.parent), "OUT": str(folder / "out")}
        return [given.get(argument, argument) for argument in arguments]

    return make


def _pool(write: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / "bad").mkdir()
        write(folder / "bad")
        return ["export", str(folder / "bad"), "--format", "parquet", "--out", str(folder / "out")]

    return make


EXPORT = ("export", "FOLDER", "--format", "webdataset", "--out", "OUT")
SAMPLE = ("sample", "--labels", "0", "--count", "1", "--out", "OUT")
listed(
    "commands",
    {
        "plan-utf-16": _file("bad.toml", "seed = 1\n".encode("utf-16"), "plan", "FILE"),
        "plan-latin-1": _file("bad.toml", b"# caf\xe9\n", "plan", "FILE"),
        "plan-torn": _file("bad.toml", b"seed = ", "plan", "FILE"),
        "plan-deep": _file("bad.toml", b"class_names = " + b"[" * 5000, "plan", "FILE"),
        "run-unknown-field": _file("bad.toml", b"bad = 1\n", "run", "FILE", "--out", "OUT"),
        "export-nothing": _file("bad/a.txt", b"x", *EXPORT),
        "export-torn-tar": _file("bad/a.tar", b"x" * 600, *EXPORT),
        "export-torn-parquet": _file("bad/a.parquet", b"PAR1", *EXPORT),
        "export-torn-manifest": _file("bad/manifest.json", b"{", *EXPORT),
        "export-deep-manifest": _file("bad/manifest.json", b"[" * 100_000, *EXPORT),
        "export-torn-recipe": _file("bad/recipe.json", b"{", *EXPORT),
        "export-without-labels": _pool(lambda path: tar(path / "a.tar", ("0.png", picture(1)))),
        "export-labels-of-text": _pool(
            lambda path: parquet(path / "a.parquet", [picture(1)], label=["dog"])
        ),
        "export-of-an-empty-parquet": _pool(lambda path: parquet(path / "a.parquet", [])),
        "report-of-no-run": _file("bad/a.txt", b"x", "report", "FOLDER", "--out", "OUT"),
        "report-of-a-torn-recipe": _file("bad/recipe.json", b"{", "report", "FOLDER"),
        "sample-of-a-torn-index": _file(
            "bad/model_index.json", b"{", *SAMPLE, "--pipeline", "FOLDER"
        ),
        "sample-of-a-list": _file("bad/model_index.json", b"[]", *SAMPLE, "--pipeline", "FOLDER"),
        "sample-of-a-deep-index": _file(
            "bad/model_index.json", b"[" * 100_000, *SAMPLE, "--pipeline", "FOLDER"
        ),
        "sample-labels": _file("a", b"", "sample", "--labels", "0,bad", "--out", "OUT"),
        "sample-of-no-run": _file(
            "bad/recipe.json", b"{", *SAMPLE, "--omega", "1", "--learner", "FOLDER"
        ),
    },
    command,
)
