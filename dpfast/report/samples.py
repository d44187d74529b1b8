"""Writes samples as PNG files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dpfast.data.class_folders import LONGEST, safe_name
from dpfast.report.sheets import contact_sheet, reduced
from dpfast.samples import SampleBatch
from dpfast.terminal import Progress
from dpfast.textfiles import to_json

ROWS, COLUMNS = 50, 20  # of an overview


def write_samples(
    batches: Iterable[SampleBatch],
    names: Sequence[str],
    folder: Path,
    *,
    labels: int = ROWS,
    each: int = COLUMNS,
    what: str = "",
    total: int | None = None,
) -> dict[int, Tensor]:
    """Writes ``<sample id>_<label>.png`` for every sample, and ``samples.jsonl``.

    A name's characters that do not belong in a file name become "-".

    what: they are, beside the progress; total: how many they will be.

    Returns, for the first ``labels`` labels, the first images of ``each`` of them as a sheet shows
    them: uint8 (n, C, H, W) by label.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown: dict[int, list[Tensor]] = {}
    with (
        (folder / "samples.jsonl").open("w", encoding="utf-8") as lines,
        Progress(total, "sample", what, leave=True) as bar,
    ):
        for batch in batches:
            columns = batch.labels.tolist(), batch.sample_ids.tolist(), batch.entropy.tolist()
            for image, label, number, entropy in zip(batch.images.cpu(), *columns, strict=True):
                stem = f"{number:06d}_{safe_name(names[label])}".encode()[: LONGEST - len(".png")]
                file = f"{stem.decode(errors='ignore')}.png"
                Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(folder / file)
                row = {"file": file, "sample_id": number, "label": label, "class": names[label]}
                known = {"entropy": entropy} if entropy == entropy else {}
                lines.write(to_json(row | known) + "\n")
                if label in shown or len(shown) < labels:
                    of_label = shown.setdefault(label, [])
                    if len(of_label) < each:
                        of_label.append(reduced(image[None])[0])
            bar.update(len(batch))
    return {label: torch.stack(images) for label, images in shown.items()}


def overview(shown: dict[int, Tensor], names: Sequence[str], folder: Path) -> Path:
    """Writes ``overview.png``, a row of samples for each label, as ``write_samples`` returned
    them.
    """
    labels = sorted(shown)
    rows, called = [shown[label] for label in labels], [names[label] for label in labels]
    return contact_sheet(rows, called, "samples", folder / "overview.png")
