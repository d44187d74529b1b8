"""A long-tailed target: how many samples each class is to have, from a file.

A line is a class and its count, after white space or a comma, the class by its name or by its id::

    0 1280
    1,24
    tree frog 5

Of ImageNet-LT's list of training images, whose lines end in a label, such a file is made by::

    awk '{ n[$2]++ } END { for (c in n) print c, n[c] }' ImageNet_LT_train.txt > counts.txt
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dpfast.config.recipe import Practice
from dpfast.errors import InputError
from dpfast.textfiles import lines, read_text

LARGEST = 10**9  # samples of a class


def count_rows(file: str) -> dict[str, int]:
    """Class, as the file calls it -> count, in the order of its lines.

    Raises ``InputError`` with the file and line where there is no file, for a line of another form,
    a count that is no whole number from 0 to ``LARGEST``, and a class that comes twice.
    """
    field = f"class_counts = {file!r}"
    try:
        text = read_text(Path(file))
    except FileNotFoundError:
        raise InputError(f"{field}: no such file") from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines(text), 1):
        if not line.strip():
            continue
        where = f"{field}, line {number}"
        row = re.fullmatch(r"\s*(\S.*?)(?:\s*,\s*|\s+)([^\s,]+)\s*", line)
        if row is None:
            raise InputError(f"{where}: {line.strip()[:60]!r}: expected a class and its count")
        name, count = row.groups()
        if not re.fullmatch(r"[0-9]{1,10}", count) or int(count) > LARGEST:
            raise InputError(
                f"{where}: the count of {name!r} is {count[:60]!r}, expected a whole number from "
                f"0 to {LARGEST}"
            )
        if name in found:
            raise InputError(f"{where}: class {name!r} stands in it twice")
        found[name] = int(count)
    return found


def check_total(practice: Practice) -> None:
    """Raises ``InputError`` where the counts of ``class_counts`` are fewer than the samples that a
    run may end with.
    """
    if not practice.class_counts:
        return
    total, initial = sum(count_rows(practice.class_counts).values()), practice.initial_samples
    wanted = f"initial_samples ({initial})"
    if total >= initial:
        wanted = f"maximum_samples ({practice.maximum_samples}), or say --maximum-samples {total}"
    if total < practice.maximum_samples:
        raise InputError(
            f"class_counts = {practice.class_counts!r}: {total} samples in all; expected at least "
            f"{wanted}"
        )


def class_counts(practice: Practice, classes: Sequence[str]) -> Tensor | None:
    """(K,) int64, the count of each of ``classes``; None where a recipe has none, and labels are
    balanced.

    A class whose name is a number is meant before the class with that id. Raises ``InputError`` as
    ``count_rows`` and ``check_total`` do, for a class that is not known or comes twice under two
    names, and for one that is missing.
    """
    if not practice.class_counts:
        return None
    check_total(practice)
    field = f"class_counts = {practice.class_counts!r}"
    found: dict[int, int] = {}
    for name, count in count_rows(practice.class_counts).items():
        label = _label(name, classes, field)
        if label in found:
            raise InputError(f"{field}: class {label} ({classes[label]!r}) stands in it twice")
        found[label] = count
    missing = [label for label in range(len(classes)) if label not in found]
    if missing:
        more = f" and {len(missing) - 1} more classes" if len(missing) > 1 else ""
        raise InputError(
            f"{field}: no count of class {missing[0]} ({classes[missing[0]]!r}){more}; expected "
            f"one for each of {len(classes)}"
        )
    return torch.tensor([found[label] for label in range(len(classes))], dtype=torch.int64)


def _label(name: str, classes: Sequence[str], field: str) -> int:
    named = [label for label, each in enumerate(classes) if each == name]
    if len(named) > 1:
        raise InputError(f"{field}: {name!r} names classes {named[0]} and {named[1]}; say the id")
    if named:
        return named[0]
    if re.fullmatch(r"[0-9]{1,10}", name) and int(name) < len(classes):
        return int(name)
    raise InputError(
        f"{field}: {name[:60]!r} is no class; expected a name, or an id from 0 to "
        f"{len(classes) - 1}"
    )
