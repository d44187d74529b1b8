"""The reference pages are what the code says now."""

import runpy
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "write_reference.py"


@pytest.mark.parametrize("name", ["recipe.md", "cli.md"])
def test_a_page_is_the_one_that_the_tool_writes(name):
    tool = runpy.run_path(str(TOOL))
    written = (tool["FOLDER"] / name).read_text()
    assert written == tool["PAGES"][name](), "run python tools/write_reference.py"
