"""Lines of metadata.jsonl, lists of classes and the index of a pipeline's folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from dpfast.generate.pipelines.folder import PipelineFolder
from dpfast.pool.importing import import_pool
from tests.bad_inputs.case import NEVER, Case, listed
from tests.bad_inputs.files import picture
from tests.bad_inputs.tars import samples_of

BAD = object()


def _table(folder: Path, text: bytes | str) -> Path:
    """An image folder of two pictures, described by ``text``."""
    (folder / "train" / "dog").mkdir(parents=True)
    for level in (3, 9):
        (folder / "train" / "dog" / f"{level}.png").write_bytes(picture(level))
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    (folder / "train" / "metadata.jsonl").write_bytes(data)
    return folder


def _row(level: int, **columns: Any) -> str:
    return json.dumps({"file_name": f"dog/{level}.png", **columns}, ensure_ascii=False)


def caption(text: str, random: random.Random, folder: Path) -> Case:
    """A caption says nothing about a pool, whatever is in it."""
    lines = [_row(3, text=text, label=1), _row(9, label=2, text=text)]
    _table(folder, "\n".join(lines) + random.choice(["", "\n"]))
    return Case(lambda: samples_of(folder), ("metadata.jsonl",), [(3, 1), (9, 2)], valid=True)


listed(
    "texts",
    {
        "line-separator": "a\u2028b\u2029c",
        "next-line": "a\u0085b",
        "form-feed": "a\u000cb\u000bc\u001cd",
        "emoji": "\U0001f436 \u202e",
        "nul": "a\0b",
        "quotes": '"\\\n\r\t',
        "long": "x" * 300_000,
        "mark": "\ufeffa",
    },
    caption,
)


def lines(given: tuple[bytes | str, Any], random: random.Random, folder: Path) -> Case:
    text, labels = given
    _table(folder, text)
    right = NEVER if labels is None else list(zip((3, 9), labels, strict=True))
    named = ("metadata.jsonl", "train/dog", "train/xxx", "its tables are empty")
    return Case(lambda: samples_of(folder), named, right)


ONE = _row(3, label=1) + "\n"
listed(
    "texts",
    {
        "windows": ((ONE + _row(9, label=2)).replace("\n", "\r\n"), (1, 2)),
        "mark": ("\ufeff" + ONE + _row(9, label=2), (1, 2)),
        "empty-lines": (ONE + "\n\n" + _row(9, label=2) + "\n\n", (1, 2)),
        "lone-surrogate": (ONE + _row(9, label=2)[:-1] + ', "t": "\\ud800"}', (1, 2)),
        "utf-16": ((ONE + _row(9, label=2)).encode("utf-16"), None),
        "latin-1": (ONE.encode() + _row(9, label=2, text="caf\xe9").encode("latin-1"), None),
        "torn": (ONE + _row(9, label=2)[:-3], None),
        "no-table": (ONE + "[1]\n", None),
        "deep": (ONE + "[" * 100_000, None),
        "one-json-list": (json.dumps([{"file_name": "dog/3.png", "label": 1}]), None),
        "no-file": (ONE + '{"label": 2}\n', None),
        "number-as-file": (ONE + '{"file_name": 9, "label": 2}\n', None),
        "empty-file-name": (ONE + '{"file_name": "", "label": 2}\n', None),
        "missing-file": (ONE + '{"file_name": "dog/8.png", "label": 2}\n', None),
        "folder-as-file": (ONE + '{"file_name": "dog", "label": 2}\n', None),
        "absolute": (ONE + '{"file_name": "/etc/passwd", "label": 2}\n', None),
        "up": (ONE + '{"file_name": "../train/dog/9.png", "label": 2}\n', None),
        "twice": (ONE + ONE, None),
        "twice-otherwise": (ONE + ONE.replace("dog/", "./dog/"), None),
        "nul-in-a-name": (ONE + '{"file_name": "dog/9\\u0000.png", "label": 2}\n', None),
        "long-name": (ONE + '{"file_name": "%s.png", "label": 2}\n' % ("x" * 5000), None),
        "surrogate-name": (ONE + '{"file_name": "dog/\\ud800.png", "label": 2}\n', None),
        "no-label": (ONE + _row(9, text="a dog") + "\n", None),
        "no-labels-at-all": (_row(3, text="a") + "\n" + _row(9, text="b") + "\n", None),
        "null-label": (ONE + _row(9, label=None) + "\n", None),
        "text-label": (ONE + _row(9, label="dog") + "\n", None),
        "fraction": (ONE + _row(9, label=2.5) + "\n", None),
        "negative": (ONE + _row(9, label=-1) + "\n", None),
        "nan-label": (ONE + _row(9, label=float("nan")) + "\n", None),
        "label-list": (ONE + _row(9, label=[2]) + "\n", None),
        "huge-label": (ONE + _row(9, label=1 << 70) + "\n", None),
        "endless-number": (ONE + _row(9)[:-1] + ', "label": ' + "9" * 5000 + "}\n", None),
        "nan-entropy": (ONE + _row(9, label=2, entropy=float("nan")) + "\n", (1, 2)),
        "empty-file": ("", None),
        "blank-file": ("\n\n", None),
    },
    lines,
)


def class_names(given: bytes | str, random: random.Random, folder: Path) -> Case:
    """classes.json beside an image folder, which names the labels."""
    _table(folder, ONE + _row(9, label=2))
    data = given if isinstance(given, bytes) else given.encode()
    (folder / "classes.json").write_bytes(data)
    right = BAD
    if isinstance(given, str) and given.endswith(" "):  # a list that is right
        right = json.loads(given.removeprefix("\ufeff"))
    found = NEVER if right is BAD else right
    if given == "null":  # no names are known
        found = None
    named = ("classes.json", "metadata.jsonl")
    return Case(lambda: import_pool(folder)[1], named, found, valid=right is not BAD)


listed(
    "texts",
    {
        "right": '["a", "b", "c"] ',
        "mark": '\ufeff["ä", "b", "c"] ',
        "torn": '["a", "b"',
        "empty": "",
        "null": "null",
        "text": '"abc"',
        "table": '{"0": "a", "1": "b", "2": "c"}',
        "numbers": "[0, 1, 2]",
        "too-few": '["a", "b"]',
        "empty-list": "[]",
        "lists": '[["a"], ["b"], ["c"]]',
        "utf-16": '["a", "b", "c"]'.encode("utf-16"),
        "latin-1": '["\xe9", "b", "c"]'.encode("latin-1"),
        "deep": "[" * 100_000,
    },
    class_names,
)


def pipeline_names(given: tuple[Any, bytes | str], random: random.Random, folder: Path) -> Case:
    """class_names.json of a pipeline's folder, or id2label of its index."""
    right, text = given
    data = text if isinstance(text, bytes) else text.encode()
    index: dict[str, Any] = {"_class_name": "DiTPipeline"}
    if data.startswith(b"id2label="):
        raw = data.removeprefix(b"id2label=")
        whole = json.dumps(index)[:-1].encode() + b', "id2label": ' + raw + b"}"
        (folder / "model_index.json").write_bytes(whole)
    else:
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        (folder / "class_names.json").write_bytes(data)
    named = ("class_names.json", "id2label", "model_index.json")
    return Case(lambda: PipelineFolder(folder).class_names(None), named, right)


listed(
    "texts",
    {
        "list": (("a", "b"), '["a", "b"]'),
        "mark": (("ä",), '\ufeff["ä"]'),
        "table": (NEVER, '{"0": "a"}'),
        "blank-name": (NEVER, '["a", " "]'),
        "null-name": (NEVER, '["a", null]'),
        "empty": (NEVER, "[]"),
        "torn": (NEVER, '["a"'),
        "utf-16": (NEVER, '["a"]'.encode("utf-16")),
        "latin-1": (NEVER, '["\xe9"]'.encode("latin-1")),
        "deep": (NEVER, "[" * 100_000),
        "ids": (("a", "b"), 'id2label={"1": "b", "0": "a"}'),
        "ids-with-a-gap": (NEVER, 'id2label={"0": "a", "2": "b"}'),
        "ids-of-text": (NEVER, 'id2label={"a": "0"}'),
        "ids-as-list": (NEVER, 'id2label=["a"]'),
        "ids-twice": (NEVER, 'id2label={"0": "a", "00": "b"}'),
        "ids-torn": (NEVER, 'id2label={"0": "a"'),
        "ids-of-numbers": (NEVER, 'id2label={"0": 1}'),
    },
    pipeline_names,
)
