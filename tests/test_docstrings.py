"""The form of docstrings: whole sentences, sections that a reader and the site understand, examples
that run.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dpfast
from dpfast import ops, theory

PACKAGE = Path(dpfast.__file__).parent
SECTIONS = {"Args", "Attributes", "Returns", "Yields", "Raises", "Examples"}
# openings of what is no sentence of its own
FRAGMENTS = re.compile(
    r"(Of|What|Whether|How|Why|Where|When|Which|Who|As|In|Within|Back|With|Without|From)\b"
)
VERB = re.compile(r"[A-Z][a-z]+s\b(?! of\b)")  # what a function does, in the third person


def definitions(path: Path) -> Iterator[tuple[str, ast.AST, str]]:
    """Yields name, node and docstring of a module and of all that it defines and describes."""
    left: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while left:
        node = left.pop()
        left += [part for part in getattr(node, "body", ()) if isinstance(part, ast.stmt)]
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield f"{path.relative_to(PACKAGE)}: {getattr(node, 'name', 'module')}", node, text


def is_property(node: ast.AST) -> bool:
    """Returns True for what is read as an attribute, whose docstring may name a thing."""
    decorators = getattr(node, "decorator_list", [])
    return any("property" in ast.unparse(decorator) for decorator in decorators)


def public() -> list[tuple[str, Any]]:
    """Lists the public names and the public methods and properties that they define."""
    found: list[tuple[str, Any]] = []
    named = [(each, home) for home in (dpfast, ops, theory) for each in home.__all__]
    for name, home in named:
        value = getattr(home, name)
        found.append((name, value))
        for part, method in vars(value).items() if inspect.isclass(value) else ():
            if isinstance(method, (staticmethod, classmethod)):
                method = method.__func__
            described = inspect.isfunction(method) or "property" in type(method).__name__
            if described and not part.startswith("_"):
                found.append((f"{name}.{part}", method))
    return found


PUBLIC = dict(public())


def test_docstrings_of_functions_begin_with_a_verb_and_none_with_a_fragment() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, node, text in definitions(path):
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            does = VERB.match(text) if function and not is_property(node) else True
            if FRAGMENTS.match(text) or not does:
                wrong.append(f"{name}: {text.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_docstring_begins_with_one_line_that_is_a_sentence(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name])
    assert text, "no docstring"
    first = text.splitlines()[0]
    assert re.fullmatch(r"[A-Z`].*\.", first), first
    assert not text.splitlines()[1:2] or not text.splitlines()[1], f"{first}: no empty line behind"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_sections_name_what_the_signature_has(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert not re.search(r"^Raises ``", text, re.MULTILINE), "Raises is a section of its own"
    sections = re.findall(r"^(\w+):\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    assert {section for section, _ in sections} <= SECTIONS
    for error in re.findall(r"^    (\S.*)", dict(sections).get("Raises", ""), re.MULTILINE):
        assert re.match(r"[A-Z]\w+: ", error), error
    value = PUBLIC[name]
    if "property" in type(value).__name__ or "Args" not in dict(sections):
        return
    taken = set(inspect.signature(value).parameters) | set(getattr(value, "__annotations__", ()))
    for section, body in sections:
        entries = re.findall(r"^    (\S[^:\n]*):", body, re.MULTILINE)
        if section == "Args":
            assert {entry.lstrip("*") for entry in entries} <= taken, entries


@pytest.mark.parametrize("name", PUBLIC)
def test_an_error_that_a_public_function_raises_stands_in_its_docstring(name: str) -> None:
    """Errors of the functions that it calls are not seen; those stand there by hand."""
    value = PUBLIC[name]
    if not inspect.isfunction(value) and not inspect.isclass(value):
        return
    code = value if inspect.isfunction(value) else getattr(value, "__post_init__", value.__init__)
    if not inspect.isfunction(code) or "dpfast" not in code.__module__:
        return
    try:
        source = inspect.getsource(code)
    except OSError:  # made by dataclasses
        return
    text = inspect.getdoc(value) or ""
    for error in set(re.findall(r"\braise (\w*Error)\(", source)):
        assert error in text, f"{name} raises {error}"


def examples() -> list[doctest.DocTest]:
    """Lists the docstrings of the public names that have examples."""
    finder = doctest.DocTestFinder(recurse=False)
    found: list[doctest.DocTest] = []
    for name, value in PUBLIC.items():
        if ">>> " in (inspect.getdoc(value) or ""):
            found += finder.find(value, name, module=sys.modules[value.__module__], globs={})
    return found


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_examples_of_docstrings_run(example: doctest.DocTest) -> None:
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
    said: list[str] = []
    runner.run(example, out=said.append)
    assert runner.tries
    assert not runner.failures, "".join(said)
