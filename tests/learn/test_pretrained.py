"""Learners that begin with weights of a folder, or of a file: what is loaded, what is new, and what
is refused.
"""

import json
import logging
import shutil
import sys
from types import ModuleType

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import RegNetConfig, RegNetForImageClassification, ViTConfig, ViTModel
from transformers import ViTForImageClassification as ViT

from dpfast.config import Learner, Recipe
from dpfast.errors import InputError, RecipeError
from dpfast.learn.models import learner_factory, load_learner, recipe_learner
from dpfast.learn.pretrained import KEPT, as_kept, keep, quiet
from dpfast.planning.training import count_learner
from dpfast.practice.changes import continued
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.run_writer import RunWriter
from tests.hub_cache import cached
from tests.practice.conftest import recipe  # noqa: F401
from tests.practice.small import REAL
from tests.practice.test_loop import with_

VIT = {
    **{"image_size": 16, "patch_size": 8, "hidden_size": 8, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "intermediate_size": 16, "num_channels": 1},
}
REGNET = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "groups_width": 8}
NAME = "transformers:ViTForImageClassification"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of save_pretrained: of classifiers of seven classes, and of a base model."""
    root = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(3)
    with quiet():
        ViT(ViTConfig(num_labels=7, **VIT)).save_pretrained(root / "vit")
        ViTModel(ViTConfig(**VIT)).save_pretrained(root / "base")
        net = RegNetForImageClassification(RegNetConfig(num_channels=1, num_labels=7, **REGNET))
        net.regnet.embedder.embedder.normalization.running_mean += 0.25
        net.save_pretrained(root / "regnet")
    (root / "bare").mkdir()
    (root / "damaged").mkdir()
    shutil.copy(root / "vit/config.json", root / "bare")
    shutil.copy(root / "vit/config.json", root / "damaged")
    (root / "damaged/model.safetensors").write_bytes(b"no weights")
    return root


def learner(source, model=NAME, classes=3, channels=1, **options):
    config = Learner(model=model, options=options, pretrained=str(source))
    return recipe_learner(config, classes=classes, channels=channels)


@pytest.mark.parametrize(
    ("name", "model", "was"),
    [
        ("vit", NAME, "was of 7 classes"),
        ("base", NAME, "was not there"),
        ("regnet", "transformers:RegNetForImageClassification", "was of 7 classes"),
    ],
)
def test_all_weights_are_the_folders_but_those_of_a_head_for_other_classes(
    folders, name, model, was, caplog
):
    caplog.set_level(logging.INFO, "dpfast")
    found = learner(folders / name, model).model
    with quiet():
        saved = type(found).from_pretrained(folders / name).base_model.state_dict()
    own = found.base_model.state_dict()
    assert own.keys() == saved.keys()
    assert all(torch.equal(own[key], value) for key, value in saved.items())
    prefix = f"{found.base_model_prefix}."
    heads = {key for key in found.state_dict() if not key.startswith(prefix)}
    assert all(found.state_dict()[key].shape[0] == 3 for key in heads)
    said = f"the learner begins with {folders / name}; its head is new, it {was}"
    assert [each.getMessage() for each in caplog.records] == [said]


def test_a_head_of_as_many_classes_is_the_folders_and_nothing_is_said(folders, caplog):
    caplog.set_level(logging.INFO, "dpfast")
    found = learner(folders / "vit", classes=7).model
    saved = load_file(folders / "vit/model.safetensors")
    assert torch.equal(found.classifier.weight, saved["classifier.weight"])
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("vit", {"image_size": 32}, r"vit.embeddings.position_embeddings has the shape \(1, 5, 8"),
        ("vit", {"num_hidden_layers": 3}, "has no vit.layers.2.attention.q_proj.weight, which the"),
        ("vit", {"num_hidden_layers": 1}, "has vit.layers.1.attention.k_proj.bias, which the lear"),
        ("base", {"num_hidden_layers": 1}, "has layers.1.attention.k_proj.bias, which the learner"),
        ("regnet", {}, "of model_type 'regnet'; ViTForImageClassification needs 'vit'"),
        ("bare", {}, "cannot be read: .*no file named model.safetensors"),
        ("damaged", {}, "cannot be read: "),
        (".", {}, "has no config.json; expected one of transformers' save_pretrained, or OWNER"),
        ("vit/config.json", {}, "no such folder; expected one of transformers'"),
        ("no/such/one", {}, "no such folder; expected one of transformers'"),
    ],
)
def test_what_does_not_fit_is_one_line_with_the_first_name(folders, name, options, said):
    with pytest.raises(InputError, match=f"^pretrained = '.*': {said}") as caught:
        learner(folders / name, **options)
    assert "\n" not in str(caught.value)


def test_colours_do_not_become_grey_and_unknown_options_are_refused(folders):
    with pytest.raises(InputError, match=r"patch_embeddings.projection.weight has the shape \(8,"):
        learner(folders / "vit", channels=3)
    with pytest.raises(InputError, match=r"^options: ViTConfig has no depth$"):
        learner(folders / "vit", depth=3)


def test_a_model_of_the_hub_is_read_from_its_cache_and_its_absence_is_one_line(
    folders, tmp_path, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError,
        match=r"^pretrained = 'google/vit': no such folder, and no model of that name in the Hub's "
        r"cache '.*' \(HF_HUB_OFFLINE is set\); to download it: hf download google/vit$",
    ):
        learner("google/vit")
    snapshot = cached(tmp_path, "google/vit", folders / "vit")
    weights, expected = (learner(source).state_dict() for source in ("google/vit", folders / "vit"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected if "vit" in name)
    (snapshot / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config.json; .*: hf download google/vit --rev"):
        learner("google/vit")


class Own(nn.Module):
    """A factory's model: a stem, and a head by a name of its own."""

    def __init__(self, classes, channels, width=4):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3)
        self.out = nn.Linear(width, classes)

    def forward(self, x):
        return self.out(self.stem(x).mean((2, 3)))


@pytest.fixture
def own(monkeypatch, tmp_path):
    """The import path of ``Own``, and a file of its weights for five classes."""
    module = ModuleType("ownnets")
    module.Own = Own
    monkeypatch.setitem(sys.modules, "ownnets", module)
    file = tmp_path / "own.safetensors"
    save_file(Own(5, 1).state_dict(), file)
    return "ownnets:Own", file


def test_a_factorys_model_takes_a_file_of_safetensors(own):
    model, file = own
    found, saved = learner(file, model), load_file(file)
    assert torch.equal(found.stem.weight, saved["stem.weight"])
    assert found.out.weight.shape == (3, 4)
    assert torch.equal(learner(file, model, classes=5).out.weight, saved["out.weight"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("stem.bias"), "has no stem.bias, which the learner needs"),
        (lambda w: w.update(more=torch.ones(1)), "has more, which the learner has not"),
        (
            lambda w: w.update({"out.weight": torch.ones(5, 6)}),
            r"out.weight has the shape \(5, 6\) there, and \(3, 4\) in the learner",
        ),
        (
            lambda w: w.update({"stem.bias": torch.ones(6)}),
            r"stem.bias has the shape \(6,\) there, and \(4,\) in the learner",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(own, change, said):
    model, file = own
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    with pytest.raises(InputError, match=f"^pretrained = '{file}': {said}$"):
        learner(file, model)


def test_nothing_is_unpickled(own, tmp_path):
    torch.save({}, tmp_path / "weights.pt")
    for name in ("weights.pt", "nothing.safetensors"):
        with pytest.raises(InputError, match=r"expected a \.safetensors file, the state dict of"):
            learner(tmp_path / name, own[0])


def test_what_is_counted_has_the_folders_sizes_and_no_weights(folders):
    asked = Learner(model=NAME, pretrained=str(folders / "vit"))
    whole = count_learner(asked, 3, (1, 16, 16), half=False)
    assert (
        whole.trained
        == whole.parameters
        == sum(p.numel() for p in learner(folders / "vit").parameters())
    )
    frozen = count_learner(
        Learner(model=NAME, pretrained=str(folders / "vit"), freeze=("backbone",)),
        3,
        (1, 16, 16),
        half=False,
    )
    assert frozen.trained == 8 * 3 + 3
    assert frozen.gradients == 4 * frozen.trained
    assert whole.state - frozen.state == 8 * (whole.trained - frozen.trained)
    assert frozen.held[1] < whole.held[1]
    assert frozen.training.flops < 0.5 * whole.training.flops


def test_a_run_keeps_what_it_began_with_and_goes_on_without_the_folder(
    recipe,  # noqa: F811
    folders,
    tmp_path,
):
    mine = tmp_path / "mine"
    shutil.copytree(folders / "vit", mine)
    asked = with_(recipe, "learner", model=NAME, options={}, pretrained=str(mine), layer_decay=0.5)
    few = {"sources": ("static",), "iterations": 10, "maximum_samples": 30}
    asked = with_(asked, "practice", **few)

    def run(out, asked):
        with RunWriter(out, asked, resume=out.exists()) as folder:
            DeliberatePractice(asked, real=REAL).run(folder, progress=False)
        return (out / "metrics.jsonl").read_text()

    metrics = run(tmp_path / "one", asked)
    assert run(tmp_path / "two", asked) == metrics
    kept = tmp_path / "one" / KEPT
    saved = load_file(mine / "model.safetensors")
    began = load_file(kept / "model.safetensors")
    assert began["classifier.weight"].shape == (3, 8)
    assert torch.equal(began["vit.embeddings.cls_token"], saved["vit.embeddings.cls_token"])
    shutil.rmtree(mine)
    pipeline = DeliberatePractice(recipe, real=REAL).pipeline
    finished = load_learner(tmp_path / "one", pipeline, source="static")
    assert finished(torch.zeros(2, 1, 16, 16)).shape == (2, 3)
    with pytest.raises(RecipeError, match=r"^resume: .* pretrained = '' was '"):
        continued(tmp_path / "one", with_(asked, "learner", pretrained=""))
    moved = with_(asked, "learner", pretrained=str(kept))
    assert continued(tmp_path / "one", moved).learner.pretrained == str(kept)
    assert as_kept(asked, tmp_path / "one") == moved
    again = tmp_path / "three"  # from the kept weights: the same run
    assert run(again, moved) == metrics


def test_a_learner_that_is_an_object_has_its_own_weights(recipe, folders):  # noqa: F811
    asked = with_(recipe, "learner", pretrained=str(folders / "vit"))
    with pytest.raises(InputError, match=r"^pretrained = .*: the learner is an object of yours"):
        learner_factory(asked, None, Own(3, 1))


def test_a_kept_learner_is_the_same_again(folders, tmp_path):
    first = learner(folders / "regnet", "transformers:RegNetForImageClassification")
    keep(first, tmp_path)
    again = learner(tmp_path / KEPT, "transformers:RegNetForImageClassification")
    for key, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert json.loads((tmp_path / KEPT / "config.json").read_text())["embedding_size"] == 8


def test_a_folder_of_transformers_says_the_options_in_place_of_the_recipes(folders):
    chosen = Recipe.load("fashion", pretrained=str(folders / "regnet"))
    assert chosen.learner.options == {}
    options = Recipe.load("fashion").learner.options
    assert options
    kept = {"pretrained": "weights.safetensors", "model": "ownnets:Own", "options": options}
    assert Recipe.load("fashion", **kept).learner.options == options
