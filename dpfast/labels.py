"""The definition of a label, wherever one is read: in parquet, in a table beside images, in a tar,
in a ``Dataset``.

A label is a whole number from 0 on. Whole floats count, since pandas makes them of integers beside
missing values; truth values, text and missing values do not: nothing that is not understood becomes
a class.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from dpfast.errors import InputError

LARGEST = (1 << 31) - 1  # what the record of a sample holds


def class_id(value: object, what: str, classes: int | None = None) -> int:
    """Returns the class id that ``value`` is: an integer, a whole float, or an array or tensor of
    one.

    what: where it stands, for the message. classes: how many there are, where that is known. Raises
    ``InputError`` for everything else, and for numbers outside of 0 to ``classes`` - 1.
    """
    number = value
    if hasattr(value, "item"):  # of NumPy or torch
        try:
            number = value.item()
        except (TypeError, ValueError, RuntimeError):  # several values
            number = None
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    top = LARGEST if classes is None else classes - 1
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= top:
        shown = "missing" if value is None else shortened(value)
        raise InputError(f"{what}: the label is {shown}, expected a whole number from 0 to {top}")
    return number


def class_id_in_text(text: bytes, what: str, classes: int | None = None) -> int:
    """Returns ``class_id`` of a text that holds a number in decimal digits, as a tar's ``.cls``
    does.
    """
    found = re.fullmatch(rb"[+-]?[0-9]{1,20}", text.strip())
    return class_id(int(found[0]) if found else text.decode(errors="replace"), what, classes)


def class_ids(labels: Tensor, count: int, what: str, classes: int | None = None) -> Tensor:
    """Returns the class ids in ``labels`` (count,), of any integer dtype, as int64 on their device.

    what: the argument that they are of; classes: how many there are, where that is known. Raises
    ``InputError`` for another shape or dtype, and for numbers outside of 0 to ``classes`` - 1.
    """
    dtype = labels.dtype
    if (
        labels.shape != (count,)
        or dtype.is_floating_point
        or dtype.is_complex
        or dtype == torch.bool
    ):
        raise InputError(
            f"{what}: labels are {dtype} {tuple(labels.shape)}, expected an integer for each of "
            f"{count} samples"
        )
    ids = labels.to(torch.int64)
    top = LARGEST if classes is None else classes - 1
    wrong = ids[(ids < 0) | (ids > top)]
    if len(wrong):
        raise InputError(f"{what}: label {int(wrong[0])}, expected 0 to {top}")
    return ids


def label_column(
    columns: Sequence[str], class_labels: Sequence[str], wanted: str | None, where: str
) -> str:
    """Returns the column of ``columns`` that holds the labels: ``wanted``, else "label", else the
    only one that is declared as a class.

    class_labels: the columns that the file declares so (``ClassLabel`` of Hugging Face). where: the
    file, for the message. Raises ``InputError`` that lists the columns where none is unambiguous.
    """
    if wanted is None:
        if "label" in columns:
            return "label"
        if len(class_labels) == 1:
            return class_labels[0]
    elif wanted in columns:
        return wanted
    raise no_label(wanted, columns, where)


def no_label(
    wanted: str | None, columns: Sequence[str], where: str, besides: str = ""
) -> InputError:
    """Returns the error for a file or a sample of which it is not clear what its label is. besides:
    what else was looked at.
    """
    listed = ", ".join(repr(column) for column in columns) or "nothing"
    problem = "no label" if wanted is None else f"label_column = {wanted!r} is not there"
    return InputError(
        f"{where}: {problem}; it has {listed}{besides}; name the label by --label-column"
    )


def shortened(value: object) -> str:
    """Returns ``repr`` of a value in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
