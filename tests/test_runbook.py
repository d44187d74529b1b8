"""The guide to many GPUs and troubleshoot: commands are commands, and what is said is explained."""

import argparse
import ast
import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from dpfast.cli import main
from dpfast.cli.recipes import recipe_of
from dpfast.config import Recipe
from dpfast.pool.codecs import saved_bytes

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "guides" / "many_gpus.md").read_text(encoding="utf-8")
TROUBLES = (ROOT / "docs" / "guides" / "troubleshoot.md").read_text(encoding="utf-8")


def commands(text):
    """The commands of a page's indented lines, a word in a list each."""
    lines = re.findall(r"^    (\S.*)$", text.replace("\\\n", " "), re.MULTILINE)
    programs = {"dpfast", "torchrun", "sbatch", "tensorboard", "tail"}
    return [shlex.split(line, comments=True) for line in lines if line.split()[0] in programs]


COMMANDS = commands(TEXT)
ALL = [
    pytest.param(command, id=f"{page.name} {' '.join(command)}")
    for page in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("**/*.md"))]
    if page.parent.name != "records"
    for command in commands(page.read_text(encoding="utf-8"))
    if "." not in command[0] and "error:" not in command
]


def test_every_kind_of_command_is_there():
    assert {command[0] for command in COMMANDS} == {
        "dpfast",
        "torchrun",
        "sbatch",
        "tensorboard",
        "tail",
    }


@pytest.mark.parametrize("command", ALL)
def test_a_command_of_a_page_has_options_and_values_that_are_taken(command):
    if command[0] == "torchrun":
        options = get_args_parser().parse_args(command[1:])
        assert (options.module, options.training_script) == (True, "dpfast")
        command = ["dpfast", *options.training_script_args]
    if command[0] == "sbatch":
        script = next(part for part in command if part.endswith(".sbatch"))
        assert (ROOT / script).is_file()
        command = [
            "dpfast",
            "run",
            command[command.index(script) + 1],
            *command[command.index(script) + 3 :],
        ]
    if command[0] == "dpfast":
        arguments = main.new_parser().parse_args(command[1:])
        if command[1] == "run":
            assert isinstance(recipe_of(arguments), Recipe)
        assert isinstance(arguments, argparse.Namespace)


def said():
    """(file, message) of every line that the package logs, events of the loop aside."""
    for file in sorted((ROOT / "dpfast").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and re.fullmatch(
                r"log\.(info|warning|error)", ast.unparse(node.func)
            ):
                message = node.args[0]
                if isinstance(message, ast.Constant) and message.value != "%s":
                    yield file.name, message.value


@pytest.mark.parametrize(("file", "message"), sorted(set(said())))
def test_what_the_logs_say_is_explained(file, message):
    longest = max(re.split(r"%[.\d]*\w", message), key=len).replace("%%", "%").strip(" ,.;:")
    assert longest in TROUBLES, f"{file}: {message}"


def test_every_event_of_the_logs_is_explained():
    source = (ROOT / "dpfast" / "practice" / "callbacks.py").read_text()
    for event in set(re.findall(r'_log\(\s*progress,\s*"(\w+)"', source)):
        assert f"| `{event}` |" in TEXT, event


def failures():
    """(row, the longest fixed part) of every message of dpfast's own that a table quotes."""
    own = False
    for row, line in enumerate(TROUBLES.splitlines()):
        own = line.startswith("| what is seen |") or (own and line.startswith("|"))
        for message in re.findall(r"`([^`]+)`", line.split(" | ")[0]) if own else ():
            parts = re.split(r"\.\.\.|\d[\d.]*(?: ?[GT]iB)?|\b[I]\b|\bnode2?\b|: |'\w+'", message)
            yield row, max(parts, key=len).strip(" ,.;:()'")


SOURCE = re.sub(
    r'"\s*\n\s*f?"',
    "",
    "".join(file.read_text() for file in sorted((ROOT / "dpfast").rglob("*.py"))),
)


@pytest.mark.parametrize(("row", "words"), list(failures()))
def test_a_failure_is_quoted_in_the_words_of_the_code_and_has_one_row(row, words):
    assert words in SOURCE
    assert {other for other, more in failures() if words in more} == {row}


def test_the_disk_of_a_run_is_that_of_the_plan():
    for images in ("npy", "png", "jpeg"):
        each = saved_bytes("pixels", (3, 224, 224), images)
        row = next(
            line
            for line in TEXT.splitlines()
            if line.startswith("| samples") and f'"{images}"' in line
        )
        assert [float(number) for number in re.findall(r"([\d.]+) [kGT]B", row)] == [
            pytest.approx(each / 1e3, rel=0.01),
            pytest.approx(1.9e6 * each / 1e9, rel=0.01),
            pytest.approx(9.1e6 * each / 1e12, rel=0.01),
        ]
