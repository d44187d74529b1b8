"""How few steps do: other solvers, step counts and strengths beside the reference, on the same
labels, ids and noise.

A setting keeps what the reference reaches if the mean entropy stays within 5 % of it (either way,
for more entropy is bought with other images) and label agreement falls by no more than one point.
The means decide; their standard errors are reported beside them. To confirm a choice, repeat it
from another first sample.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from dpfast.textfiles import read_json

ENTROPY_WITHIN, AGREEMENT_WITHIN = 0.05, 0.01
SETTINGS: tuple[dict[str, Any], ...] = (
    {"solver": "dpmpp2m", "steps": 10, "every": 3, "omega": 0.027},
    {"solver": "dpmpp2m", "steps": 8, "every": 2, "omega": 0.028},
    {"solver": "dpmpp2m", "steps": 7, "every": 2, "omega": 0.03},
    {"solver": "dpmpp2m", "steps": 6, "every": 2, "omega": 0.036},
    {"solver": "ddim", "steps": 8, "every": 2, "omega": 0.033},
    {"solver": "ddim", "steps": 7, "every": 2, "omega": 0.03},
)
Record = dict[str, Any]
Quality = tuple[
    Tensor, Tensor
]  # of each sample: entropy in nats, 1 where the judge agrees with the label


def keeps(record: Record) -> bool:
    """Whether a record's mean entropy and label agreement stand in for the reference's."""
    entropy, agreement = record["entropy_change"][0], record["agreement_change"][0]
    return abs(entropy) <= ENTROPY_WITHIN and agreement >= -AGREEMENT_WITHIN


def fewest(tried: Iterable[Record]) -> Record | None:
    """The record with the fewest steps that keeps both; of several, the one with the most
    agreement.
    """
    kept = [record for record in tried if keeps(record)]
    return min(
        kept, key=lambda record: (record["steps"], -record["agreement_change"][0]), default=None
    )


def mean(values: Tensor) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def beside(quality: Quality, reference: Quality) -> Record:
    """Means of a quality, and its changes sample by sample: entropy's relative, agreement's
    absolute.
    """
    (change, error), scale = mean(quality[0] - reference[0]), float(reference[0].mean())
    return {
        "samples": len(quality[0]),
        "entropy": mean(quality[0]),
        "entropy_change": (change / scale, error / scale),
        "agreement": mean(quality[1]),
        "agreement_change": mean(quality[1] - reference[1]),
    }


def kept(folder: Path | None, settings: Record, make: Callable[[], Record]) -> Record:
    """What `make` returns, from the file that an earlier call of the same settings has left in the
    folder.
    """
    if folder is None:
        return make() | settings
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    file = folder / f"{name}.json"
    if file.is_file():
        return dict(read_json(file))
    made = make() | settings
    folder.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(made) + "\n", encoding="utf-8")
    part.replace(file)
    return made


def search(
    quality: Callable[[Record], Quality], reference: Record, settings: Iterable[Record]
) -> list[Record]:
    """A record of each setting beside the reference. quality: of a setting's samples, the same ids
    for each.
    """
    base = quality(reference)
    return [reference | beside(base, base)] + [
        option | beside(quality(option), base) for option in settings
    ]


def table(tried: list[Record]) -> str:
    """Markdown, with the setting that `fewest` chooses in bold."""
    chosen = fewest(tried)
    lines = [
        "| solver | steps | guided every | omega | entropy, nats | agreement |",
        "|---|---|---|---|---|---|",
    ]
    for record in tried:
        bold = "**" if record is chosen else ""
        (change, error) = record["entropy_change"]
        (points, points_error) = record["agreement_change"]
        cells = [f"{bold}{record[key]}{bold}" for key in ("solver", "steps", "every", "omega")]
        cells.append(f"{record['entropy'][0]:.3f} ({change:+.1%} ± {error:.1%})")
        cells.append(
            f"{record['agreement'][0]:.1%} ({100 * points:+.1f} ± {100 * points_error:.1f})"
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
