"""The Python blocks of the documentation run as they stand, and print what stands below them.

The blocks of a page run in their order, in one folder and with the names of those before them. One
whose first line is ``# NAME.py`` is a file of that folder as well. A block of text directly below
one of Python is what it prints, where "..." stands for anything.
"""

import ast
import doctest
import re
from pathlib import Path

import pytest

import dpfast

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n*```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\b")
PAGES = [
    str(path.relative_to(ROOT))
    for path in sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
    if BLOCK.search(path.read_text(encoding="utf-8"))
]


def blocks(page):
    """The Python blocks of a page, each with what is shown below it, or ""."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


def public_names(code):
    """The names that code takes from dpfast."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "dpfast":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "dpfast":
            yield node.attr


def test_every_public_name_stands_in_a_block_or_an_example_that_runs():
    examples = [path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py")]
    shown = [block for page in PAGES for block, _ in blocks(page)]
    used = {name for code in (*examples, *shown) for name in public_names(code)}
    assert set(dpfast.__all__) - used == set()


def test_every_way_in_has_its_block():
    pages = ("docs/guides/embed_sampler.md", "docs/guides/inside_diffusers.md")
    shown = [block for page in pages for block, _ in blocks(page)]
    for name in (
        "generate",
        "stream",
        "GuidanceCallback",
        "attach",
        "LearnerGuidance",
        "make_cond_fn",
        "criterion=",
    ):
        assert any(name in block for block in shown), name


@pytest.mark.parametrize("page", PAGES)
def test_a_block_is_short(page):
    for block, _ in blocks(page):
        assert sum(bool(line.strip()) for line in block.splitlines()) <= 20, block


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_and_print_what_it_shows(
    page, tmp_path, monkeypatch, capsys, request
):
    for folder, fixture in (
        ("sd15", "stable_diffusion_folder"),
        ("sd3", "stable_diffusion_3_folder"),
    ):
        if any(f'"{folder}"' in block for block, _ in blocks(page)):
            (tmp_path / folder).symlink_to(request.getfixturevalue(fixture))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names, checker = {}, doctest.OutputChecker()
    for number, (block, shown) in enumerate(blocks(page), 1):
        if file := FILE.match(block):
            (tmp_path / file[1]).write_text(block, encoding="utf-8")
        capsys.readouterr()
        exec(compile(block, f"<{page}, block {number}>", "exec"), names)
        printed = capsys.readouterr().out
        assert not shown or checker.check_output(shown, printed, doctest.ELLIPSIS), printed
