"""A label is a whole number from 0 on, whatever holds it; nothing else becomes a class."""

from decimal import Decimal

import numpy as np
import pytest
import torch

from dpfast.errors import InputError
from dpfast.labels import class_id, class_id_in_text, class_ids, label_column

WHOLE = [7, 7.0, np.int8(7), np.float32(7), np.uint64(7), np.array([7]), torch.tensor(7)]
OTHERS = [
    *(2.7, -1, -0.5, 1 << 31, 10**400, float("nan"), float("inf"), 1e300),
    *(None, True, np.True_, torch.tensor(True), "7", b"7", "dog", [7], {}, 7j, Decimal(7)),
    *(np.array([7, 8]), torch.tensor([7, 8]), torch.tensor(2.7), np.float64("nan")),
]


@pytest.mark.parametrize("value", WHOLE)
def test_a_whole_number_is_a_label_whatever_holds_it(value):
    assert class_id(value, "x") == 7
    assert type(class_id(value, "x")) is int


@pytest.mark.parametrize("value", OTHERS, ids=repr)
def test_what_is_no_whole_number_is_no_label(value):
    with pytest.raises(InputError, match=r"^row 3: the label is .*, expected a whole number from"):
        class_id(value, "row 3")


def test_a_label_is_below_the_number_of_classes():
    assert class_id(9, "x", 10) == 9
    with pytest.raises(InputError, match="the label is 10, expected a whole number from 0 to 9"):
        class_id(10, "x", 10)


def test_a_text_holds_a_label_in_decimal_digits():
    assert [class_id_in_text(text, "x") for text in (b"7", b" 7\r\n", b"+7", b"007")] == [7] * 4
    for text in (
        b"",
        b"dog",
        b"-1",
        b"2.7",
        b"1_0",
        "\u0667".encode(),
        b"7 8",
        b"\xff",
        b"9" * 5000,
    ):
        with pytest.raises(InputError, match="the label is"):
            class_id_in_text(text, "x")


def test_tensors_of_labels_follow_the_same_rule():
    for dtype in (torch.uint8, torch.int16, torch.int64, torch.uint64):
        assert class_ids(torch.tensor([0, 7], dtype=dtype), 2, "x", 8).tolist() == [0, 7]
    assert class_ids(torch.empty(0, dtype=torch.int64), 0, "x").dtype == torch.int64
    for labels in ([1.0, 2.0], [True, False], [1, 2, 3], [-1, 0], [0, 8], [[1, 2]], [1j, 2]):
        with pytest.raises(InputError, match="x: label"):
            class_ids(torch.tensor(labels), 2, "x", 8)
    with pytest.raises(InputError, match="x: label"):
        class_ids(torch.tensor([0, (1 << 64) - 1], dtype=torch.uint64), 2, "x")


def test_the_column_of_labels_is_the_one_asked_for_or_the_only_one():
    assert label_column(["image", "label", "fine"], ["fine"], None, "f") == "label"
    assert label_column(["image", "label", "fine"], ["label"], "fine", "f") == "fine"
    assert label_column(["img", "labels"], ["labels"], None, "f") == "labels"
    for wanted, class_labels in ((None, []), (None, ["fine", "coarse"]), ("text", [])):
        with pytest.raises(InputError, match=r"f: .*it has 'fine', 'coarse'; name the label"):
            label_column(["fine", "coarse"], class_labels, wanted, "f")
