"""The reference pages are what the code says now."""

import ast
import re
import runpy
from pathlib import Path

import pytest

import dpfast

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "write_reference.py"


@pytest.mark.parametrize("name", ["recipe.md", "cli.md", "api.md", "run_folder.md", "errors.md"])
def test_a_page_is_the_one_that_the_tool_writes(name):
    tool = runpy.run_path(str(TOOL))
    written = (tool["FOLDER"] / name).read_text()
    assert written == tool["PAGES"][name](), "run python tools/write_reference.py"


def test_the_page_of_the_api_has_every_public_name_once_and_each_place_shows_it():
    names = runpy.run_path(str(TOOL))["NAMES"]
    shown = [(name, place) for group in names.values() for name, place in group.items()]
    assert sorted(name for name, _ in shown) == sorted(dpfast.__all__)
    for name, place in shown:
        if place:
            page = ROOT / "docs" / "reference" / place.partition("#")[0]
            assert re.search(rf"\b{name}\b", page.read_text()), (name, place)


def test_the_drawing_of_the_concepts_is_the_one_that_the_tool_draws():
    tool = runpy.run_path(str(ROOT / "tools" / "draw_concepts.py"))
    assert tool["FILE"].read_text() == tool["drawing"](), "run python tools/draw_concepts.py"


def test_the_page_of_the_environment_names_every_variable_that_is_read():
    page = (ROOT / "docs" / "reference" / "environment.md").read_text()
    files = [ROOT / "setup.py", *(ROOT / "dpfast").rglob("*.py")]
    read = "".join(file.read_text() for file in files)
    names = re.compile(r"\bDPFAST_[A-Z_]+")
    tested = "".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    assert set(names.findall(page)) == set(names.findall(read + tested))
    for name in re.findall(r'environ(?:\.get)?[\[(]\s*"([A-Z_]+)"', read):
        covered = name in page or any(
            name.startswith(start) for start in re.findall(r"(\w+_)\*", page)
        )
        assert covered, name


@pytest.fixture(scope="module")
def errors():
    return runpy.run_path(str(ROOT / "tools" / "error_messages.py"))


def test_every_text_of_a_raise_is_on_the_page_of_errors():
    page = " ".join((ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8").split())
    texts = set()
    for file in sorted((ROOT / "dpfast").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                first = [each for arg in node.exc.args for each in _fixed(arg)]
                texts |= {(file.name, max(first, key=len))} if first else set()
    assert len(texts) > 500
    lost = {each for each in texts if " ".join(each[1].split()).replace("`", "'") not in page}
    assert lost == set()


def _fixed(node):
    """The fixed parts of a text, those within its values aside."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value.strip().replace("|", "\\|")]
    if isinstance(node, ast.JoinedStr):
        return [part for each in node.values for part in _fixed(each)]
    return []


def test_every_message_of_an_error_says_what_would_be_right_or_has_its_cause(errors):
    found, unread = errors["messages"]()
    known = errors["causes"]()["causes"]
    assert unread == []
    silent = {each.form for each in found if not errors["SAYS_IT"].search(each.form)}
    assert {form for form in silent if not errors["cause"](form, known)} == set()
    assert {part for part in known if not any(part in each.form for each in found)} == set()
