"""Contact sheets hold what they are given."""

import pytest
import torch
from PIL import Image

from dpfast.report.sheets import LARGEST, MOST, WIDEST, contact_sheet, side_of


def test_contact_sheet_holds_every_image(tmp_path):
    rows = [
        torch.full((3, 3, 8, 8), 0, dtype=torch.uint8),
        torch.full((2, 3, 8, 8), 0, dtype=torch.uint8),
    ]
    rows[1][:, 0] = 200
    path = contact_sheet(rows, ("black", "red"), "title", tmp_path / "sheet.png")
    counts = {colour: n for n, colour in Image.open(path).convert("RGB").getcolors(1 << 20)}
    assert counts[(200, 0, 0)] > 1000


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (50, 24), (100, 24), (48, 51), (48, 1001)])
def test_a_sheet_of_many_images_is_bounded(rows, columns):
    side = side_of(rows, columns)
    assert 1 <= side <= LARGEST
    assert side * columns <= WIDEST
    assert rows * columns * side**2 <= MOST


def test_a_long_name_above_a_column_is_cut(tmp_path):
    rows = [torch.zeros(2, 3, 64, 64, dtype=torch.uint8)] * 4
    columns = [("a name of many words " * 10, 1), ("cat", 1)]
    path = contact_sheet(rows, list("abcd"), "title", tmp_path / "sheet.png", columns=columns)
    _, height = Image.open(path).size
    assert height < 600
