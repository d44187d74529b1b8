"""Text files are UTF-8 whatever the locale, and their lines end at a line feed and nothing else."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from dpfast.errors import InputError, UnreadableError
from dpfast.textfiles import (
    lines,
    parse_json,
    read_json,
    read_json_lines,
    read_text,
    read_whole_json,
    to_json,
)

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("dpfast", "tools", "benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
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


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"b": {"a": 1, "c": 3, "a": 1}}]'])
def test_a_name_that_stands_twice_in_a_table_is_refused(tmp_path: Path, text: str) -> None:
    """Python takes the last of the values, other parsers the first."""
    (tmp_path / "a.jsonl").write_text(text, "utf-8")
    with pytest.raises(InputError, match=r"a\.jsonl.*: 'a' stands in it twice"):
        read_json(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="'a' stands in it twice"):
        list(read_json_lines(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "latin-1"])
def test_bytes_of_json_are_utf_8(encoding: str) -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "x") == {"a": 1}
    with pytest.raises(InputError, match=r"^x.*save it as UTF-8"):
        parse_json('{"a": "\u00e9"}'.encode(encoding), "x")


def test_a_number_that_is_not_finite_is_null_in_json() -> None:
    table = {"a": float("nan"), "b": [1.5, float("inf")], "c": (1, "x", None)}
    assert to_json(table) == '{"a": null, "b": [1.5, null], "c": [1, "x", null]}'


def test_a_file_with_null_bytes_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("no mark".encode("utf-16-le"))
    with pytest.raises(InputError, match="holds null bytes, as UTF-16 and binary files do"):
        read_text(tmp_path / "a")


def test_what_a_kill_cut_short_is_none_and_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    assert read_whole_json(tmp_path / "nosuch") is None
    (tmp_path / "a.json").write_text('{"a": ', "utf-8")
    assert read_whole_json(tmp_path / "a.json") is None
    with pytest.raises(UnreadableError, match="Is a directory"):
        read_whole_json(tmp_path)


def unsafe(tree: ast.AST) -> list[str]:
    """Calls that read or write text in the locale's encoding, or that split a file's text at more
    than line feeds.
    """
    found = []
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else None
        name = call.func.id if isinstance(call.func, ast.Name) else name
        given = {word.arg: word.value for word in call.keywords}
        said = ast.unparse(call)
        positional = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
        encoding = given.get("encoding")
        told = isinstance(encoding, ast.Constant) and encoding.value == "utf-8"
        binary = any(isinstance(mode, str) and "b" in mode for mode in positional)
        if name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute):
            found += [] if told or "utf-8" in positional else [said]
        elif name in OPENS:
            opens_text = not binary and ast.unparse(call.func) not in OTHER_OPENS
            found += [said] if opens_text and not told else []
        elif name == "splitlines":
            of_messages = "__doc__" in said or said == "str(error).splitlines()"
            found += [] if of_messages or "about" in said else [said]
        elif "text" in given or "universal_newlines" in given:
            found += [said] if name in ("run", "Popen", "check_output") and not told else []
    return found


OPENS = (
    "open",
    "fdopen",
    "TextIOWrapper",
    "NamedTemporaryFile",
    "TemporaryFile",
    "FileHandler",
    "LogFile",
)
# of pictures, tars and file descriptors, which hold bytes
OTHER_OPENS = ("Image.open", "tarfile.open", "os.open", "tempfile.TemporaryFile")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_is_utf8_whatever_the_locale(path: Path) -> None:
    if path.name != "textfiles.py":
        assert unsafe(ast.parse(read_text(path))) == []


@pytest.mark.parametrize(
    "line",
    [
        "path.read_text()",
        "path.write_text(text)",
        "path.write_text(text, encoding=None)",
        "path.read_text(encoding='latin-1')",
        "open(name)",
        "path.open('a')",
        "os.fdopen(1, 'w')",
        "path.read_bytes().splitlines()",
        "text.splitlines()",
        "subprocess.run(command, text=True)",
    ],
)
def test_a_call_in_the_locale_s_encoding_is_found(line: str) -> None:
    assert unsafe(ast.parse(line)) == [ast.unparse(ast.parse(line))]


@pytest.mark.parametrize(
    "line", ["path.open('rb')", "Image.open(file)", "path.write_text(text, encoding='utf-8')"]
)
def test_bytes_and_utf8_are_right(line: str) -> None:
    assert unsafe(ast.parse(line)) == []
