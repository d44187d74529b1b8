"""Pictures of a run: accuracy against iterations and against samples, and contact sheets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dpfast.practice.loop import Result
from dpfast.report.metrics import read_metrics

COLORS = {"dp": "#1b6ca8", "static": "#c8553d"}
SHEET_COLUMNS = 20


def write_report(folder: Path, results: list[Result], class_names: tuple[str, ...]) -> list[Path]:
    """Writes all pictures of a run into its folder and returns their paths."""
    metrics = read_metrics(folder)
    paths = [
        plot_iterations(metrics, folder / "accuracy_iterations.png"),
        plot_samples(metrics, folder / "accuracy_samples.png"),
    ]
    for result in results:
        if result.source == "dp":
            paths += contact_sheets(result, folder, class_names)
    return paths


def plot_iterations(metrics: list[dict[str, Any]], path: Path) -> Path:
    """Validation accuracy against iterations, a dashed line at every addition (Fig. 2 of the paper)."""
    figure, axes = _axes("optimiser iterations", "accuracy on real validation images, %")
    for source in dict.fromkeys(m["source"] for m in metrics):
        rows = [m for m in metrics if m["event"] == "evaluation" and m["source"] == source]
        color = COLORS.get(source)
        axes.plot([m["step"] for m in rows], [100 * m["accuracy"] for m in rows], color=color, label=source, lw=1.4)
    for m in metrics:
        if m["event"] == "addition":
            axes.axvline(m["step"], color=COLORS.get(m["source"]), ls="--", lw=0.8, alpha=0.6)
    axes.plot([], [], color=COLORS["dp"], ls="--", lw=0.8, label="samples added")
    heights = sorted(100 * m["accuracy"] for m in metrics if m["event"] == "evaluation")
    axes.set_ylim(
        heights[len(heights) // 10] - 1, heights[-1] + 1
    )  # the climb of the first iterations would hide the rest
    return _save(figure, axes, path)


def plot_samples(metrics: list[dict[str, Any]], path: Path) -> Path:
    """Best validation accuracy so far against samples in the pool, and every source's final held-out accuracy."""
    figure, axes = _axes("samples in the pool", "accuracy on real images, %")
    for source in dict.fromkeys(m["source"] for m in metrics):
        best: dict[int, float] = {}
        top = 0.0
        for m in metrics:
            if m["event"] == "evaluation" and m["source"] == source:
                top = max(top, m["accuracy"])
                best[m["samples"]] = top
        axes.plot(
            list(best),
            [100 * v for v in best.values()],
            "o-",
            color=COLORS.get(source),
            ms=4,
            lw=1.4,
            label=f"{source}, best validation",
        )
        for m in metrics:
            if m["event"] == "result" and m["source"] == source:
                axes.plot(
                    m["samples"],
                    100 * m["test_accuracy"],
                    "*",
                    color=COLORS.get(source),
                    ms=13,
                    label=f"{source}, final on held-out test",
                )
    return _save(figure, axes, path)


def contact_sheets(result: Result, folder: Path, class_names: tuple[str, ...]) -> list[Path]:
    """One sheet per round: a row per class, entropy at birth rising from left to right."""
    rounds, entropy, labels = (result.pool.column(name) for name in ("round", "entropy", "label"))
    paths = []
    for number in range(int(rounds.max()) + 1):
        rows = []
        for label in range(len(class_names)):
            members = torch.nonzero((rounds == number) & (labels == label)).flatten()[:SHEET_COLUMNS]
            rows.append(members[entropy[members].argsort()] if number else members)
        title = "initial samples, unguided"
        if number:
            mean = float(entropy[rounds == number].mean())
            title = (
                f"round {number}: guided; entropy under the learner at birth rises to the right, mean {mean:.2f} nats"
            )
        path = folder / f"samples_round_{number:02d}.png"
        paths.append(contact_sheet([result.pool.images(r) for r in rows], class_names, title, path))
    return paths


def contact_sheet(rows: list[Tensor], names: tuple[str, ...], title: str, path: Path) -> Path:
    """Writes a grid of images; ``rows`` holds one uint8 (n, C, H, W) tensor per named row."""
    columns = max(len(row) for row in rows)
    height, width = rows[0].shape[-2:]
    grid = torch.full((len(rows) * (height + 1), columns * (width + 1), rows[0].shape[1]), 255, dtype=torch.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            grid[r * (height + 1) : r * (height + 1) + height, c * (width + 1) : c * (width + 1) + width] = (
                image.permute(1, 2, 0)
            )
    size = (2.0 + 0.42 * columns, 0.6 + 0.42 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(grid.squeeze(-1).numpy(), cmap="gray" if grid.shape[-1] == 1 else None, vmin=0, vmax=255)
    axes.set_yticks([r * (height + 1) + height / 2 for r in range(len(rows))], names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110)
    return path


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, axes: Any, path: Path) -> Path:
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    return path
