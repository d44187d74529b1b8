"""Options: what a field takes, and what is said of it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from dpfast.config import SECTIONS, Recipe, fields
from dpfast.config.kinds import kind_of
from dpfast.config.option import option, options
from dpfast.errors import RecipeError


@dataclass
class Sailing:
    crew: int = option(2, unit="people", low=1, high=12, help="people on board")
    heel: float = option(0.0, above=-1, below=1, help="how far she leans")
    draught: float | None = option(None, low=0, unset="of the chart", help="depth of the keel")
    rig: Literal["sloop", "yawl"] = option("sloop", help="how many masts")
    reefed: bool = option(False, help="whether the sail is smaller")
    motor: bool | Literal["auto"] = option("auto", help="whether the motor runs")
    name: str = option("Spray", help="what is on the stern")
    waypoints: tuple[float, ...] = option((), low=0, unset="none", help="on the way")
    leg: tuple[float, float] = option((0.0, 1.5), low=0, help="from and to")
    flags: tuple[str, ...] = option((), unit="flag", unset="none", help="hoisted")
    extra: dict[str, Any] = option({}, help="whatever else")


GIVEN = [  # field, given, taken
    ("crew", "3", 3),
    ("crew", 4.0, 4),
    ("heel", "-0.5", -0.5),
    ("heel", 0, 0.0),
    ("draught", None, None),
    ("draught", "1.5", 1.5),
    ("rig", "yawl", "yawl"),
    ("reefed", "TRUE", True),
    ("reefed", "0", False),
    ("motor", "false", False),
    ("motor", "auto", "auto"),
    ("name", "", ""),
    ("waypoints", "1, 2,3", (1.0, 2.0, 3.0)),
    ("waypoints", [], ()),
    ("waypoints", "", ()),
    ("leg", [1, 2], (1.0, 2.0)),
    ("flags", "A, B", ("A", "B")),
    ("flags", '"bonnet, poke bonnet" , tench', ("bonnet, poke bonnet", "tench")),
    ("flags", 'say "A",B', ('say "A"', "B")),
    ("flags", '"a ""b"", c"', ('a "b", c',)),
    ("extra", {"a": 1}, {"a": 1}),
]


@pytest.mark.parametrize(("name", "given", "taken"), GIVEN)
def test_a_value_comes_from_python_toml_or_a_command_line(name, given, taken):
    value = options(Sailing)[name].value(name, given)
    assert (value, type(value)) == (taken, type(taken))


@pytest.mark.parametrize(
    ("name", "given", "error"),
    [
        ("crew", "0", "crew = 0: expected a whole number between 1 and 12"),
        ("crew", "2.5", "crew = '2.5': expected a whole number between 1 and 12"),
        ("crew", True, "crew = True: expected a whole number between 1 and 12"),
        ("crew", None, "crew = None: expected a whole number between 1 and 12"),
        ("heel", "nan", "heel = 'nan': expected a number above -1 and below 1"),
        ("heel", "1", "heel = 1.0: expected a number above -1 and below 1"),
        ("draught", "deep", "draught = 'deep': expected a number of at least 0, or leave it out"),
        ("rig", "ketch", "rig = 'ketch': expected 'sloop' or 'yawl'"),
        ("reefed", 1, "reefed = 1: expected true or false"),
        ("motor", "maybe", "motor = 'maybe': expected true, false or 'auto'"),
        ("name", 5, "name = 5: expected a text"),
        ("waypoints", "1,-2", "waypoints = (1.0, -2.0): expected a list of numbers of at least 0"),
        ("leg", "1", "leg = '1': expected 2 numbers of at least 0"),
        ("flags", [1], "flags = [1]: expected a list of names"),
        (
            "extra",
            "a",
            "extra = 'a': expected a table of keyword arguments, "
            "such as 'name = 8, other = [1, 2]'",
        ),
    ],
)
def test_what_it_does_not_take_is_refused_with_what_it_takes(name, given, error):
    with pytest.raises(RecipeError) as caught:
        options(Sailing)[name].value(name, given)
    assert str(caught.value) == error


def test_a_placeholder_and_a_default_are_written_as_on_a_command_line():
    said = {n: (each.placeholder, each.default_text) for n, each in options(Sailing).items()}
    assert said["crew"] == ("PEOPLE", "2")
    assert said["heel"] == ("X", "0")
    assert said["draught"] == ("X", "of the chart")
    assert said["rig"] == ("sloop|yawl", "sloop")
    assert said["motor"] == ("true|false|auto", "auto")
    assert said["leg"] == ("X,X", "0,1.5")
    assert said["flags"] == ("FLAG,...", "none")


@pytest.mark.parametrize(
    "values", [("A", "B"), ("bonnet, poke bonnet",), ('"', "a"), ('a "b", c', "d"), ("", "e")]
)
def test_a_list_is_read_as_it_is_written(values):
    flags = options(Sailing)["flags"]
    assert flags.value("flags", flags.text(values)) == values


@pytest.mark.parametrize("text", ['"A', 'A,"B', '"A" of B', '"A""'])
def test_quotes_that_do_not_close_are_refused(text):
    with pytest.raises(RecipeError, match=r"flags = .*expected a list of names"):
        options(Sailing)["flags"].value("flags", text)


def test_a_type_that_no_field_has_had_is_refused():
    with pytest.raises(TypeError, match="no kind of option has the type"):
        kind_of(set[str])


def test_every_field_of_a_recipe_says_what_it_means():
    for owner in (Recipe, *SECTIONS.values()):
        declared = {field.name for field in dataclasses.fields(owner)} - set(SECTIONS)
        assert options(owner).keys() == declared
    for name, each in fields().items():
        assert len(each.help.split()) >= 3, name
        assert not each.help.endswith((".", " ")), name
        assert each.default_text, name


def test_every_default_is_a_value_that_the_field_takes():
    for name, each in fields().items():
        assert each.value(name, each.default) == each.default
        if each.default is not None and not isinstance(each.default, dict):
            assert each.value(name, each.text(each.default)) == each.default
