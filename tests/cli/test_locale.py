"""Recipes, class names, folders and pages that are not ASCII, under a locale that knows nothing
else.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from dpfast.config import ASSETS, Recipe
from dpfast.textfiles import read_json_lines, read_text

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
NAMES = ("Café", "Straße", "靴", *(f"class {i}" for i in range(3, 10)))


def dpfast(folder, *arguments, environment=ASCII):
    return subprocess.run(
        [sys.executable, "-m", "dpfast", *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
    )


def test_a_recipe_and_class_names_beyond_ascii_work_under_the_c_locale(tmp_path):
    pipeline = shutil.copytree(ASSETS / "fashion", tmp_path / "modèle")
    (pipeline / "class_names.json").write_text(json.dumps(NAMES, ensure_ascii=False), "utf-8")
    text = 'name = "été"\n[generator]\npipeline = "modèle"\nsteps = 2\n[guidance]\nomega = 0\n'
    (tmp_path / "été.toml").write_text(text, "utf-8")
    said = dpfast(
        tmp_path, "sample", "--recipe", "été.toml", "--labels", "Café,靴", "--out", "bilder-ü"
    )
    assert said.returncode == 0, said.stderr
    rows = [row for _, row in read_json_lines(tmp_path / "bilder-ü" / "samples.jsonl")]
    assert {row["class"] for row in rows} == {"Café", "靴"}
    assert all((tmp_path / "bilder-ü" / row["file"]).is_file() for row in rows)


def test_a_report_of_a_run_with_such_a_name_is_a_page_in_utf8(tmp_path):
    run = tmp_path / "läufe"
    run.mkdir()
    recipe = Recipe.load("fashion").to_dict() | {"name": "été 靴"}
    (run / "recipe.json").write_text(json.dumps(recipe, ensure_ascii=False), "utf-8")
    said = dpfast(tmp_path, "report", "läufe", "--out", "seite-é")
    assert said.returncode == 0, said.stderr
    assert "été 靴" in read_text(tmp_path / "seite-é" / "index.html")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252"])
def test_a_recipe_in_another_encoding_ends_in_one_line(tmp_path, encoding):
    (tmp_path / "a.toml").write_bytes('name = "café"\n'.encode(encoding))
    said = dpfast(tmp_path, "plan", "a.toml", environment={})
    assert said.returncode == 2
    (line,) = said.stderr.strip().split("\n")
    assert line.startswith("dpfast: error: a.toml")
    assert line.endswith("save it as UTF-8")


def test_what_a_stream_cannot_say_is_escaped(tmp_path):
    said = dpfast(tmp_path, "plan", "nö.toml", environment={"PYTHONIOENCODING": "ascii"})
    assert said.returncode == 2
    assert "n\\xf6.toml" in said.stderr
