"""Files of class counts: what they may say, and what is wrong with others, in one line."""

import dataclasses
import re

import pytest

from dpfast.config import Recipe
from dpfast.data.class_counts import class_counts
from dpfast.errors import InputError, RecipeError
from dpfast.planning.plan import plan

NAMES = ("cat", "dog", "red bicycle")


def practice(file, **changes):
    return dataclasses.replace(Recipe.load("fashion").practice, class_counts=str(file), **changes)


@pytest.mark.parametrize(
    "text",
    [
        "cat 5000\ndog 900\nred bicycle 100\n",
        "2,100\r\n0,5000\r\n\r\n1,900",
        "\ufeffdog, 900\n 0\t5000 \nred bicycle,\t100\n",
    ],
)
def test_a_class_is_called_by_name_or_id_in_any_order(text, tmp_path):
    (tmp_path / "counts").write_text(text, encoding="utf-8", newline="")
    found = class_counts(practice(tmp_path / "counts"), NAMES)
    assert found.tolist() == [5000, 900, 100]


def test_a_name_that_is_a_number_is_meant_before_an_id(tmp_path):
    (tmp_path / "counts").write_text("1 6000\n0 0\n2 7\n")
    assert class_counts(practice(tmp_path / "counts"), ("1", "0", "two")).tolist() == [6000, 0, 7]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cat 5000\ndog 1000\n", ": no count of class 2 ('red bicycle'); expected one for each"),
        ("cat 6000\n", ": no count of class 1 ('dog') and 1 more classes; expected one for each"),
        ("cat -1\n", ", line 1: the count of 'cat' is '-1', expected a whole number from 0"),
        ("\ncat 1.5\n", ", line 2: the count of 'cat' is '1.5', expected a whole number"),
        ("cat many\n", ", line 1: the count of 'cat' is 'many', expected a whole number"),
        ("cat nan\n", ", line 1: the count of 'cat' is 'nan', expected a whole number"),
        ("cat 12345678901234\n", ", line 1: the count of 'cat' is '12345678901234', expected"),
        ("cat \u0663\n", ", line 1: the count of 'cat' is '\u0663', expected a whole number"),
        ("cat 1\ncat 2\n", ", line 2: class 'cat' stands in it twice"),
        ("cat 6000\n0 2\n", ": class 0 ('cat') stands in it twice"),
        ("00 6000\n0 2\n", ": class 0 ('cat') stands in it twice"),
        ("cow 6000\n", ": 'cow' is no class; expected a name, or an id from 0 to 2"),
        ("3 6000\n", ": '3' is no class; expected a name, or an id from 0 to 2"),
        ("-1 6000\n", ": '-1' is no class; expected a name, or an id from 0 to 2"),
        ("6000\n", ", line 1: '6000': expected a class and its count"),
        ("cat,\n", ", line 1: 'cat,': expected a class and its count"),
        ("", ": 0 samples in all; expected at least initial_samples (1000)"),
        ("0 0\n1 0\n2 0\n", ": 0 samples in all; expected at least initial_samples (1000)"),
        (
            "0 10\n1 10\n2 989\n",
            ": 1009 samples in all; expected at least maximum_samples (4000), ",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(text, said, tmp_path):
    (tmp_path / "counts").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"^class_counts = .*" + re.escape(said)) as raised:
        class_counts(practice(tmp_path / "counts"), NAMES)
    assert "\n" not in str(raised.value)


def test_a_name_of_two_classes_needs_their_ids(tmp_path):
    (tmp_path / "counts").write_text("crane 6000\n1 2\n")
    with pytest.raises(InputError, match=r"'crane' names classes 0 and 1; say the id$"):
        class_counts(practice(tmp_path / "counts"), ("crane", "crane"))


def test_a_file_that_is_none_is_named(tmp_path):
    with pytest.raises(InputError, match=r"^class_counts = .*none': no such file$"):
        class_counts(practice(tmp_path / "none"), NAMES)
    with pytest.raises(InputError, match="cannot be read"):
        class_counts(practice(tmp_path), NAMES)


def test_a_plan_looks_at_the_sum(tmp_path):
    (tmp_path / "counts").write_text("0 2100\n")
    recipe = Recipe.load("fashion", class_counts=str(tmp_path / "counts"))
    with pytest.raises(InputError, match=r"2100 samples in all; .* say --maximum-samples 2100$"):
        plan(recipe, "h100")


def test_what_contradicts_class_counts_is_refused():
    with pytest.raises(RecipeError, match=r"^allot = 'difficulty': expected 'equal' with class"):
        practice("counts", allot="difficulty")
    with pytest.raises(RecipeError, match=r"^prune_within = 'overall': expected 'class' with"):
        practice("counts", sources=("prune",), prune_within="overall")
    assert practice("counts", prune_within="overall").class_counts == "counts"
