"""The columns of a sample: one packed record of 56 bytes, the same in memory and on a disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpfast.errors import InputError

RECORD = np.dtype(
    [
        ("sample_id", "<i8"),
        ("seed", "<i8"),  # of the run; with the id, the key of the sample's noise
        ("offset", "<i8"),  # where the payload starts: in the pool's chunks, on a disk in the shard
        ("label", "<i4"),
        ("learner_step", "<i4"),  # optimiser steps of the guiding learner at birth
        ("round", "<i4"),  # the addition that brought the sample; 0: the initial samples
        ("steps", "<i4"),  # of the solver
        ("omega", "<f4"),
        ("cfg_scale", "<f4"),
        ("entropy", "<f4"),  # nats, under the learner at birth; NaN without one
        ("length", "<i4"),  # bytes of the payload
    ]
)
COLUMNS = tuple(name for name in RECORD.names or () if name not in ("offset", "length"))


def as_dict(record: np.void) -> dict[str, Any]:
    """A record's columns as Python numbers; a float32 survives JSON exactly, NaN as the token
    NaN.
    """
    return {name: record[name].item() for name in COLUMNS}


def from_dicts(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """(B,) ``RECORD`` of what ``as_dict`` gave, offset and length 0. A missing column is 0, a
    missing entropy NaN.

    Raises ``InputError`` that names the column whose value does not fit.
    """
    records = np.zeros(len(rows), RECORD)
    for name in COLUMNS:
        default = float("nan") if name == "entropy" else 0
        try:
            records[name] = [row[name] if row.get(name) is not None else default for row in rows]
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"column {name!r}: {error}") from None
    return records


def ranges(ids: np.ndarray) -> list[list[int]]:
    """Sample ids as inclusive runs in their order: [0, 1, 2, 7] -> [[0, 2], [7, 7]]."""
    if not len(ids):
        return []
    breaks = np.flatnonzero(np.diff(ids) != 1) + 1
    starts = np.r_[0, breaks]
    ends = np.r_[breaks, len(ids)] - 1
    return [[int(ids[a]), int(ids[b])] for a, b in zip(starts, ends, strict=True)]
