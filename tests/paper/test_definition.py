"""The tables of the paper as data: every run is a recipe, every number is printed there."""

import shlex
from pathlib import Path

import pytest

from dpfast.cli.main import new_parser
from dpfast.cli.recipes import recipe_of
from dpfast.cli.run import resolve
from dpfast.config import Recipe
from dpfast.errors import InputError
from dpfast.paper.definition import load_table, names
from dpfast.paper.making import words_of
from dpfast.paper.runs import Folders, paper_runs
from tests.paper import transcription as printed

FILES = sorted(set(names().values()))
SMALL = [name for name in FILES if name not in ("table2", "figure3")]
NONE = Folders(given={}, pipelines={})


def runs_of(name, *, small=False):
    table = load_table(name, small=small)
    return paper_runs(table, Path("out"), table.seeds, NONE)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_the_printed_command_of_a_run_asks_for_the_recipe_of_the_run(name, small):
    if small and name not in SMALL:
        pytest.skip("none in small")
    parser = new_parser()
    for run in runs_of(name, small=small):
        spec = resolve(parser.parse_args(run.words))
        assert spec.recipe == run.recipe
        assert spec.out == run.folder
        assert (spec.trunk, spec.round) == (
            (run.trunk, run.entry.branch[1]) if run.entry.branch else (spec.trunk, None)
        )
        typed = shlex.split(run.command)
        assert "--validation" in typed or run.recipe.validation == "fashion"


@pytest.mark.parametrize("name", FILES)
def test_other_commands_are_ones_that_can_be_typed(name):
    small = load_table(name, small=True).commands if name in SMALL else ()
    for command in (*load_table(name).commands, *small):
        words = words_of(command, Path("out"), "folder", 5)
        assert new_parser().parse_args(words).handler
        assert not any("{" in word for word in words)
        assert words[words.index("--out") + 1] == f"out/{command.makes}"
        if "--learner" in words:
            assert words[words.index("--learner") + 1] == "out/dp-seed5"


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_no_run_or_picture_of_the_paper_is_anchored(name, small):
    if small and name not in SMALL:
        pytest.skip("none in small")
    assert {run.recipe.guidance.anchor for run in runs_of(name, small=small)} <= {0.0}
    for command in load_table(name, small=small).commands:
        words = words_of(command, Path("out"), "folder", 5)
        if words[0] == "sample":
            arguments = new_parser().parse_args(words)
            given = {} if arguments.anchor is None else {"anchor": arguments.anchor}
            assert recipe_of(arguments, **given).guidance.anchor == 0


@pytest.mark.parametrize("name", SMALL)
def test_a_run_in_small_is_small_and_takes_three_seeds(name):
    table = load_table(name, small=True)
    assert table.seeds == ((0,) if table.commands else (0, 1, 2))
    for run in runs_of(name, small=True):
        recipe = run.recipe
        assert recipe.name == "fashion"
        assert recipe.practice.most_samples <= 3000
        assert recipe.practice.iterations <= 800


def paper_of(table):
    return [tuple(e.paper.get(m) for m in table.measures) for e in table.entries]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("table1", printed.TABLE_1),
        ("table2", printed.TABLE_2),
        ("table3", printed.TABLE_3),
        ("table4", [r[4:] for r in printed.TABLE_4] + [r[1:] for r in printed.TABLE_4_STATIC]),
        (  # whose last two columns are headed the other way round
            "table5",
            [
                (v, second, first)
                for *_, v, first, second in [*printed.TABLE_5, *printed.TABLE_5_STATIC]
            ],
        ),
    ],
)
def test_every_number_of_a_table_is_the_one_that_the_paper_prints(name, rows):
    table = load_table(name)
    assert paper_of(table) == rows
    for entry in table.entries:
        assert entry.row.startswith(f"Table {name[-1]}, ")


@pytest.mark.parametrize(
    ("name", "dp", "static"),
    [
        ("table4", printed.TABLE_4, printed.TABLE_4_STATIC),
        ("table5", printed.TABLE_5, printed.TABLE_5_STATIC),
    ],
)
def test_sizes_patience_and_additions_are_those_of_the_paper(name, dp, static):
    entries = load_table(name).entries
    for entry, (initial, more, patience, rounds, *_) in zip(entries, dp, strict=False):
        practice = Recipe.load(entry.recipe, **entry.fields).practice
        assert (practice.initial_samples, practice.round_samples) == (1000 * initial, 1000 * more)
        assert practice.patience == patience
        made = practice.rounds_within(practice.maximum_samples)
        assert (entry.branch[1] if entry.branch else made) == rounds
        assert made >= rounds
    for entry, (size, *_) in zip(entries[len(dp) :], static, strict=True):
        practice = Recipe.load(entry.recipe, **entry.fields).practice
        assert practice.sources == ("static",)
        assert practice.most_samples == 1000 * size


def test_a_larger_static_set_makes_only_what_smaller_ones_have_not():
    runs = [run for run in runs_of("table5") if run.recipe.practice.sources == ("static",)]
    made = 0
    for run in runs:
        before = next((r for r in runs if r.entry.name == run.entry.reuse), None)
        made += run.recipe.practice.most_samples
        made -= before.recipe.practice.most_samples if before else 0
    assert made == 13_000_000


def test_a_run_stands_after_those_that_it_needs():
    for name in FILES:
        seen = set()
        for entry in load_table(name).runs:
            assert entry.needs <= seen
            seen.add(entry.name)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("tabel4", "did you mean table4?"),
        ("figur5", "did you mean figure5?"),
        ("table", "did you mean"),
        ("", "known are table1"),
        ("7", "known are table1"),
    ],
)
def test_an_unknown_table_is_answered_with_the_nearest(wanted, said):
    with pytest.raises(InputError, match="no such table or figure") as refused:
        load_table(wanted)
    assert said in str(refused.value)


def test_figures_have_the_runs_of_their_tables():
    assert load_table("figure4") == load_table("table4")
    assert load_table("Fig. 1") == load_table("table5")
    assert list(names())[:5] == [f"table{n}" for n in range(1, 6)]
