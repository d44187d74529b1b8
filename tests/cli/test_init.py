"""``dpfast init``: a commented recipe that is the one it came from."""

import os
import sys
from dataclasses import replace

import pytest

from dpfast.cli.init import recipe_text
from dpfast.cli.main import main
from dpfast.config import RECIPES, SECTIONS, Recipe, fields

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.toml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_file_is_the_recipe_that_it_came_from(name, tmp_path, capsys):
    file = tmp_path / "my.toml"
    assert main(["init", str(file), "--from", name]) == 0
    assert capsys.readouterr().err.splitlines()[1].startswith(f"  dpfast run {file}")
    made = Recipe.load(file)
    assert made.name == "my"
    assert replace(made, name=name) == Recipe.load(name)


def test_each_section_has_its_most_used_fields_with_their_words(tmp_path):
    text = recipe_text(Recipe.load("fashion"), tmp_path / "my.toml")
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.replace("\n#", "").split())
    for full, option in fields().items():
        if option.common:
            assert f"{option.help} {option.expected}".removesuffix(", or leave it out") in words
            assert f"\n{full.rpartition('.')[2]} = " in text.replace("\n# ", "\n").replace(
                "[learner.options]", "options = "
            ), full
    assert all(f"\n[{section}]\n" in text for section in SECTIONS)
    assert "dpfast run my.toml --help" in text


def test_a_file_of_ones_own_is_a_start_too(tmp_path):
    awkward = {
        "generator": {
            "class_names": ['12" ruler', "back\\slash", "caf\u00e9, \U0001f600", "tab\t", "\x7f"]
            * 9,
            "negative_prompt": "'''\n\"\"\"",
            "cfg_schedule": [[0, 1e-8], [0.5, 1e16]],
        },
        "learner": {
            "model": "timm:x",
            "lr": 1e-30,
            "options": {"a b": {"c.d": [1, [2.5, {"e": True}]]}, 'q"': "", "n": -3},
        },
        "practice": {"checkpoint_minutes": 0.1, "sources": ["dp", "mine.source:Source"]},
    }
    recipe = Recipe.from_dict({"name": 'of "mine"\nx', **awkward})
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text(recipe_text(recipe, first), encoding="utf-8")
    assert main(["init", str(second), "--from", str(first)]) == 0
    assert replace(Recipe.load(second), name=recipe.name) == recipe
    assert tomllib.loads(second.read_text(encoding="utf-8"))["learner"]["options"]["n"] == -3


def test_a_file_that_is_there_stays_unless_it_is_to_be_replaced(tmp_path, capsys):
    file = tmp_path / "my.toml"
    file.write_text("seed = 7\n")
    assert main(["init", str(file)]) == 2
    assert "exists; --overwrite replaces it" in capsys.readouterr().err
    assert file.read_text() == "seed = 7\n"
    assert main(["init", str(file), "--overwrite"]) == 0
    assert Recipe.load(file).seed == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["my.toml", "--from", "nosuch"], "recipe = 'nosuch': no such recipe; known are fashion"),
        (["my.toml", "--from", "no.toml"], "recipe = 'no.toml': no such file; dpfast init FILE"),
        (["my"], "file = 'my': expected a name that ends in .toml"),
        (["folder.toml"], "file = 'folder.toml': is a folder"),
        (["folder.toml", "--overwrite"], "file = 'folder.toml': is a folder"),
        (["nowhere/my.toml"], "file = 'nowhere/my.toml': no folder 'nowhere'"),
        (["link.toml"], "file = 'link.toml': exists"),
        ([], "dpfast init needs FILE"),
    ],
)
def test_a_file_that_cannot_be_made_is_refused_in_one_line(
    arguments, named, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "link.toml").symlink_to(tmp_path / "gone")
    assert main(["init", *arguments]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert named in error
    assert sorted(os.listdir(tmp_path)) == ["folder.toml", "link.toml"]


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch, capsys):
    def refuses(path, *rest, **named):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.open", refuses)
    monkeypatch.setattr("dpfast.cli.init.Recipe.load", lambda source: Recipe())
    assert main(["init", str(tmp_path / "my.toml")]) == 2
    assert capsys.readouterr().err == f"dpfast: error: {tmp_path}/my.toml: Permission denied\n"
