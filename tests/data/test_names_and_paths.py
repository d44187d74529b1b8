"""Where a name and a path compete: a path that exists goes before what is embedded, and what is
spelled as a path is never taken for a name.
"""

import shutil

import pytest
import torch
from PIL import Image

from dpfast.config import ASSETS, RECIPES, Recipe, pipeline_folder
from dpfast.data import fashion
from dpfast.data.class_folders import safe_name
from dpfast.data.real import RealSet, check_real, count_real, load_real
from dpfast.errors import InputError
from dpfast.evaluate.sets import evaluation_sets
from dpfast.generate.pipelines.folder import PipelineFolder
from dpfast.practice.contents import contents_of

TEST = RealSet(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))


def images(root, classes):
    for name in classes:
        (root / safe_name(name)).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (8, 8), color=7).save(root / safe_name(name) / f"{i}.png")


def test_a_pipeline_s_folder_goes_before_the_embedded_one_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pipeline_folder("fashion") == ASSETS / "fashion"
    with pytest.raises(InputError, match="no such folder"):
        PipelineFolder("./fashion")
    (tmp_path / "fashion").mkdir()  # no pipeline, as the folder of a run called after its recipe
    assert PipelineFolder("fashion").path == ASSETS / "fashion"
    with pytest.raises(InputError, match=r"no model_index\.json"):
        PipelineFolder("./fashion")
    shutil.copy(ASSETS / "fashion" / "model_index.json", tmp_path / "fashion")
    for source in ("fashion", "./fashion", str(tmp_path / "fashion"), tmp_path / "fashion"):
        assert PipelineFolder(source).path.resolve() == tmp_path / "fashion"
    recipe = Recipe.load("fashion")
    assert list(contents_of(recipe)["pipeline"]) == ["model_index.json"]


def test_real_images_in_a_folder_called_fashion_are_those_that_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert count_real("fashion") == (5000, 5000)
    with pytest.raises(InputError, match=r"validation = '\./fashion': no such folder"):
        check_real("./fashion")
    images(tmp_path / "fashion", fashion.CLASSES)
    for name in ("fashion", "./fashion"):
        real = load_real(name, classes=fashion.CLASSES, shape=(1, 8, 8))
        assert (len(real.validation), len(real.test)) == count_real(name) == (10, 10)
        assert real.validation.images.unique().tolist() == [7]
    assert contents_of(Recipe.load("fashion"))["validation"]["Bag"] == 2
    (tmp_path / "fashion" / "recipe.json").write_text("{}")  # the folder of a run
    assert count_real("fashion") == (5000, 5000)


def test_a_folder_called_as_a_shift_is_measured_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(evaluation_sets(("blur",), TEST, ("a", "b"))) == 5
    images(tmp_path / "blur", ("a", "b"))
    for name in ("blur", "./blur"):
        (one,) = evaluation_sets((name,), TEST, ("a", "b"))
        assert one.severity is None


def test_a_recipe_spelled_as_a_path_is_no_embedded_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Recipe.load("fashion").name == "fashion"
    for source in ("./fashion", "../recipes/fashion", f"{RECIPES}/fashion"):
        with pytest.raises(InputError, match="no such recipe"):
            Recipe.load(source)
    (tmp_path / "fashion").write_text("name = 'mine'\n")
    assert Recipe.load("./fashion").name == "mine"
    (tmp_path / "fashion.toml").write_text("name = 'other'\n")
    assert Recipe.load("fashion.toml").name == Recipe.load("./fashion.toml").name == "other"
