"""Plots and contact sheets show what the metrics hold."""

import torch
from PIL import Image

from dpfast.report.plots import contact_sheet, plot_iterations, plot_samples

METRICS = [
    {"event": "evaluation", "source": "dp", "step": 10, "accuracy": 0.4, "samples": 100},
    {"event": "addition", "source": "dp", "step": 10, "round": 1, "samples": 150},
    {"event": "evaluation", "source": "dp", "step": 20, "accuracy": 0.5, "samples": 150},
    {"event": "result", "source": "dp", "step": 20, "samples": 150, "test_accuracy": 0.52},
    {"event": "evaluation", "source": "static", "step": 10, "accuracy": 0.3, "samples": 150},
    {"event": "result", "source": "static", "step": 10, "samples": 150, "test_accuracy": 0.31},
]


def colours(path):
    return {colour for _, colour in Image.open(path).convert("RGB").getcolors(1 << 20)}


def test_plots_draw_both_sources(tmp_path):
    blue, red = (0x1B, 0x6C, 0xA8), (0xC8, 0x55, 0x3D)
    for plot in (plot_iterations, plot_samples):
        path = plot(METRICS, tmp_path / f"{plot.__name__}.png")
        assert {blue, red} <= colours(path)
        assert red not in colours(plot([m for m in METRICS if m["source"] == "dp"], tmp_path / "dp.png"))


def test_contact_sheet_holds_every_image(tmp_path):
    rows = [torch.full((3, 3, 8, 8), 0, dtype=torch.uint8), torch.full((2, 3, 8, 8), 0, dtype=torch.uint8)]
    rows[1][:, 0] = 200
    path = contact_sheet(rows, ("black", "red"), "title", tmp_path / "sheet.png")
    counts = {colour: n for n, colour in Image.open(path).convert("RGB").getcolors(1 << 20)}
    assert counts[(200, 0, 0)] > 1000
