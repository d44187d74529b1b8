"""Writes samples as PNG files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from dpfast.data.class_folders import LONGEST, safe_name
from dpfast.report.sheets import contact_sheet
from dpfast.samples import SampleBatch
from dpfast.textfiles import to_json


def write_samples(batches: Iterable[SampleBatch], names: tuple[str, ...], folder: Path) -> Path:
    """Writes ``<sample id>_<label>.png`` for every sample, ``samples.jsonl`` and an overview, whose
    path it returns.

    A name's characters that do not belong in a file name become "-".
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_label: dict[int, list[torch.Tensor]] = {}
    with (
        (folder / "samples.jsonl").open("w", encoding="utf-8") as lines,
        tqdm(unit="sample") as bar,
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
                by_label.setdefault(label, []).append(image)
            bar.update(len(batch))
    labels = sorted(by_label)
    rows = [torch.stack(by_label[label][:20]) for label in labels]
    return contact_sheet(
        rows, tuple(names[label] for label in labels), "samples", folder / "overview.png"
    )
