"""``dpfast sample`` with several settings: the same samples under each strength and each learner
that a run has saved, and what each step predicts.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dpfast.cli.main import main
from dpfast.config import Recipe
from dpfast.errors import InputError
from dpfast.learn.models import build_learner, load_learner
from dpfast.report.cells import Cell
from tests.practice.conftest import kept_run  # noqa: F401 - a fixture
from tests.tiny_pipelines import NAMES

TEXT = ["--class-names", ", ".join(NAMES), "--prompt-template", "a red photo of a {}"]


def arguments(folder, out, *options):
    given = ["--pipeline", str(folder), "--labels", "0,2", "--count", "2", "--steps", "3"]
    return ["sample", *given, "--every", "1", "--out", str(out), *options]


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*_*.png"))}


def entropies(folder):
    rows = (folder / "samples.jsonl").read_text().splitlines()
    return [json.loads(row)["entropy"] for row in rows]


def test_a_grid_has_the_same_samples_in_every_cell(kept_run, pipeline_folder, tmp_path):  # noqa: F811
    out = tmp_path / "grid"
    given = ["--learner", str(kept_run), "--at", "0,2,newest", "--anchor", "0,1"]
    assert main(arguments(pipeline_folder, out, *given, "--omega", "0,0.2")) == 0
    cells = json.loads((out / "settings.json").read_text())["cells"]
    strengths = ["omega-0", "omega-0.2_anchor-0", "omega-0.2_anchor-1"]
    moments = ["round-0", "round-2", "end"]
    expected = [f"{moment}_{strength}" for moment in moments for strength in strengths]
    assert [cell["folder"] for cell in cells] == expected
    assert [cell["omega"] for cell in cells] == [0.0, 0.2, 0.2] * 3
    assert [cell["anchor"] for cell in cells] == [0.0, 0.0, 1.0] * 3
    assert {cell["source"] for cell in cells} == {"dp"}
    steps = [cell["step"] for cell in cells]
    assert steps == sorted(steps)
    assert steps[0] < steps[3] < steps[-1] == 100
    made = {name: files(out / name) for name in expected}
    ids = ["000000_cat.png", "000001_cat.png", "000002_red-bicycle.png", "000003_red-bicycle.png"]
    assert all(list(images) == ids for images in made.values())
    # unguided samples are the same whoever guides, and each learner judges them anew
    assert made["round-0_omega-0"] == made["round-2_omega-0"] == made["end_omega-0"]
    assert entropies(out / "round-0_omega-0") != entropies(out / "end_omega-0")
    guided = [made[f"{moment}_omega-0.2_anchor-0"] for moment in moments]
    assert guided[0] != guided[1] != guided[2] != guided[0]
    assert made["end_omega-0.2_anchor-1"] != guided[2]
    width, height = Image.open(out / "grid.png").size
    assert width > 4 * 48
    assert height > 9 * 48

    alone = tmp_path / "alone"
    given = ["--learner", str(kept_run), "--at", "2", "--omega", "0.2", "--anchor", "0"]
    assert main(arguments(pipeline_folder, alone, *given)) == 0
    assert files(alone) == guided[1]
    assert (alone / "overview.png").is_file()


def test_the_learner_of_an_unfinished_run_is_that_of_its_newest_checkpoint(
    kept_run,  # noqa: F811
    pipeline_folder,
    tmp_path,
):
    run = shutil.copytree(kept_run, tmp_path / "run")
    (run / "learner_dp.safetensors").unlink()
    newest = sorted((run / "checkpoints_dp").glob("*.json"))[-1]
    step = json.loads(newest.read_text())["step"]
    given = ["--learner", str(run), "--omega", "0.2"]
    assert main(arguments(pipeline_folder, tmp_path / "newest", *given)) == 0
    (cell,) = json.loads((tmp_path / "newest" / "settings.json").read_text())["cells"]
    assert (cell["moment"], cell["step"], cell["folder"]) == (f"step {step}", step, ".")
    named = arguments(pipeline_folder, tmp_path / "step", *given, "--at", f"step-{step}")
    assert main(named) == 0
    assert files(tmp_path / "newest") == files(tmp_path / "step")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--at", "7"], "keeps no checkpoint of that round's end; there are 0, 1, 2, step-"),
        (["--at", "0,step-1"], "keeps no checkpoint of that step; there are 0, 1, 2, step-"),
        (["--at", "last"], "at = 'last': expected the number of a round, step-N or 'newest'"),
        (["--at", "1,"], "at = '': expected the number of a round, step-N or 'newest'"),
        (["--at", "-1"], "at = '-1': expected the number of a round, step-N or 'newest'"),
        (["--at", "1,0,1"], "at = '1': is named 2 times"),
        (["--at", "1,01"], "at = '1,01': 2 of these are round 1"),
        (["--omega", "0.1,0.10"], "omega = '0.1,0.10': names a value twice"),
        (["--omega", "0.1,,0.2"], "omega = '': expected a finite number"),
        (["--omega", "0.1,much"], "omega = 'much': expected a finite number"),
        (["--omega", "0,0.0"], "omega = '0,0.0': names a value twice"),
        (["--anchor", "0.5,-1"], "anchor = -1.0: expected a number of at least 0"),
        (["--omega", "0.1,-0.1", "--anchor", "0,1"], "anchor = 1.0: expected 0 with omega = -0.1"),
        (["--anchor", "0,1", "--cfg-scale", "1"], "anchor = 1.0: expected 0 where guided samples"),
        (["--omega", "0", "--at", "1"], "guides only with omega, which is 0"),
    ],
)
def test_settings_that_cannot_be_are_named_in_one_line(
    options,
    message,
    kept_run,  # noqa: F811
    pipeline_folder,
    tmp_path,
    capsys,
):
    given = ["--learner", str(kept_run), "--omega", "0.1", *options]
    assert main(arguments(pipeline_folder, tmp_path / "out", *given)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_and_a_run_without_a_learner_are_named(
    kept_run,  # noqa: F811
    pipeline_folder,
    tmp_path,
    capsys,
):
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(kept_run / "recipe.json", begun)
    other = (kept_run / "checkpoints_dp").glob("*.json")
    for number, (learner, message) in enumerate(
        (
            (begun, "the run has no learner yet, checkpoints_dp holds no checkpoint"),
            (tmp_path, "not the folder of a run, it has no recipe.json"),
            (next(other), "name the run that the checkpoint is of, and the checkpoint by --at"),
        )
    ):
        out = tmp_path / f"out{number}"
        given = ["--learner", str(learner), "--omega", "0.1"]
        assert main(arguments(pipeline_folder, out, *given)) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"dpfast: error: learner = {str(learner)!r}: ")
        assert message in line
    assert main(arguments(pipeline_folder, tmp_path / "out", "--omega", "0.1", "--at", "1")) == 2
    assert "at = '1': names the learner of a run; say --learner RUN" in capsys.readouterr().err


def test_images_that_the_judge_does_not_know_ask_for_a_learner(pipeline_folder, tmp_path, capsys):
    assert main(arguments(pipeline_folder, tmp_path / "out", "--omega", "0.1")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("dpfast: error: learner: name the run whose learner guides")
    assert line.endswith("and the pipeline makes 3 with 1")
    coloured = SimpleNamespace(
        device=torch.device("cpu"), image_shape=(3, 32, 32), class_names=("a",) * 10
    )
    with pytest.raises(InputError, match="and the pipeline makes 10 with 3"):
        load_learner(None, coloured)


def test_trajectories_of_a_text_prompted_generator_lie_side_by_side(
    stable_diffusion_folder, tmp_path
):
    """Guided by a learner of its own classes, from the folder of a run."""
    run = tmp_path / "run"
    run.mkdir()
    options = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "groups_width": 8}
    spec = "transformers:RegNetForImageClassification"
    recipe = Recipe.from_dict({"learner": {"model": spec, "options": options}})
    (run / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    torch.manual_seed(0)
    learner = build_learner(spec, classes=len(NAMES), channels=1, **options)
    weights = {name: value.contiguous() for name, value in learner.state_dict().items()}
    save_file(weights, run / "learner_dp.safetensors")
    out = tmp_path / "out"
    given = [*TEXT, "--omega", "0,0.5", "--learner", str(run), "--trajectory", "--labels", "0"]
    assert main(arguments(stable_diffusion_folder, out, *given)) == 0
    assert files(out / "omega-0") != files(out / "omega-0.5")
    assert len(files(out / "omega-0")) == 2
    side = Image.open(next((out / "omega-0").glob("0*.png"))).width
    width, height = Image.open(out / "trajectory.png").size
    assert width > 4 * side  # three steps and the end
    assert height > 4 * side  # two samples, unguided and guided


def test_settings_that_are_close_have_folders_of_their_own():
    cells = [Cell(omega=omega, anchor=0.5) for omega in (0.1, 0.1000001, 0.10000001)]
    assert len({cell.folder(cells) for cell in cells}) == 3
    assert cells[0].folder(cells) == "omega-0.1"


def test_settings_have_the_names_that_one_types():
    cells = [Cell(omega=omega) for omega in (0, 0.07, 0.3, 2.0, 1e-5, -0.14)]
    names = ["omega 0", "omega 0.07", "omega 0.3", "omega 2", "omega 1e-05", "omega -0.14"]
    assert [cell.name(cells) for cell in cells] == names
