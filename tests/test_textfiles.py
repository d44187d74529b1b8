"""Text files are UTF-8 whatever the locale, and their lines end at a line feed and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpfast.errors import InputError
from dpfast.textfiles import lines, read_json, read_json_lines, read_text, to_json

ODD = "a\u2028b\u0085c\x0b\x0c\x1c\x1d\x1e\u2029d"


def test_a_line_ends_at_a_line_feed_and_nothing_else() -> None:
    assert len(ODD.splitlines()) == 9
    assert lines(f"{ODD}\n{ODD}\r\n\nlast") == [ODD, ODD, "", "last"]
    assert lines("") == []
    assert lines("one\n") == ["one"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf8_is_read_with_and_without_its_mark(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("café\r\n".encode(encoding))
    assert read_text(tmp_path / "a") == "café\r\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_another_encoding_is_named(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("x\ncafé\n".encode(encoding))
    named = "line 2: byte 0xe9 is no UTF-8" if encoding == "latin-1" else encoding.upper()
    with pytest.raises(InputError, match=named):
        read_text(tmp_path / "a")


def test_a_folder_in_the_place_of_a_file_is_named_and_a_missing_file_stays_one(
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_text(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "nosuch")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"a": 1} 2'], ids=["open", "deep", "two"])
def test_what_is_no_json_is_named_with_its_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.json: cannot be read as JSON"):
        read_json(tmp_path / "a.json")


def test_json_lines_are_numbered_and_each_holds_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{json.dumps({"a": ODD}, ensure_ascii=False)}\n\n{{"a": 2}}\n', "utf-8")
    assert list(read_json_lines(path)) == [(1, {"a": ODD}), (3, {"a": 2})]
    path.write_text('{"a": 1}\n[2]\n', "utf-8")
    with pytest.raises(InputError, match="line 2: holds no table"):
        list(read_json_lines(path))


def test_a_number_that_is_not_finite_is_null_in_json() -> None:
    table = {"a": float("nan"), "b": [1.5, float("inf")], "c": (1, "x", None)}
    assert to_json(table) == '{"a": null, "b": [1.5, null], "c": [1, "x", null]}'
