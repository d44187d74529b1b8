"""Runs a notebook's cells in order, and stores what they print and draw in the notebook.

    python tools/run_notebook.py examples/deliberate_practice.ipynb

It needs no Jupyter: a cell is plain Python, prints, and draws with ``plt.show()``. The cell with
the tag "parameters" holds the sizes, which a test makes smaller.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib.pyplot as plt

Output = dict[str, Any]  # of a cell, in nbformat 4


def read(path: Path) -> dict[str, Any]:
    """The notebook in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cells of a notebook that run."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: Mapping[str, Any], sizes: Mapping[str, int] | None = None) -> list[list[Output]]:
    """The outputs of each code cell.

    sizes: values in place of those that the cell with the tag "parameters" sets.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for number, cell in enumerate(code_cells(notebook), 1):
        code = compile("".join(cell["source"]), f"<cell {number}>", "exec")
        outputs.append(_outputs(code, names))
        if "parameters" in cell["metadata"].get("tags", ()):
            names.update(sizes or {})
    return outputs


def text_of(outputs: list[Output]) -> str:
    """What a cell printed."""
    return "".join("".join(each.get("text", ())) for each in outputs)


def pictures_of(outputs: list[Output]) -> list[bytes]:
    """The PNG files that a cell drew."""
    return [base64.b64decode(each["data"]["image/png"]) for each in outputs if "data" in each]


def _outputs(code: Any, names: dict[str, Any]) -> list[Output]:
    """Runs a cell, and returns its prints and figures in their order."""
    found: list[Output] = []
    printed = io.StringIO()

    def keep_text() -> None:
        printed.seek(0)
        lines = list(printed)
        if lines:
            found.append({"name": "stdout", "output_type": "stream", "text": lines})
        printed.seek(0)
        printed.truncate()

    def show() -> None:
        keep_text()
        file = io.BytesIO()
        plt.savefig(file, format="png", bbox_inches="tight", metadata={"Software": None})
        plt.close()
        data = {"image/png": base64.b64encode(file.getvalue()).decode()}
        found.append({"data": data, "metadata": {}, "output_type": "display_data"})

    plt.switch_backend("Agg")
    with mock.patch.object(plt, "show", show), contextlib.redirect_stdout(printed):
        exec(code, names)
    keep_text()
    return found


def main(path: Path) -> None:
    """Runs the notebook in a file and writes its outputs there."""
    notebook = read(path)
    outputs = run(notebook)
    for number, (cell, found) in enumerate(zip(code_cells(notebook), outputs, strict=True), 1):
        cell["execution_count"] = number
        cell["outputs"] = found
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
