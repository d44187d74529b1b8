"""The same samples under several settings: a folder for each setting, and pictures in which they
lie side by side (Figs. 8 and 10 to 13 of arXiv 2502.15588).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpfast.generate.sampler import GuidedSampler
from dpfast.practice.saved_learners import SavedLearner
from dpfast.report.samples import overview, write_samples
from dpfast.report.sheets import contact_sheet, reduced

COLUMNS = 24  # samples of a row of a grid
TRAJECTORIES = 48  # rows of a picture of trajectories
AT_ONCE = 4  # samples whose trajectories are made together


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting: strengths of guidance, omega 0 being unguided, and the learner of a run that
    guides, or None.
    """

    omega: float
    anchor: float = 0.0
    learner: SavedLearner | None = None

    @property
    def strengths(self) -> dict[str, Any]:
        """What a sampler takes of it, as keyword arguments."""
        step = 0 if self.learner is None else self.learner.step
        return {"omega": self.omega, "anchor": self.anchor, "learner_step": step}

    def name(self, among: Sequence[Cell]) -> str:
        """It in words, of which those are left out that all ``among`` share."""
        parts = []
        if self.learner is not None and len({_moment(cell) for cell in among}) > 1:
            parts.append(self.learner.moment)
        if len({cell.omega for cell in among}) > 1:
            parts.append(f"omega {self.omega:g}")
        if len({cell.anchor for cell in among if cell.omega}) > 1 and self.omega:
            parts.append(f"anchor {self.anchor:g}")
        return ", ".join(parts)

    def folder(self, among: Sequence[Cell]) -> str:
        """The name of its folder; "." where it is alone."""
        return self.name(among).replace(", ", "_").replace(" ", "-") or "."

    def described(self, among: Sequence[Cell]) -> dict[str, Any]:
        """Its row in settings.json."""
        row: dict[str, Any] = {"folder": self.folder(among), "omega": self.omega}
        row |= {"anchor": self.anchor}
        if self.learner is not None:
            row |= {
                "source": self.learner.source,
                "moment": self.learner.moment,
                "step": self.learner.step,
            }
        return row


def cells_of(
    strengths: Sequence[tuple[float, float]], learners: Sequence[SavedLearner]
) -> list[Cell]:
    """A cell for each learner of a run, if there are any, and each omega and anchor."""
    guides: Sequence[SavedLearner | None] = learners or [None]
    return [
        Cell(omega=omega, anchor=anchor, learner=learner)
        for learner in guides
        for omega, anchor in strengths
    ]


def _moment(cell: Cell) -> str | None:
    return None if cell.learner is None else cell.learner.moment


def write_cells(
    cells: Sequence[Cell],
    sampler: GuidedSampler,
    labels: Sequence[int],
    count: int,
    out: Path,
    *,
    stepwise: GuidedSampler | None = None,
) -> list[Path]:
    """Writes ``count`` samples of each label under every setting, the same ids under each, and
    returns the pictures on which they are seen together.

    One setting has its samples in ``out`` itself, beside an overview.png. Several have a folder
    each, and ``out`` has grid.png, a row for each.

    Args:
        cells: those of one learner one after the other.
        sampler: made with the learner of the first one, into which the others' weights are loaded.
        labels: class ids.
        count: samples of each.
        out: a folder, made where it does not exist.
        stepwise: a sampler with the same learner, for a picture of trajectories, trajectory.png:
            what each step predicts, a row for a sample and a setting.

    Raises ``InputError``, before anything is written, for a setting that the sampler refuses.
    """
    names = sampler.pipeline.class_names
    ordered = [label for label in labels for _ in range(count)]
    for cell in cells:
        sampler.stream(ordered, **cell.strengths)
    grid = len(cells) > 1
    part = {"labels": COLUMNS, "each": max(1, COLUMNS // len(labels))} if grid else {}
    called = [cell.name(cells) for cell in cells]
    followed = _spread(labels, count, max(1, TRAJECTORIES // len(cells)))
    shown, trajectories, pictures = [], [], []
    for cell, name in zip(cells, called, strict=True):
        _load(cell, sampler)
        if stepwise is not None:
            trajectories.append(_trajectories(stepwise, cell, ordered, followed))
        batches = sampler.stream(ordered, **cell.strengths)
        where = out / cell.folder(cells)
        shown.append(write_samples(batches, names, where, what=name, **part))
    if grid:
        pictures.append(_grid(shown, called, names, len(ordered), out))
    else:
        pictures.append(overview(shown[0], names, out))
    if stepwise is not None:
        rows = [made[place] for place in range(len(followed)) for made in trajectories]
        described = [
            f"{names[ordered[row]]} {row}{f': {name}' if name else ''}"
            for row in followed
            for name in called
        ]
        steps = [(str(step + 1), 1) for step in range(len(rows[0]) - 1)]
        title = f"what each step predicts, {len(followed)} of {len(ordered)} samples"
        path = out / "trajectory.png"
        pictures.append(contact_sheet(rows, described, title, path, columns=[*steps, ("end", 1)]))
    return pictures


def _load(cell: Cell, sampler: GuidedSampler) -> None:
    """Gives the sampler's learner the weights of the cell's."""
    live = sampler.learner
    if cell.learner is not None and isinstance(live, torch.nn.Module):
        live.load_state_dict(cell.learner.module.state_dict())


def _spread(labels: Sequence[int], count: int, most: int) -> list[int]:
    """At most ``most`` rows of ``count`` for each label: as many of each label as there is room
    for.
    """
    each = min(count, max(1, most // len(labels)))
    return [place * count + row for place in range(len(labels)) for row in range(each)][:most]


def _trajectories(
    sampler: GuidedSampler, cell: Cell, ordered: list[int], rows: list[int]
) -> list[Tensor]:
    """What each step predicts of the samples ``rows``, and how they end: (steps + 1, C, H, W) of
    each.
    """
    made: list[Tensor] = []
    for start in range(0, len(rows), AT_ONCE):
        ids = rows[start : start + AT_ONCE]
        given = [ordered[row] for row in ids]
        steps = [
            reduced(batch.images.cpu())
            for batch in sampler.predictions(given, ids, **cell.strengths)
        ]
        made += torch.stack(steps, 1).unbind()
    return made


def _grid(
    shown: Sequence[dict[int, Tensor]],
    called: Sequence[str],
    names: Sequence[str],
    total: int,
    out: Path,
) -> Path:
    """Writes grid.png: a row for each cell, the same samples in each."""
    rows = [torch.cat(list(of_cell.values())) for of_cell in shown]
    columns = [(names[label], len(images)) for label, images in shown[0].items()]
    title = f"the same samples in every row, {len(rows[0])} of {total}"
    return contact_sheet(rows, called, title, out / "grid.png", columns=columns)
