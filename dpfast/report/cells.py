"""The same samples under several settings: a folder for each setting, and pictures in which they
lie side by side (Figs. 8 and 10 to 13 of arXiv 2502.15588).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpfast.config import Guidance
from dpfast.generate.sampler import GuidedSampler
from dpfast.practice.saved_learners import SavedLearner
from dpfast.report.samples import overview, write_samples
from dpfast.report.sheets import contact_sheet, reduced
from dpfast.sources.strengths import Strengths

ROWS, COLUMNS = 100, 24  # settings of a grid, and samples of each of its rows
TRAJECTORIES = 48  # rows of a picture of trajectories
AT_ONCE = 4  # samples whose trajectories are made together


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting: strengths of guidance, omega 0 being unguided, those of classes that have their
    own, and the learner of a run that guides, or None.
    """

    omega: float
    anchor: float = 0.0
    by_class: Strengths | None = None
    learner: SavedLearner | None = None

    def told(self, labels: Sequence[int]) -> dict[str, Any]:
        """Returns a sampler's keyword arguments for samples of these labels."""
        step = 0 if self.learner is None else self.learner.step
        strengths = self.by_class or Strengths(omega=self.omega, anchor=self.anchor)
        return {**strengths.rows(torch.tensor(labels)), "learner_step": step}

    @property
    def guided(self) -> bool:
        """True if any of its samples is."""
        return bool(self.omega) or self.by_class is not None

    def name(self, among: Sequence[Cell]) -> str:
        """Returns it in words, of which those are left out that all ``among`` share."""
        parts = []
        if self.learner is not None and len({_moment(cell) for cell in among}) > 1:
            parts.append(self.learner.moment)
        if len({cell.omega for cell in among}) > 1:
            parts.append(f"omega {_number(self.omega)}")
        if len({cell.anchor for cell in among if cell.guided}) > 1 and self.guided:
            parts.append(f"anchor {_number(self.anchor)}")
        return ", ".join(parts)

    def folder(self, among: Sequence[Cell]) -> str:
        """Returns the name of its folder; "." where it is alone."""
        return self.name(among).replace(", ", "_").replace(" ", "-") or "."

    def described(self, among: Sequence[Cell]) -> dict[str, Any]:
        """Returns its row in settings.json."""
        row: dict[str, Any] = {"folder": self.folder(among), "omega": self.omega}
        row |= {"anchor": self.anchor}
        if self.by_class is not None:
            found = {"omega": self.by_class.omega, "anchor": self.by_class.anchor}
            tables = {name: v for name, v in found.items() if isinstance(v, Tensor)}
            row |= {f"{name}_by_class": values.tolist() for name, values in tables.items()}
        if self.learner is not None:
            row |= {
                "source": self.learner.source,
                "moment": self.learner.moment,
                "step": self.learner.step,
            }
        return row


def cells_of(
    guidances: Sequence[Guidance], names: Sequence[str], learners: Sequence[SavedLearner]
) -> list[Cell]:
    """Returns a cell for each learner of a run, if there are any, and each omega and anchor, whose
    files may have others for classes of ``names``.

    Settings without any omega, which an anchor needs, are one. Raises ``InputError`` as
    ``Strengths.of`` does.
    """
    cells = []
    for guidance in guidances:
        strengths = Strengths.of(guidance, names)
        varied = bool(guidance.omega_classes or guidance.anchor_classes)
        anchor = guidance.anchor if strengths.guides else 0.0
        by_class = strengths if varied and strengths.guides else None
        cells.append(Cell(omega=guidance.omega, anchor=anchor, by_class=by_class))
    kinds = {(cell.omega, cell.anchor): cell for cell in cells}.values()
    guides: Sequence[SavedLearner | None] = learners or [None]
    return [replace(cell, learner=learner) for learner in guides for cell in kinds]


def _number(value: float) -> str:
    """Returns a number as one types it, and another text for every other number."""
    return repr(float(value)).removesuffix(".0")


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
        sampler.stream(ordered, **cell.told(ordered))
    grid = len(cells) > 1
    part = {"labels": COLUMNS, "each": max(1, COLUMNS // len(labels))} if grid else {}
    called = [cell.name(cells) for cell in cells]
    followed = _spread(labels, count, max(1, TRAJECTORIES // len(cells)))
    shown, pictures = [], []
    trajectories: list[list[Tensor]] = []
    for cell, name in zip(cells, called, strict=True):
        _load(cell, sampler)
        if stepwise is not None and len(trajectories) < TRAJECTORIES:
            trajectories.append(_trajectories(stepwise, cell, ordered, followed))
        batches = sampler.stream(ordered, **cell.told(ordered))
        where = out / cell.folder(cells)
        shown.append(write_samples(batches, names, where, what=name, total=len(ordered), **part))
    if grid:
        pictures.append(_grid(shown, called, names, len(ordered), out))
    else:
        pictures.append(overview(shown[0], names, out))
    if stepwise is not None:
        rows = [made[place] for place in range(len(followed)) for made in trajectories]
        described = [
            f"{names[ordered[row]]} {row}{f': {name}' if name else ''}"
            for row in followed
            for name in called[: len(trajectories)]
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
    """Returns at most ``most`` rows of ``count`` for each label: as many of each label as there is
    room for.
    """
    each = min(count, max(1, most // len(labels)))
    return [place * count + row for place in range(len(labels)) for row in range(each)][:most]


def _trajectories(
    sampler: GuidedSampler, cell: Cell, ordered: list[int], rows: list[int]
) -> list[Tensor]:
    """Returns the predictions of each step for the samples ``rows``, and their ends: (steps + 1, C,
    H, W) of each.
    """
    made: list[Tensor] = []
    for start in range(0, len(rows), AT_ONCE):
        ids = rows[start : start + AT_ONCE]
        given = [ordered[row] for row in ids]
        steps = [
            reduced(batch.images.cpu())
            for batch in sampler.predictions(given, ids, **cell.told(given))
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
    """Writes grid.png: a row for each cell, the first ``ROWS``, the same samples in each."""
    rows = [torch.cat(list(of_cell.values())) for of_cell in shown[:ROWS]]
    columns = [(names[label], len(images)) for label, images in shown[0].items()]
    title = f"the same samples in every row, {len(rows[0])} of {total}"
    if len(rows) < len(shown):
        title += f"; {len(rows)} of {len(shown)} settings"
    return contact_sheet(rows, called[:ROWS], title, out / "grid.png", columns=columns)
