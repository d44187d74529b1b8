"""Documents and docstrings name only modules and files that exist."""

import pkgutil
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("dpfast", "docs", "examples", "tools", "benchmarks", "csrc", "tests")
FILES = {
    str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
}
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(page for folder in FOLDERS[:-1] for page in sorted((ROOT / folder).rglob("*.md"))),
    *(page for folder in FOLDERS[:-1] for page in sorted((ROOT / folder).rglob("*.py"))),
]
SCRIPT = re.compile(r"(?<![\w/.])(?:[\w-]+/)+[\w-]+\.py\b")
DOTTED = re.compile(r"(?<![\w/.-])dpfast(?:\.\w+)+")


def exists(script: str) -> bool:
    """Whether the path ends that of a file here; NAME stands for any."""
    pattern = re.compile(rf"(.*/)?{re.escape(script).replace('NAME', '.*')}")
    return any(pattern.fullmatch(file) for file in FILES)


def resolves(name: str) -> bool:
    """Whether a dotted name can be imported; the compiled extension may not be built."""
    if name.startswith("dpfast._native"):
        return True
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize(
    ("pattern", "known"), [(SCRIPT, exists), (DOTTED, resolves)], ids=["scripts", "modules"]
)
def test_documents_and_docstrings_name_what_exists(pattern, known):
    named = {
        (str(page.relative_to(ROOT)), name)
        for page in PAGES
        for name in pattern.findall(page.read_text())
    }
    assert len(named) > 20
    assert [use for use in sorted(named) if not known(use[1])] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs/guides").glob("*.md")), ids=lambda p: p.stem)
def test_a_guide_has_short_sentences_and_few_numbers(page):
    found = runpy.run_path(str(ROOT / "tools/count_prose.py"))["count"](page.read_text())
    assert found.words_a_sentence <= 17
    assert max(found.sentences) <= 40
    assert found.numbers_per_100_words <= 4.5
