"""The notebook runs, and holds what its cells print and draw."""

import io
import re
from pathlib import Path

import pytest
from PIL import Image

from tools import run_notebook

PATH = Path(__file__).parents[1] / "examples" / "deliberate_practice.ipynb"
SMALL = {"FIRST": 40, "ROUND": 20, "MOST": 60, "STEPS": 80, "EVERY": 4, "REAL": 400}
SMALL |= {"SHOWN": 20, "EACH": 10}
ROUNDS = ("step ", "round")  # what lines of rounds begin with
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def notebook():
    return run_notebook.read(PATH)


def stored(notebook):
    return [cell["outputs"] for cell in run_notebook.code_cells(notebook)]


def lines(outputs):
    """The kinds of lines that a cell prints: their words without numbers and spaces."""
    text = run_notebook.text_of(outputs)
    return {" ".join(NUMBER.sub("N", line).split()) for line in text.splitlines()}


def test_its_cells_ran_in_order_and_their_pictures_are_small(notebook):
    assert PATH.stat().st_size < 1_500_000
    cells = run_notebook.code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    pictures = [each for outputs in stored(notebook) for each in run_notebook.pictures_of(outputs)]
    assert len(pictures) == 6
    for picture in pictures:
        with Image.open(io.BytesIO(picture)) as image:
            assert max(image.size) < 800


def test_its_links_lead_somewhere(notebook):
    text = "".join("".join(cell["source"]) for cell in notebook["cells"])
    links = re.findall(r"\]\((?!http)([^)]+)\)", text)
    assert links
    assert [link for link in links if not (PATH.parent / link).is_file()] == []


def test_its_cells_print_and_draw_what_is_stored_but_for_sizes(notebook):
    made = run_notebook.run(notebook, SMALL)
    assert [*map(lines, made)] == [*map(lines, stored(notebook))]
    drawn, before = (
        [len(run_notebook.pictures_of(each)) for each in outputs]
        for outputs in (made, stored(notebook))
    )
    assert drawn == before


@pytest.mark.long
def test_its_stored_numbers_are_those_of_its_cells(notebook):
    """Of a whole run, which lasts a minute. On another processor training ends a little elsewhere,
    and rounds may come at other steps.
    """
    for made, before in zip(run_notebook.run(notebook), stored(notebook), strict=True):
        assert lines(made) == lines(before)
        texts = [
            [line for line in run_notebook.text_of(each).splitlines() if line[:5] not in ROUNDS]
            for each in (made, before)
        ]
        found, expected = ([float(n) for n in NUMBER.findall("\n".join(text))] for text in texts)
        assert found == pytest.approx(expected, rel=0.1, abs=0.15)
