"""The columns of a sample: one packed record of 56 bytes, the same in memory and on a disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpfast.errors import InputError
from dpfast.labels import class_id, shortened

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
LARGEST_FLOAT = float(np.finfo(np.float32).max)
COLUMNS = tuple(name for name in RECORD.names or () if name not in ("offset", "length"))


def as_dict(record: np.void) -> dict[str, Any]:
    """Returns a record's columns as Python numbers; a float32 survives JSON exactly.

    In a shard's ``.json`` NaN is the token NaN, which the webdataset library reads: ``datasets``
    takes types from the first five samples, and null would be the type of a run's entropies, whose
    first samples have none.
    """
    return {name: record[name].item() for name in COLUMNS}


def from_dicts(rows: Sequence[dict[str, Any]], names: Sequence[str] = ()) -> np.ndarray:
    """Returns (B,) ``RECORD`` of what ``as_dict`` gave, offset and length 0.

    A missing column is 0, a missing entropy NaN; a float that is None, as JSON has it for NaN, is
    NaN. Id and label must be there. names: what to call the rows in messages. Raises ``InputError``
    that names row and column of a value that does not fit.
    """
    records = np.zeros(len(rows), RECORD)
    for column in COLUMNS:
        default = {"entropy": float("nan"), "sample_id": None, "label": None}.get(column, 0)
        values = [row.get(column, default) for row in rows]
        if not _all_fit(values, column):
            values = [
                _fitting(value, column, names[place] if names else f"sample {place}")
                for place, value in enumerate(values)
            ]
        records[column] = values
    return records


def _all_fit(values: list[Any], column: str) -> bool:
    """Returns True if the values are Python's numbers of the column's own kind and within its
    range, as in our own files: looked at together, for speed.
    """
    dtype = RECORD[column]
    if dtype.kind == "f":
        return all(type(value) is float for value in values) and not any(
            LARGEST_FLOAT < abs(value) < math.inf for value in values
        )
    limits = np.iinfo(dtype)
    low = 0 if column == "label" else int(limits.min)
    return all(type(value) is int for value in values) and all(
        low <= value <= int(limits.max)
        for value in (min(values, default=0), max(values, default=0))
    )


def _fitting(value: object, column: str, where: str) -> float:
    """Returns ``value`` as a number that ``column`` holds: integers exactly, floats as float32."""
    if column == "label":
        return class_id(value, where)
    dtype = RECORD[column]
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    if dtype.kind == "f":
        if value is None:
            return float("nan")
        odd = isinstance(number, float) and not math.isfinite(number)
        if number is not None and (odd or abs(number) <= LARGEST_FLOAT):
            return float(number)
    elif number is not None and number == number // 1:
        limits = np.iinfo(dtype)
        if limits.min <= number <= limits.max:
            return int(number)
    shown = "missing" if value is None else shortened(value)
    raise InputError(f"{where}: column {column!r} is {shown}, expected {dtype.name}")


def ranges(ids: np.ndarray) -> list[list[int]]:
    """Returns sample ids as inclusive runs in their order: [0, 1, 2, 7] -> [[0, 2], [7, 7]]."""
    if not len(ids):
        return []
    breaks = np.flatnonzero(np.diff(ids) != 1) + 1
    starts = np.r_[0, breaks]
    ends = np.r_[breaks, len(ids)] - 1
    return [[int(ids[a]), int(ids[b])] for a, b in zip(starts, ends, strict=True)]
