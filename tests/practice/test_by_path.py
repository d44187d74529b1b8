"""Runs whose recipes name parts of the user's own: the blocks of docs/guides/extend.md."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpfast.cli.main import main
from dpfast.errors import InputError, RecipeError
from dpfast.feed.own_augment import augment_at, augmented, try_augment
from dpfast.parallel import ALONE
from dpfast.planning.plan import plan
from dpfast.practice.experiment import DeliberatePractice
from dpfast.rehearsal.walk import cut
from tests.practice.small import REAL
from tests.practice.test_loop import with_

PAGE = (Path(__file__).parents[2] / "docs/guides/extend.md").read_text(encoding="utf-8")
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


def test_a_part_of_ones_own_is_less_than_40_lines():
    names = [block[2 : block.index(":")] for block in BLOCK.findall(PAGE)]
    assert names == [
        f"{name}.py" for name in ("gini", "mistaken", "heard", "lines", "polarity", "nets")
    ]
    assert all(block.count("\n") < 40 for block in BLOCK.findall(PAGE))


def test_a_source_a_callback_and_a_tracker_by_path_run_and_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    sources = ["--sources", "mistaken:Mistaken,static"]
    assert run(out, *sources, "--callbacks", "heard:Heard", "--trackers", "lines:Lines") == 0
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["practice"]["sources"] == ["static", "mistaken:Mistaken"]
    assert recipe["callbacks"] == ["heard:Heard"]
    assert recipe["trackers"] == ["lines:Lines"]
    assert not list(out.glob("events.*"))
    tracked = [json.loads(line) for line in (out / "lines.jsonl").read_text().splitlines()]
    for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        numbers = {
            f"{row['source']}/{row['event']}/{key}": value
            for key, value in row.items()
            if isinstance(value, (int, float)) and key != "step"
        }
        assert {"step": row["step"], **numbers} in tracked
    assert not (out / "objects.json").exists()
    heard = [json.loads(line) for line in (tmp_path / "heard.jsonl").read_text().splitlines()]
    steps = [(each["source"], each["step"]) for each in heard]
    assert steps == [(name, step) for name in ("static", "mistaken") for step in (5, 10, 15, 20)]
    assert "mistaken" in (out / "index.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert run(out, *sources, "--resume") == 0  # callbacks and trackers may differ
    assert run(out, "--sources", "static", "--resume") == 2
    assert "sources = ['static'] was ['static', 'mistaken:Mistaken']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "path", "said"),
    [
        ("sources", "wrong:number", "is a int, expected a kind of dpfast.Source"),
        ("sources", "wrong:Thing", r"Thing\(\) takes no arguments"),
        ("sources", "wrong:fails", "'depth'"),
        ("sources", "dpfast:Source", "Can't instantiate abstract class Source"),
        ("sources", "heard:Nothing", "has no attribute 'Nothing'"),
        ("sources", "nowhere:Source", "cannot import nowhere"),
        ("loader", "wrong:number", "is a int, expected a class or function that makes a dpfast.L"),
        ("loader", "nowhere:Loader", "cannot import nowhere"),
        ("callbacks", "wrong:Thing", "gives a Thing, expected a kind of dpfast.Callback"),
        ("callbacks", "wrong:fails", "'depth'"),
        ("callbacks", "nowhere:Heard", "cannot import nowhere"),
    ],
)
def test_a_path_to_nothing_of_its_kind_is_one_line_that_names_it(recipe, field, path, said):
    if field == "loader":
        asked = with_(recipe, "learner", loader=path)
    elif field == "sources":
        asked = with_(recipe, "practice", sources=("static", path))
    else:
        asked = replace(recipe, callbacks=("dpfast:Callback", path))
    with pytest.raises(InputError, match=f"^{field} = '{path}': .*{said}") as caught:
        DeliberatePractice(asked, real=REAL)
    assert "\n" not in str(caught.value)


def test_a_loader_by_path_augments_and_a_resumed_run_needs_it_again(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    out, chosen = tmp_path / "run", ["--sources", "static", "--loader", "own_loader:ErasingLoader"]
    assert run(out, *chosen) == 0
    assert run(out, *chosen, "--resume") == 0
    capsys.readouterr()
    assert run(out, *chosen[:2], "--resume") == 2
    assert "loader = 'auto' was 'own_loader:ErasingLoader'" in capsys.readouterr().err


def test_an_augmentation_by_path_changes_images_and_a_resumed_run_needs_it_again(tmp_path, capsys):
    out, chosen = tmp_path / "run", ["--sources", "static", "--augment", "polarity:polarity"]
    assert run(out, *chosen) == 0
    assert run(out, *chosen, "--resume") == 0
    capsys.readouterr()
    assert run(out, *chosen[:2], "--resume") == 2
    assert "augment = None was 'polarity:polarity'" in capsys.readouterr().err
    assert run(tmp_path / "other", *chosen[:3], "gini:gini") == 2
    assert "augment: " in capsys.readouterr().err
    images, seeds = torch.rand(3, 1, 4, 4), torch.tensor([3, 4, 5])
    found = augmented(augment_at("polarity:polarity"), images, seeds)
    assert torch.equal(found, torch.cat([-images[:1], images[1:]]))


def test_a_transform_of_torchvision_runs_as_an_augmentation():
    pytest.importorskip("torchvision")
    try_augment(augment_at("polarity:trivial"), (3, 16, 16), torch.device("cpu"))


def test_a_plan_counts_the_training_of_a_source_by_path_and_a_rehearsal_needs_another(recipe):
    own = with_(recipe, "practice", sources=("mistaken:Mistaken",))
    phases = [(each.source, each.name) for each in plan(own, "h100").phases]
    assert phases == [("mistaken:Mistaken", "training"), ("mistaken:Mistaken", "evaluation")]
    with pytest.raises(
        RecipeError, match=r"^sources = 'mistaken:Mistaken': a rehearsal walks none"
    ):
        cut(own, ALONE, 3)
    with pytest.raises(RecipeError, match=r"^loader = 'own_loader:Erasing': a rehearsal accounts"):
        cut(with_(recipe, "learner", loader="own_loader:Erasing"), ALONE, 3)
    with pytest.raises(RecipeError, match=r"^augment = 'polarity:polarity': a rehearsal accounts"):
        cut(with_(recipe, "learner", augment="polarity:polarity"), ALONE, 3)


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
