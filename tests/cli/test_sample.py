"""``dpfast sample`` on saved folders of every family: images of the names asked for, errors in one
line.
"""

import json

import pytest

from dpfast.cli import sample
from dpfast.cli.main import main, new_parser
from tests.tiny_pipelines import NAMES

TEXT = ["--class-names", ", ".join(NAMES), "--prompt-template", "a red photo of a {}"]


def arguments(folder, out, *options):
    return [
        "sample",
        "--pipeline",
        str(folder),
        "--labels",
        "0",
        "--count",
        "2",
        "--steps",
        "3",
        "--out",
        str(out),
        *options,
    ]


@pytest.mark.parametrize(
    ("folder", "options"),
    [
        ("pipeline_folder", ["--dtype", "bfloat16", "--cfg-interval", "0,0.5"]),
        ("stable_diffusion_folder", [*TEXT, "--solver", "dpmpp2m"]),
        ("stable_diffusion_xl_folder", [*TEXT, "--solver", "euler", "--cfg-scale", "3"]),
        ("stable_diffusion_3_folder", [*TEXT, "--solver", "euler"]),
        ("pixart_folder", [*TEXT, "--solver", "dpmpp2m", "--height", "24"]),
        ("flux_folder", [*TEXT, "--height", "16", "--width", "24", "--cfg-scale", "3.5"]),
        ("sana_folder", [*TEXT, "--cfg-scale", "3"]),
        ("pixel_folder", ["--solver", "ddim"]),
    ],
)
def test_every_family_writes_its_images(folder, options, request, tmp_path):
    out = tmp_path / "out"
    assert main(arguments(request.getfixturevalue(folder), out, *options)) == 0
    assert len((out / "samples.jsonl").read_text().splitlines()) == 2
    assert all(
        json.loads(line)["label"] == 0 for line in (out / "samples.jsonl").read_text().splitlines()
    )


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("stable_diffusion_folder", [], "needs class names: pass class_names"),
        (
            "stable_diffusion_folder",
            [*TEXT[:2], "--prompt-template", "a photo"],
            "prompt_template = 'a photo'",
        ),
        (
            "stable_diffusion_folder",
            [*TEXT, "--solver", "lcm", "--cfg-scale", "1", "--steps", "60"],
            "steps = 60",
        ),
        ("stable_diffusion_3_folder", [*TEXT, "--solver", "ddim"], "solver = 'ddim'"),
        ("pipeline_folder", ["--dtype", "int8"], "dtype = 'int8'"),
        ("pipeline_folder", ["--cfg-interval", "0.5,0.2"], "cfg_interval = (0.5, 0.2)"),
        ("pipeline_folder", ["--solver", "heun"], "solver = 'heun'"),
    ],
)
def test_what_cannot_work_is_named_in_one_line(folder, options, message, request, tmp_path, capsys):
    assert main(arguments(request.getfixturevalue(folder), tmp_path / "out", *options)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--anchor", "-0.5"], "anchor = -0.5: expected a number of at least 0"),
        (["--anchor", "nan"], "anchor = 'nan': expected a number of at least 0"),
        (["--anchor", "inf"], "anchor = 'inf': expected a number of at least 0"),
        (["--anchor", "much"], "anchor = 'much': expected a number of at least 0"),
        (["--anchor", "true"], "anchor = 'true': expected a number of at least 0"),
        (["--anchor", "0.5", "--omega", "-0.1"], "anchor = 0.5: expected 0 with omega = -0.1"),
        (["--anchor", "0.5", "--cfg-scale", "1"], "anchor = 0.5: expected 0 where guided samples"),
        (
            ["--anchor", "0.5", "--cfg-interval", "0.5,1", "--until", "0.4"],
            "anchor = 0.5: needs the two predictions of classifier-free guidance in a guided step",
        ),
    ],
)
def test_an_anchor_that_cannot_be_is_named_in_one_line(options, message, tmp_path, capsys):
    given = ["sample", "--labels", "0", "--count", "1", "--steps", "2", "--omega", "0.1"]
    assert main([*given, "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith(f"dpfast: error: {message}")
    assert not (tmp_path / "out" / "samples.jsonl").exists()


def test_an_anchor_changes_images_and_0_is_none(tmp_path):
    # of four steps two are guided, of which the recipe anchors the later
    given = ["sample", "--labels", "0", "--count", "2", "--steps", "4", "--omega", "0.1"]

    def images(*options):
        out = tmp_path / "-".join(("out", *options)).replace("--", "")
        assert main([*given, "--out", str(out), *options]) == 0
        return sorted(path.read_bytes() for path in out.rglob("*.png"))

    recipe = images()
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["guidance"]["omega"] == 0.1
    assert settings["learner"] == "the embedded judge"
    assert settings["guidance"]["anchor"] == 1.0  # the recipe's
    assert images("--guidance.anchor", "1") == recipe
    plain = images("--anchor", "0")
    assert plain != recipe
    assert images("--anchor", "0", "--anchor-schedule", "") == plain
    assert images("--anchor", "2") not in (recipe, plain)
    settings = json.loads((tmp_path / "out-anchor-2" / "settings.json").read_text())
    assert settings["guidance"]["anchor"] == 2.0


def test_the_default_recipes_anchor_is_for_its_own_generator(pipeline_folder, tmp_path):
    def anchor(*options):
        words = ["sample", "--labels", "0", "--omega", "0.1", "--out", "x", *options]
        (recipe,) = sample._recipes(new_parser().parse_args(words))
        return recipe.guidance.anchor

    own = ("--pipeline", str(pipeline_folder))
    assert anchor() == anchor("--pipeline", "fashion") == 1
    assert anchor(*own) == anchor(*own, "--cfg-scale", "1") == 0
    assert anchor(*own, "--anchor", "0.5") == 0.5
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[guidance]\nanchor = 2.0\n")
    assert anchor(*own, "--recipe", str(recipe)) == 2


def test_a_learner_that_would_not_guide_is_named(pipeline_folder, tmp_path, capsys):
    options = [
        "sample",
        "--pipeline",
        str(pipeline_folder),
        "--labels",
        "0",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*options, "--learner", "/nowhere"]) == 2
    assert (
        capsys.readouterr().err
        == "dpfast: error: learner = '/nowhere': guides only with omega, which is 0\n"
    )
    assert main([*options, "--count", "1", "--steps", "2"]) == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("every", "5"),
        ("start", "0.5"),
        ("until", "0.5"),
        ("mode", "score"),
        ("criterion", "loss"),
        ("anchor", "0.5"),
    ],
)
@pytest.mark.parametrize("omega", [(), ("--omega", "0")], ids=["without omega", "omega 0"])
def test_a_field_of_guidance_that_would_not_guide_is_named(
    omega, option, value, pipeline_folder, tmp_path, capsys
):
    out = tmp_path / "out"
    given = [f"--guidance.{option}".replace("_", "-"), value, *omega]
    assert main(arguments(pipeline_folder, out, *given)) == 2
    error = f"dpfast: error: {option} = '{value}': guides only with omega, which is 0\n"
    assert capsys.readouterr().err == error
    assert not out.exists()
