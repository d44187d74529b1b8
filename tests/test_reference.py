"""The reference pages are what the code says now."""

import re
import runpy
from pathlib import Path

import pytest

import dpfast

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "write_reference.py"


@pytest.mark.parametrize("name", ["recipe.md", "cli.md", "api.md", "run_folder.md"])
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
