#!/usr/bin/env python3
"""Draws docs/images/concepts.svg, the way of a sample through the loop.

python tools/draw_concepts.py
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

FILE = Path(__file__).parents[1] / "docs" / "images" / "concepts.svg"
WIDTH, HEIGHT = 484, 492
BOX = (176, 100)
LEFT, RIGHT = 20, 288
# station: left, top, what stands in the box
STATIONS = {
    "generate": (LEFT, 52, ("a diffusion model", "draws each label")),
    "pool": (RIGHT, 52, ("N samples, and after", "each round P more")),
    "feed": (RIGHT, 212, ("draws batches and", "augments them")),
    "learn": (RIGHT, 372, ("trains the classifier", "on the batches")),
    "practice": (LEFT, 372, ("waits for T_max times", "without a new best")),
}
# kind of an arrow, its points
ARROWS = (
    ("way", (108, 20), (108, 52)),
    ("way", (196, 102), (288, 102)),
    ("way", (376, 152), (376, 212)),
    ("way", (376, 312), (376, 372)),
    ("way", (288, 422), (196, 422)),
    ("way", (44, 372), (44, 152)),
    ("live", (316, 372), (316, 340), (84, 340), (84, 152)),
)
# kind of a text, where it begins, its lines
TEXTS = (
    ("note", (118, 38), ("labels",)),
    ("note", (386, 346), ("batches",)),
    ("note", (52, 362), ("a round",)),
    ("note", (212, 412), ("accuracy",)),
    ("note", (212, 442), ("every tau",)),
    ("live-note", (96, 216), ("live weights",)),
    ("note", (96, 238), ("raise the entropy", "of new images,", "by omega")),
)
STYLE = """
    .card { fill: #ffffff } .box { fill: #eef1fb; stroke: #4051b5; stroke-width: 1.5 }
    text { fill: #1d2030; font: 15px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
    .name { font-weight: 700; font-size: 18px } .note { font-size: 14px }
    path { fill: none; stroke-width: 2 } .way { stroke: #4051b5 } .live { stroke: #c2410c }
    marker .way { fill: #4051b5; stroke: none } marker .live { fill: #c2410c; stroke: none }
    .live-note { fill: #c2410c; font-weight: 700 }
    @media (prefers-color-scheme: dark) {
      .card { fill: #1e2129 } .box { fill: #2a2f45; stroke: #9fa8ff }
      text { fill: #eceef7 } .way { stroke: #9fa8ff } .live { stroke: #ff9d5c }
      marker .way { fill: #9fa8ff } marker .live { fill: #ff9d5c } .live-note { fill: #ff9d5c }
    }
"""


def drawing() -> str:
    """Returns the SVG: its colours follow the reader's, its background is its own."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "  <title>Samples go from generate over pool and feed to learn; practice asks for more"
        "</title>",
        f"  <style>{STYLE}  </style>",
        "  <defs>",
        *(
            f'    <marker id="{kind}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" '
            f'markerHeight="8" orient="auto-start-reverse" markerUnits="userSpaceOnUse">'
            f'<path class="{kind}" d="M0 0 L10 5 L0 10 z"/></marker>'
            for kind in ("way", "live")
        ),
        "  </defs>",
        f'  <rect class="card" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
    ]
    for kind, *points in ARROWS:
        line = " L".join(f"{x} {y}" for x, y in points)
        parts.append(f'  <path class="{kind}" marker-end="url(#{kind})" d="M{line}"/>')
    for kind, (x, y), lines in TEXTS:
        parts += [_text(line, x, y + 22 * i, kind, "start") for i, line in enumerate(lines)]
    for name, (left, top, notes) in STATIONS.items():
        width, height = BOX
        parts.append(
            f'  <rect class="box" x="{left}" y="{top}" width="{width}" height="{height}" rx="8"/>'
        )
        parts.append(_text(name, left + width // 2, top + 32, "name", "middle"))
        for line, note in enumerate(notes):
            parts.append(_text(note, left + width // 2, top + 58 + 22 * line, "note", "middle"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(text: str, x: int, y: int, kind: str, anchor: str) -> str:
    return f'  <text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


if __name__ == "__main__":
    FILE.write_text(drawing(), encoding="utf-8")
    print(FILE)
