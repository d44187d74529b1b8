"""Runs whose recipes name parts of the user's own: the blocks of docs/embed_loop.md."""

import json
import re
from pathlib import Path

import pytest

from dpfast.cli.main import main
from dpfast.errors import InputError
from dpfast.practice.experiment import DeliberatePractice
from tests.practice.small import REAL
from tests.practice.test_loop import with_

PAGE = (Path(__file__).parents[2] / "docs/embed_loop.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```python\n(# .*?\.py: .*?)^```", re.MULTILINE | re.DOTALL)
SMALL = {
    **{"steps": 4, "initial-samples": 40, "round-samples": 20, "maximum-samples": 60},
    **{"iterations": 20, "evaluate-every": 5, "evaluate-unit": "steps", "patience": 1},
    **{"patience-growth": "fixed", "yardstick-samples": 20, "learner.batch-size": 16},
}


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """The modules of the page, each block as the file that its first line names."""
    for block in BLOCK.findall(PAGE):
        (tmp_path / block[2 : block.index(":")]).write_text(block, encoding="utf-8")
    (tmp_path / "wrong.py").write_text(
        "import torch\n\nnumber = 3\n\n\nclass Thing:\n    pass\n\n\n"
        "def flat(logits, labels):\n    return logits.detach().sum(1)\n\n\n"
        "def fails(*_, **__):\n    raise KeyError('depth')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def run(out, *more):
    fields = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    return main(["run", "fashion", "--quiet", "--out", str(out), *fields, *more])


def test_a_criterion_by_path_guides_and_a_resumed_run_imports_it_again(tmp_path, capsys):
    out = tmp_path / "run"
    chosen = ["--sources", "dp", "--criterion", "gini:gini"]
    assert run(out, *chosen) == 0
    assert json.loads((out / "recipe.json").read_text())["guidance"]["criterion"] == "gini:gini"
    assert run(out, *chosen, "--resume") == 0
    (tmp_path / "other.py").write_text((tmp_path / "gini.py").read_text())
    assert run(out, *chosen[:3], "other:gini", "--resume") == 2
    assert "criterion = 'other:gini' was 'gini:gini'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("wrong:number", "^criterion = 'wrong:number': is a int, expected a function"),
        ("wrong:Thing", "^criterion = 'wrong:Thing': is a class, expected a function"),
        ("wrong:nothing", "^criterion = 'wrong:nothing': "),
        ("wrong:flat", "^criterion = 'wrong:flat' gives values without a gradient"),
        ("wrong:fails", r"^criterion = 'wrong:fails' fails on logits .* 'depth'"),
    ],
)
def test_a_path_to_no_criterion_is_refused_before_any_work(recipe, path, said):
    for sources in (("dp",), ("static",)):
        asked = with_(with_(recipe, "guidance", criterion=path), "practice", sources=sources)
        with pytest.raises(InputError, match=said) as caught:
            DeliberatePractice(asked, real=REAL)
        assert "\n" not in str(caught.value)
