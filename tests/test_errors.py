"""One kind of error for what a caller got wrong, its child for recipes, and one line of it on a
terminal.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

import dpfast
from dpfast.cli.main import main
from tests.test_imports import MODULES, room

# The rooms in which a recipe is at hand; elsewhere only a function that takes one names its error.
OF_RECIPES = {"config", "sources", "planning", "practice", "rehearsal"}


def raised(module: str) -> Iterator[tuple[str, str]]:
    """The function and the name of the error of every ``raise Error(...)`` in a module."""
    for function in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    yield function.name, ast.unparse(node.exc)


def test_only_recipes_are_refused_with_their_own_error() -> None:
    assert issubclass(dpfast.RecipeError, dpfast.InputError)
    assert issubclass(dpfast.InputError, ValueError)
    named = {
        (module, function)
        for module in MODULES
        for function, error in raised(module)
        if error.startswith("RecipeError(") and room(module) not in OF_RECIPES
    }
    assert {function for _, function in named} <= {"from_recipe", "for_recipe"}


def test_no_message_is_wrapped_again_and_no_error_is_a_bare_valueerror() -> None:
    errors = [(module, error) for module in MODULES for _, error in raised(module)]
    assert len(errors) > 250
    assert [each for each in errors if each[1].endswith("Error(str(error))")] == []
    assert [each for each in errors if each[1].startswith("ValueError(")] == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["theory", "samples", "--accuracy", "0.2", "--d", "64"], "accuracy = 0.2"),
        (["run", "nosuch", "--out", "nowhere"], "recipe = 'nosuch'"),
        (["plan", "fashion", "--device", "abacus"], "device = 'abacus'"),
    ],
    ids=["theory", "recipe", "hardware"],
)
def test_a_command_prints_an_error_of_any_room_as_one_line(arguments, named, capsys) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("dpfast: error: ")
    assert named in told


def test_a_message_is_one_line_whatever_names_are_in_it() -> None:
    error = dpfast.InputError("folder 'do\ng\x1b[2J\udce9\u2028': Größe, 犬")
    assert str(error) == "folder 'do\\ng\\x1b[2J\\udce9\\u2028': Größe, 犬"
