"""After each command the next sensible one is named, ready to be pasted into a shell."""

import argparse
import shlex

import pytest

from dpfast.cli import Next, export, main, run, sample, vacant, without
from dpfast.cli.recipes import launched


def parsed(line):
    words = shlex.split(line)
    arguments = main.new_parser().parse_args(words)
    arguments.words = words
    return arguments


def commands(step, capsys):
    """The command lines that are told, each of which is one."""
    step.tell()
    out, error = capsys.readouterr()
    assert out == ""
    lines = error.splitlines()
    assert all(line.endswith(":") for line in lines[::2])
    for line in lines[1::2]:
        words = shlex.split(line)
        if words[0] == "torchrun":
            words = words[words.index("dpfast") :]
        if words[0] == "dpfast":
            assert isinstance(main.new_parser().parse_args(words[1:]), argparse.Namespace)
    return [line.strip() for line in lines[1::2]]


def test_words_are_told_on_stderr_as_a_shell_takes_them(capsys):
    step = Next(("a page", ["dpfast", "report", "my runs/$HOME", "it's"]))
    assert commands(step, capsys) == ["""dpfast report 'my runs/$HOME' 'it'"'"'s'"""]


def test_a_plan_leads_to_its_rehearsal_with_the_same_fields_and_devices(monkeypatch, capsys):
    monkeypatch.setattr("dpfast.planning.plan.plan", lambda *a, **named: None)
    monkeypatch.setattr("dpfast.planning.table.plan_table", lambda made, columns: "the plan")
    words = ["fashion", "--omega", "0.1", "--device", "H200", "--count", "2"]
    assert main.main(["plan", *words, "--utilisation", "0.3"]) == 0
    out, error = capsys.readouterr()
    assert out == "the plan\n"
    assert error.splitlines()[-1].split() == ["dpfast", "rehearse", *words]


def test_only_the_first_rank_tells(monkeypatch, capsys):
    monkeypatch.setattr(main.doctor, "doctor", lambda arguments: Next(("more", ["dpfast", "run"])))
    for rank, told in (("0", "Next, more:\n  dpfast run\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert main.main(["doctor"]) == 0
        assert capsys.readouterr().err == told


def test_a_value_that_looks_like_an_option_stays_its_value(capsys):
    arguments = parsed("run fashion --omega=-0.05 --sources dp --anchor 0")
    told = commands(run._next(arguments, run.resolve(arguments)), capsys)[1]
    assert "--omega 0,-0.05" in told


def test_after_a_run_come_its_page_its_learners_images_and_the_runs_beside_it(tmp_path, capsys):
    out = tmp_path / "my runs" / "fashion"
    for folder in (out, out.with_name("strong"), out.with_name("fashion-samples")):
        folder.mkdir(parents=True)
    for folder in (out, out.with_name("strong")):
        (folder / "recipe.json").write_text("{}")
    (out / "index.html").touch()
    arguments = parsed(
        f"run fashion --omega 0.1 --steps 8 --sources dp --out {shlex.quote(str(out))}"
    )
    page, images, runs = commands(run._next(arguments, run.resolve(arguments)), capsys)
    assert page == out.as_uri() + "/index.html"
    assert shlex.split(images)[2:] == [
        *("--steps", "8", "--learner", str(out), "--labels", "0,1", "--omega", "0,0.1"),
        *("--out", str(out.with_name("fashion-samples-2"))),
    ]
    strong, report = str(out.with_name("strong")), str(out.with_name("report"))
    assert shlex.split(runs) == ["dpfast", "report", str(out), strong, "--out", report]


def test_a_run_of_images_that_were_there_has_no_generator_to_sample(tmp_path, capsys):
    arguments = parsed(f"run fashion --sources real --real x --out {tmp_path / 'run'}")
    assert len(commands(run._next(arguments, run.resolve(arguments)), capsys)) == 1


def test_a_dry_run_leads_to_the_run_and_a_stop_to_its_rest(tmp_path, monkeypatch, capsys):
    arguments = parsed("run fashion --dry-run --omega 0.1 --out 'my run'")
    (told,) = commands(run._next(arguments, run.resolve(arguments)), capsys)
    assert told == "dpfast run fashion --omega 0.1 --out 'my run'"
    arguments = parsed("run fashion --overwrite --out 'my run'")
    assert commands(run._resumed(arguments), capsys) == [
        "dpfast run fashion --out 'my run' --resume"
    ]
    monkeypatch.setenv("WORLD_SIZE", "2")
    (told,) = commands(run._resumed(arguments), capsys)
    assert told.startswith("torchrun --nproc-per-node 2 -m dpfast run fashion ")


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, "dpfast"),
        (8, "torchrun --nproc-per-node 8 -m dpfast"),
        (
            32,
            "torchrun --nnodes 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
            "--nproc-per-node 8 -m dpfast",
        ),
    ],
)
def test_several_devices_are_launched_by_torchrun(count, words):
    assert shlex.join(launched(count)) == words


def test_samples_lead_to_guided_ones_those_to_a_learner_and_its_own_to_its_page(capsys):
    arguments = parsed("sample --labels 'Bag,1' --omega=0 --out s --steps 4")
    recipe = sample._recipes(arguments)[0]
    assert commands(sample._next(arguments, recipe, guided=False), capsys) == [
        "dpfast sample --labels Bag,1 --steps 4 --omega 0,0.12 --out s-guided"
    ]
    assert commands(sample._next(arguments, recipe, guided=True), capsys) == [
        "dpfast run fashion --steps 4"
    ]
    # the embedded judge knows the embedded classes alone
    own = parsed("sample --labels 1 --out s --pipeline sdxl --class-names cat,dog")
    assert commands(sample._next(own, sample._recipes(own)[0], guided=False), capsys) == [
        "dpfast sample --labels 1 --pipeline sdxl --class-names cat,dog --omega 0,0.05 "
        "--out s-guided --learner FOLDER"
    ]
    arguments = parsed("sample --labels 1 --out s --learner 'my run'")
    assert commands(sample._next(arguments, recipe, guided=True), capsys) == [
        "dpfast report 'my run'"
    ]


@pytest.mark.parametrize(
    "words", ["sample --labels 1 --out s --cfg-scale 1", "run fashion --omega 0 --cfg-scale 1"]
)
def test_what_is_proposed_has_no_anchor_where_there_cannot_be_one(words, capsys):
    arguments = parsed(words)
    if words.startswith("run"):
        told = commands(run._next(arguments, run.resolve(arguments)), capsys)[1]
    else:
        recipe = sample._recipes(arguments)[0]
        (told,) = commands(sample._next(arguments, recipe, guided=False), capsys)
    assert "--omega 0,0.12 --anchor 0" in told
    found = sample._recipes(parsed(told.removeprefix("dpfast ")))
    assert [each.guidance.anchor for each in found] == [0, 0]


@pytest.mark.parametrize(
    ("said", "anchor"), [("", 1.0), ("--anchor 0.5", 0.5), ("--anchor 0", 0.0)]
)
def test_what_a_run_of_another_generator_proposes_has_the_anchor_of_the_run(said, anchor, capsys):
    arguments = parsed(f"run fashion --pipeline sdxl --class-names cat,dog {said}")
    told = commands(run._next(arguments, run.resolve(arguments)), capsys)[1]
    assert told.count("--anchor") == bool(said or anchor)
    found = sample._recipes(parsed(told.removeprefix("dpfast ")))
    assert [each.guidance.anchor for each in found] == [anchor, anchor]
    assert {each.guidance.anchor_schedule for each in found} == {((0.499, 0.0), (0.5, 1.0))}


def test_an_option_is_left_out_with_its_value_however_it_was_said():
    words = ["a", "--out", "x", "--omega=1", "--count", "2"]
    assert without(words, "--out", "--omega") == ["a", "--count", "2"]


def test_a_folder_that_is_there_gets_a_number(tmp_path):
    assert vacant(tmp_path / "s") == tmp_path / "s"
    (tmp_path / "s").mkdir()
    (tmp_path / "s-2").mkdir()
    assert vacant(tmp_path / "s") == tmp_path / "s-3"


def test_an_exported_run_names_its_recipe_where_the_package_has_it(tmp_path):
    assert export._recipe(tmp_path) == "RECIPE"
    for name, told in (("fashion", "fashion"), ("my", "RECIPE"), ("../fashion", "RECIPE")):
        (tmp_path / "recipe.json").write_text(f'{{"name": "{name}"}}')
        assert export._recipe(tmp_path) == told
