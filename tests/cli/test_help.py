"""What ``--help`` says: a word on every option, laid out for the terminal, without torch."""

import argparse
import ast
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dpfast.cli.main import main, new_parser
from dpfast.config import SECTIONS, fields
from dpfast.version import __version__


def commands(parser):
    """The parsers of all commands below a parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield command
                yield from commands(command)


def printed(arguments, capsys, monkeypatch, columns=100):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_help_shows_every_command_in_a_group_and_in_one_line(capsys, monkeypatch):
    lines = printed(["--help"], capsys, monkeypatch, 80).splitlines()
    assert max(map(len, lines)) < 80
    starts = [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "]
    (action,) = (a for a in new_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert [name for name in starts if name in action.choices] == list(action.choices)
    listed = lines[: lines.index("options:")]
    assert not [line for line in listed if line.startswith("   ")], "a command takes two lines"


def test_a_command_has_an_example_that_is_one_and_a_page_that_is_there():
    root = Path(__file__).parents[2]
    for command in commands(new_parser()):
        if command.get_default("handler") is None:  # it has commands of its own
            continue
        words = shlex.split(command.example)
        assert f"dpfast {words[1]}" in command.prog
        assert new_parser().parse_args(words[1:]).handler is command.get_default("handler")
        assert (root / "docs" / command.page).is_file()
        assert f"  {command.example}\n" in command.format_help()


def test_every_option_of_every_command_has_a_word_of_help():
    for command in commands(new_parser()):
        for action in command._actions:
            if not isinstance(action, argparse._SubParsersAction):
                assert action.help, (command.prog, action.dest)


@pytest.mark.parametrize("folder", ["benchmarks", "tools", "dpfast"])
def test_one_parser_makes_the_errors_of_every_command_suite_and_tool(folder):
    for path in sorted((Path(__file__).parents[2] / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) != "argparse.ArgumentParser", (
                    f"{path}:{node.lineno}: dpfast.cli.parser.Parser"
                )


@pytest.mark.parametrize("folder", ["benchmarks", "tools"])
def test_suites_and_tools_have_a_word_on_every_option_too(folder):
    for path in sorted((Path(__file__).parents[2] / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument"):
                named = {keyword.arg for keyword in node.keywords}
                assert "help" in named, f"{path}:{node.lineno}"


def test_the_help_of_run_tells_meaning_default_and_values_by_section(capsys, monkeypatch):
    text = " ".join(printed(["run", "--help"], capsys, monkeypatch).split())
    places = [text.index(f" [{section}]: ") for section in SECTIONS]
    places += [text.index(f" [{section}], the rest: ") for section in SECTIONS]
    assert places == sorted(places)
    first, last = text.index(" [generator]: "), text.index(" the recipe itself, the rest: ")
    assert first < text.index("--omega X") < text.index("--iterations STEPS") < last
    assert last < text.index("--overlap RANKS")
    for name, option in fields().items():
        if name != "name":
            assert f"{option.placeholder} {option.help} (default: {option.default_text}" in text
    assert (
        "--every STEPS one step in so many is guided, from start on (default: 3; at least 1)"
        in text
    )
    assert "--mode relative|score " in text
    assert "--learner.batch-size IMAGES " in text


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", ["run", "sample"])
def test_help_fits_into_the_terminal(command, columns, capsys, monkeypatch):
    lines = printed([command, "--help"], capsys, monkeypatch, columns).splitlines()
    assert columns - 20 < max(map(len, lines)) < columns


def test_help_after_a_recipe_tells_the_values_that_it_has(capsys, monkeypatch):
    text = " ".join(printed(["run", "fashion", "--help"], capsys, monkeypatch).split())
    assert "solver steps of a sample (default: 15; in fashion: 8; between 1 and 1000)" in text
    assert "seed of all weights, noise, labels and batches (default: 0; between" in text
    assert main(["run", "nosuch", "--help"]) == 2


def test_the_version_is_printed(capsys, monkeypatch):
    assert printed(["--version"], capsys, monkeypatch) == f"dpfast {__version__}\n"


@pytest.mark.parametrize("arguments", [["run", "nosuch"], ["run", "fashion", "--help"]])
def test_help_and_a_wrong_argument_are_answered_without_importing_torch(arguments):
    code = (
        "import sys; from dpfast.cli.main import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0
