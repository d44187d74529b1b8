"""Objects that a recipe names by their import paths."""

import pytest

from dpfast.config import Recipe, imported, is_import_path
from dpfast.errors import InputError, RecipeError


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A module ``mine`` of the user's, one that raises when imported, and one that leaves."""
    (tmp_path / "mine.py").write_text(
        "class Scores:\n    @staticmethod\n    def gini(logits, labels):\n"
        "        return 1 - logits.softmax(1).square().sum(1)\n\n"
        "number = 3\n\n\ndef __getattr__(name):\n"
        "    raise KeyError(name) if name == 'nothing' else AttributeError\n"
    )
    (tmp_path / "raises.py").write_text("raise ZeroDivisionError('one\\ntwo')\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "torn.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_an_import_path_is_a_module_and_a_name_in_it():
    right = ("mine:gini", "my.own.mine:Scores.gini", "_a:b")
    wrong = ("gini", ":gini", "mine:", "mine.py:gini", "my/mine:gini", "a:b:c", "..a:b", "a: b", "")
    assert list(map(is_import_path, (*right, "größe:maß"))) == [True] * 4
    assert list(map(is_import_path, wrong)) == [False, False, False, True, *[False] * 5]
    assert imported("criterion", "mine:number") == 3
    assert imported("criterion", "mine:Scores.gini").__name__ == "gini"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere:gini", r"cannot import nowhere \(No module named 'nowhere'\)"),
        ("mine.py:gini", r"cannot import mine.py \(No module named 'mine.py'; 'mine' is not a"),
        ("raises:gini", r"cannot import raises \(one"),
        ("leaves:gini", r"cannot import leaves \(0\)"),
        ("torn:gini", r"cannot import torn \("),
        ("mine:nothing", "'nothing'"),
        ("mine:Scores.nothing", "has no attribute 'nothing'"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_line_that_names_the_field(path, said):
    with pytest.raises(InputError, match=f"^criterion = '{path}': .*{said}") as caught:
        imported("criterion", path)
    assert "\n" not in str(caught.value)


def test_a_recipe_holds_the_path_of_a_criterion_and_refuses_what_is_none():
    recipe = Recipe.load("fashion", criterion="mine:Scores.gini")
    assert Recipe.from_dict(recipe.to_dict()).guidance.criterion == "mine:Scores.gini"
    for wrong in ("gini", "mine:", "a:b:c", 3):
        with pytest.raises(RecipeError, match=r"^criterion = .*'loss', .*'package.module:name'"):
            Recipe.load("fashion", criterion=wrong)
