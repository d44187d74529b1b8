"""Files of strengths by class, and what is wrong with others, in one line."""

import re

import pytest

from dpfast.data.class_files import class_strengths
from dpfast.errors import InputError

NAMES = ("cat", "dog", "red bicycle")


def test_classes_that_are_not_named_are_left_out(tmp_path):
    (tmp_path / "omega").write_text("red bicycle, -1e-1\r\n\r\n 0\t.25\n", encoding="utf-8")
    found = class_strengths("omega_classes", str(tmp_path / "omega"), NAMES)
    assert found == {2: -0.1, 0: 0.25}
    assert class_strengths("omega_classes", "", NAMES) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cow 0.1\n", ": 'cow' is no class; expected a name, or an id from 0 to 2"),
        ("3 0.1\n", ": '3' is no class; expected a name, or an id from 0 to 2"),
        ("\ncat nan\n", ", line 2: the value of 'cat' is 'nan', expected a number of at least 0"),
        ("cat inf\n", ", line 1: the value of 'cat' is 'inf', expected"),
        ("cat 1e999\n", ", line 1: the value of 'cat' is '1e999', expected"),
        (
            "cat 1e39\n",
            ", line 1: the value of 'cat' is '1e39', expected a number of at least 0, of",
        ),
        ("cat 1_0\n", ", line 1: the value of 'cat' is '1_0', expected"),
        ("cat \u0663\n", ", line 1: the value of 'cat' is '\u0663', expected"),
        ("cat much\n", ", line 1: the value of 'cat' is 'much', expected"),
        ("cat -0.1\n", ", line 1: the value of 'cat' is '-0.1', expected a number of at least 0"),
        ("cat 1\ncat 2\n", ", line 2: class 'cat' stands in it twice"),
        ("cat 1\n0 2\n", ": class 0 ('cat') stands in it twice"),
        ("0.1\n", ", line 1: '0.1': expected a class and its value"),
        ("\n", ": names no class; expected at least one"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(text, said, tmp_path):
    file = tmp_path / "anchor"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"^anchor_classes = .*" + re.escape(said)) as raised:
        class_strengths("anchor_classes", str(file), NAMES, low=0)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_none_is_named(tmp_path):
    with pytest.raises(InputError, match=r"^omega_classes = .*none': no such file$"):
        class_strengths("omega_classes", str(tmp_path / "none"), NAMES)
