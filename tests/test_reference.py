"""The reference pages are what the code says now."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "write_reference.py"


@pytest.mark.parametrize("name", ["recipe.md", "cli.md", "run_folder.md"])
def test_a_page_is_the_one_that_the_tool_writes(name):
    tool = runpy.run_path(str(TOOL))
    written = (tool["FOLDER"] / name).read_text()
    assert written == tool["PAGES"][name](), "run python tools/write_reference.py"


def test_the_page_of_the_environment_names_every_variable_that_is_read():
    page = (ROOT / "docs" / "reference" / "environment.md").read_text()
    files = [ROOT / "setup.py", *(ROOT / "dpfast").rglob("*.py")]
    read = "".join(file.read_text() for file in files)
    names = re.compile(r"\bDPFAST_[A-Z_]+")
    assert set(names.findall(page)) == set(names.findall(read))
    for name in re.findall(r'environ(?:\.get)?[\[(]\s*"([A-Z_]+)"', read):
        covered = name in page or any(
            name.startswith(start) for start in re.findall(r"(\w+_)\*", page)
        )
        assert covered, name
