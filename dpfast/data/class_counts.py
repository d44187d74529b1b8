"""A long-tailed target: how many samples each class is to have, from a file
(``dpfast.data.class_files``).

Of ImageNet-LT's list of training images, whose lines end in a label, such a file is made by::

    awk '{ n[$2]++ } END { for (c in n) print c, n[c] }' ImageNet_LT_train.txt > counts.txt
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from dpfast.config.practice import Practice
from dpfast.data.class_files import by_label, class_rows
from dpfast.errors import InputError

LARGEST = 10**9  # samples of a class


def count_rows(file: str) -> dict[str, int]:
    """Maps each class, as the file calls it, to its count, in the order of the lines.

    Raises ``InputError`` as ``class_rows`` does, for a count that is no whole number from 0 to
    ``LARGEST`` too.
    """

    def parsed(text: str) -> int | None:
        whole = re.fullmatch(r"[0-9]{1,10}", text) is not None
        return int(text) if whole and int(text) <= LARGEST else None

    return class_rows("class_counts", file, "count", parsed, f"a whole number from 0 to {LARGEST}")


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
    """Returns (K,) int64, the count of each of ``classes``; None where a recipe has none, and
    labels are balanced.

    Raises ``InputError`` as ``count_rows``, ``check_total`` and ``by_label`` do, and for a class
    that is missing.
    """
    if not practice.class_counts:
        return None
    check_total(practice)
    file = practice.class_counts
    found = by_label("class_counts", file, count_rows(file), classes)
    missing = [label for label in range(len(classes)) if label not in found]
    if missing:
        more = f" and {len(missing) - 1} more classes" if len(missing) > 1 else ""
        raise InputError(
            f"class_counts = {file!r}: no count of class {missing[0]} "
            f"({classes[missing[0]]!r}){more}; expected one for each of {len(classes)}"
        )
    return torch.tensor([found[label] for label in range(len(classes))], dtype=torch.int64)
