"""Recipes: what they accept, and that every refusal names the field, its value and what would be
right.
"""

import json
import textwrap
from pathlib import Path

import pytest

from dpfast.config import RECIPES, Recipe, fields, flat, full_name, read_recipe, short_name
from dpfast.errors import InputError, RecipeError


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_recipes_survive_a_round_trip(path):
    recipe = Recipe.load(path.stem)
    assert recipe.name == path.stem
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_field_is_named_by_its_last_word_where_one_section_has_it():
    assert full_name("omega") == full_name("guidance.omega") == "guidance.omega"
    assert (short_name("guidance.omega"), short_name("seed")) == ("omega", "seed")
    assert short_name("learner.batch_size") == "learner.batch_size"
    with pytest.raises(RecipeError, match=r"say generator\.batch_size or learner\.batch_size"):
        Recipe.load("fashion", batch_size=8)
    recipe = Recipe.load("fashion", learner={"batch_size": 8, "lr": 0.1}, generator={"steps": 3})
    assert (recipe.learner.batch_size, recipe.learner.lr, recipe.generator.steps) == (8, 0.1, 3)
    assert recipe.generator.batch_size == Recipe.load("fashion").generator.batch_size
    assert flat(recipe.to_dict()).keys() == set(map(short_name, fields()))


def test_overrides_take_text_as_a_command_line_gives_it():
    recipe = Recipe.load("fashion", omega="0.03", iterations="700", flip="false", sources="static")
    assert recipe.guidance.omega == 0.03
    assert recipe.practice.iterations == 700
    assert recipe.learner.flip is False
    assert recipe.practice.sources == ("static",)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"omega": "much"}, "omega = 'much'"),
        ({"omega": "nan"}, "omega = 'nan'"),
        ({"iterations": "10.5"}, "iterations = '10.5'"),
        ({"iterations": "1"}, "iterations = 1"),
        ({"steps": "0"}, "steps = 0"),
        ({"maximum_samples": "100"}, "maximum_samples = 100"),
        ({"sources": "dp,dp"}, "sources = 'dp,dp'"),
        ({"attention": "flash"}, "attention = 'flash'"),
        ({"mode": "sideways"}, "mode = 'sideways'"),
        ({"flip": "perhaps"}, "flip = 'perhaps'"),
        ({"cooldown": "0.95"}, "cooldown = 0.95"),
        ({"seed": "-1"}, "seed = -1"),
        ({"model": "resnet"}, "model = 'resnet'"),
        ({"codec": "png"}, "codec = 'png'"),
        ({"host_gib": "-1"}, "host_gib = -1.0"),
        ({"anchor": "-0.5"}, "anchor = -0.5"),
        ({"anchor": "inf"}, "anchor = 'inf'"),
        ({"anchor": True}, "anchor = True"),
        ({"anchor": 0.5, "omega": -0.1}, "anchor = 0.5: expected 0 with omega = -0.1"),
        ({"anchor": 0.5, "cfg_scale": 1}, "anchor = 0.5: expected 0 where guided samples have"),
        (
            {"anchor": 0.5, "omega_rounds": "0.1,-0.1"},
            "round 2: anchor = 0.5: expected 0 with omega = -0.1, which lowers the criterion",
        ),
        (
            {"anchor": 0.5, "cfg_scale_rounds": "2,1"},
            "anchor = 0.5: expected 0 where guided samples have cfg_scale = 1",
        ),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_names_it(overrides, named):
    with pytest.raises(RecipeError) as caught:
        Recipe.load("fashion", **overrides)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_anchor_needs_no_cfg_where_nothing_is_guided():
    assert Recipe.load("fashion", anchor=0.5, omega=0.0, cfg_scale=1.0).guidance.anchor == 0.5
    for sources in ("static,prune,dynamic", "mix", "pool"):
        unguided = {"sources": sources, "mix_with": "static", "real": "fashion", "pool_from": "x"}
        recipe = Recipe.load("fashion", anchor=0.5, omega=0.1, cfg_scale=1.0, **unguided)
        assert not recipe.practice.may_guide
    rounds = {"anchor": 0.5, "omega_rounds": (0.1, 0.0), "cfg_scale_rounds": (2.0, 1.0)}
    assert Recipe.load("fashion", **rounds).guidance.anchor == 0.5
    for omegas in ((0.1, 0.2), (0.0, 0.0, 0.1), (0.1,)):
        with pytest.raises(RecipeError, match="guided samples have cfg_scale = 1"):
            Recipe.load("fashion", **{**rounds, "omega_rounds": omegas})
    for sources in ("static,dp", "mix", "sources:own"):
        with pytest.raises(RecipeError, match="guided samples have cfg_scale = 1"):
            Recipe.load("fashion", anchor=0.5, cfg_scale=1.0, sources=sources, real="fashion")


def test_a_negative_prompt_needs_cfg_in_some_round():
    alone = {"negative_prompt": "blurry", "cfg_scale": 1.0, "anchor": 0.0}
    for rounds in ({}, {"cfg_scale_rounds": (1.0,)}):
        with pytest.raises(RecipeError, match=r"^negative_prompt = 'blurry': expected '' with cfg"):
            Recipe.load("fashion", **alone, **rounds)
    recipe = Recipe.load("fashion", **alone, cfg_scale_rounds=(1.0, 2.0))
    made = [recipe.of_round(number).generator.negative_prompt for number in (0, 1, 2)]
    assert made == ["", "", "blurry"]


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(RecipeError, match=r"'nosuch'.*fashion"):
        Recipe.load("nosuch")


def test_a_wrong_field_in_a_file_is_named(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[guidance]\nomgea = 0.1\n")
    with pytest.raises(RecipeError, match="omgea"):
        Recipe.load(path)
    path.write_text("[guidance\n")
    with pytest.raises(RecipeError, match="not valid TOML"):
        Recipe.load(path)


def test_a_recipe_of_a_run_is_read_by_the_names_that_fields_had_then(tmp_path):
    recipe = Recipe.load("fashion", every=4, cfg_interval=(0.1, 0.9), generator={"micro_batch": 9})
    table = recipe.to_dict()
    generator, guidance = table["generator"], table["guidance"]
    generator["generation_batch"] = generator.pop("batch_size")
    generator["sampling_batch"] = generator.pop("micro_batch")
    generator["cfg_from"], generator["cfg_until"] = generator.pop("cfg_interval")
    guidance["guide_every"], guidance["guide_from"] = guidance.pop("every"), guidance.pop("start")
    guidance["guide_until"] = guidance.pop("until")
    table["learner"]["compile_learner"] = table["learner"].pop("compile")
    table["practice"]["cfg_rounds"] = table["practice"].pop("cfg_scale_rounds")
    (tmp_path / "recipe.json").write_text(json.dumps(table))
    with pytest.raises(RecipeError, match="generation_batch"):
        Recipe.from_dict(json.loads((tmp_path / "recipe.json").read_text()))
    assert Recipe.from_dict(read_recipe(tmp_path / "recipe.json")) == recipe


def test_sources_in_any_order_are_one_recipe(tmp_path):
    recipe, other = (Recipe.load("fashion", sources=said) for said in ("static,dp", "dp,static"))
    assert recipe == other
    table = recipe.to_dict()
    table["practice"]["sources"] = ["static", "dp"]  # as older runs wrote it
    (tmp_path / "recipe.json").write_text(json.dumps(table))
    assert read_recipe(tmp_path / "recipe.json")["practice"]["sources"] == ["dp", "static"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file"),
        ('{"seed": 0, "gener', "cannot be read as JSON: Unterminated string"),
        ("[]", "expected a table of fields and sections"),
        ('{"practice": 3}', "expected a table of fields and sections"),
    ],
    ids=["missing", "cut short", "a list", "no section"],
)
def test_a_damaged_recipe_of_a_run_is_refused_in_one_line_with_its_path(tmp_path, text, said):
    path = tmp_path / "recipe.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed = " + "9" * 5000, "not valid TOML: Exceeds the limit"),
        ("seed = 0x" + "f" * 5000, "seed = <int, too long to be shown>: expected a whole"),
        ("[guidance]\nomega = " + "9" * 400, "omega = 9+: expected a finite number"),
        (
            "[guidance]\nomega = -1e39",
            r"omega = -1e\+39: .* with numbers up to 3.4e\+38 either way",
        ),
        ("[generator]\ncfg_scale = 1e40", r"cfg_scale = 1e\+40: .* up to 3.4e\+38 either way"),
        ("[guidance]\nomega_schedule = [[0, 1e39]]", r"omega_schedule = .* up to 3.4e\+38 either"),
        ("[generator]\nclass_names = " + "[" * 2000 + "]" * 2000, "not valid TOML: maximum"),
        ("learner" + ".a" * 3000 + " = 1", "learner: tables or lists within each other, over 20"),
        ('"se\\ned" = 1', r"'se\\ned' = 1: expected a field of recipe"),
    ],
    ids=[
        "endless",
        "endless hex",
        "no float",
        *("beyond float32",) * 3,
        "deep list",
        "deep tables",
        "line feed in a name",
    ],
)
def test_what_python_itself_cannot_take_is_refused_in_one_line(tmp_path, text, said):
    (tmp_path / "odd.toml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=said) as caught:
        Recipe.load(tmp_path / "odd.toml")
    assert str(caught.value).isprintable()


def test_a_whole_number_stays_what_it_is():
    """2**53 + 1, which no float holds."""
    assert Recipe.load("fashion", round_samples=2**53 + 1).practice.round_samples == 2**53 + 1


@pytest.mark.parametrize("name", ["x" * 5000 + ".toml", "a\0b.toml"], ids=["long", "null byte"])
def test_a_path_that_no_file_system_takes_is_refused_in_one_line(name):
    with pytest.raises(InputError, match="cannot be read"):
        Recipe.load(name)


TABLES = [
    ("depths = [1, 1], groups_width = 8", {"depths": [1, 1], "groups_width": 8}),
    (' {a = {b = "x, y"}} ', {"a": {"b": "x, y"}}),
    ('"odd key" = 0.5, yes = true, "größe" = -1', {"odd key": 0.5, "yes": True, "größe": -1}),
    ("", {}),
    ("{}", {}),
]


@pytest.mark.parametrize(("text", "table"), TABLES)
def test_a_table_is_a_line_of_toml_on_a_command_line_and_is_shown_as_one(text, table):
    assert Recipe.load("fashion", options=text).learner.options == table
    shown = fields()["learner.options"].text(table)
    assert Recipe.load("fashion", **{"learner.options": shown}).learner.options == table


@pytest.mark.parametrize(
    "options",
    [
        *("depths", "depths: [1]", '{"depths": 1}', "a = 1}\nb = {c = 1", "a = 1\nb = 2", "[1]"),
        *("a = 1, a = 2", "a = nan", "a = [1, inf]", "a = 1979-05-27", "a = 0x" + "f" * 5000),
        *("a = " + "[" * 30 + "]" * 30, "a = " + "[" * 9000, {"a": {1: 2}}, {"a": [{3}]}, 3),
    ],
)
def test_what_is_no_table_of_plain_values_is_refused_in_one_line(options):
    with pytest.raises(RecipeError, match=r"^(options = .*expected a table|learner: )") as caught:
        Recipe.load("fashion", options=options)
    assert "\n" not in str(caught.value)


def test_another_model_begins_without_the_options_of_the_recipe_s():
    recipe = Recipe.load("fashion")
    assert recipe.learner.options
    for given in ({"model": "nets:tiny"}, {"learner": {"model": "nets:tiny"}}):
        assert Recipe.load("fashion", **given).learner.options == {}
        asked = Recipe.load("fashion", **given, **{"learner.options": "width = 3"})
        assert asked.learner.options == {"width": 3}
    both = Recipe.load("fashion", learner={"model": "nets:tiny", "options": {"width": 3}})
    assert both.learner.options == {"width": 3}
    same = Recipe.load("fashion", model=recipe.learner.model, lr=0.1)
    assert same.learner.options == recipe.learner.options


def test_the_rounds_of_the_documentation_are_a_recipe(tmp_path):
    text = (Path(__file__).parents[2] / "docs/guides/embed_sampler.md").read_text(encoding="utf-8")
    block = text[
        text.index("    [guidance]\n") : text.index("On a command line: `--omega-schedule")
    ]
    (tmp_path / "mine.toml").write_text(textwrap.dedent(block), encoding="utf-8")
    recipe = Recipe.load(tmp_path / "mine.toml")
    said = "0:0.4,1:1.5"
    assert recipe.guidance == Recipe.load(tmp_path / "mine.toml", omega_schedule=said).guidance
    rounds = [recipe.of_round(number) for number in range(5)]
    assert [each.guidance.omega for each in rounds] == [0.05, 0.03, 0.06, 0.09, 0.09]
    assert [each.guidance.every for each in rounds] == [3, 3, 2, 2, 2]
    assert [each.guidance.criterion for each in rounds][1:3] == ["loss", "entropy"]
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"omega_schedule": "0.5:1,0.5:2"}, "expected fractions of the steps that rise"),
        ({"cfg_schedule": "0:1,2:2"}, "expected fractions of the steps that rise"),
        ({"anchor_schedule": "0:-1"}, "expected a list of pairs of numbers of at least 0"),
        ({"omega_schedule": "0"}, "expected a list of pairs"),
        ({"omega_schedule": "0:nan"}, "expected a list of pairs"),
        ({"omega_schedule": "0:1:2"}, "expected a list of pairs"),
        ({"omega_schedule": [0.5, 1]}, "expected a list of pairs"),
        ({"start_rounds": "0.1,0.9", "until": 0.5}, "round 2: until = 0.5: expected above start"),
        ({"criterion_rounds": "loss,disagreement"}, "criterion_rounds = .*'disagreement'"),
        ({"criterion_rounds": "loss,nosuch"}, "criterion_rounds = .*: expected a list of"),
        ({"every_rounds": "2,0"}, r"every_rounds = \(2, 0\): expected a list of whole numbers"),
        ({"anchor_rounds": "0,-1"}, "anchor_rounds = .*: expected a list of numbers of at least 0"),
        ({"anchor_rounds": "0,1", "cfg_scale": 1}, "round 2: anchor = 1.0: expected 0 where"),
        ({"through_rounds": "decoder"}, "through_rounds = 'decoder'"),
    ],
)
def test_wrong_schedules_and_rounds_are_said_in_one_line(overrides, said):
    with pytest.raises(RecipeError, match=said) as caught:
        Recipe.load("fashion", **overrides)
    assert "\n" not in str(caught.value)
