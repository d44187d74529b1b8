"""Draw the same samples under rising guidance, without and with an anchor, as one picture.

    python examples/guided_grid.py grid.png

A column is one label and one noise; a row is one strength. The classifier that guides comes with
dpfast here; put yours in its place.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import dpfast
from dpfast.learn.models import load_judge
from dpfast.report.sheets import contact_sheet

ROWS = [(0.0, 0.0), (0.05, 0.0), (0.12, 0.0), (0.2, 0.0), (0.2, 0.5)]  # omega, anchor


def main(path: str = "grid.png", columns: int = 20) -> list[tuple[float, float]]:
    """Returns the mean entropy of each row, and the share whose label another classifier reads."""
    guide, reader = load_judge(1), load_judge(2)
    sampler = dpfast.GuidedSampler.from_pretrained(
        "fashion", guide, guidance=dpfast.GuidanceConfig(every=2), steps=8, cfg_scale=1.5
    )
    labels = torch.arange(columns) % 10
    ids = torch.arange(columns)  # of the noise
    rows, names, found = [], [], []
    for omega, anchor in ROWS:
        images = sampler.generate(labels, ids, omega=omega, anchor=anchor).images
        with torch.no_grad():
            pixels = images.float() / 127.5 - 1
            entropy = float(dpfast.entropy(guide(pixels)).mean())
            read = float((reader(pixels).argmax(1) == labels).float().mean())
        rows.append(images)
        names.append(f"omega {omega:g}, anchor {anchor:g}")
        found.append((entropy, read))
        print(f"{names[-1]}: entropy {entropy:.2f} nats, {read:.0%} still read as their label")
    contact_sheet(rows, names, "the same labels and noise under rising guidance", Path(path))
    print("wrote", path)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:2])
