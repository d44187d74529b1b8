"""Contact sheets hold what they are given."""

import torch
from PIL import Image

from dpfast.report.sheets import contact_sheet


def test_contact_sheet_holds_every_image(tmp_path):
    rows = [
        torch.full((3, 3, 8, 8), 0, dtype=torch.uint8),
        torch.full((2, 3, 8, 8), 0, dtype=torch.uint8),
    ]
    rows[1][:, 0] = 200
    path = contact_sheet(rows, ("black", "red"), "title", tmp_path / "sheet.png")
    counts = {colour: n for n, colour in Image.open(path).convert("RGB").getcolors(1 << 20)}
    assert counts[(200, 0, 0)] > 1000
