"""The recipes of the paper's size: where their values are from, and what is refused before any
weights are read.
"""

import json
import re
import shutil

import pytest
from PIL import Image

from dpfast import imagenet
from dpfast.cli.main import main
from dpfast.config import RECIPES, Recipe, flat, short_name
from dpfast.generate.pipelines.folder import PipelineFolder

COMMON = {
    "validation": "imagenet-val",
    "cfg_scale": 2 + 1,  # Table 1's lambda in the convention of diffusers
    "solver": "ddim",
    "omega": 0.05,
    "label_smoothing": 0.11,
    "mixup": 0.5,
    "cutmix": 1.0,
    "ema_decay": 1 - 0.001,
    "warmup": 0.1,
    "cooldown": 0.2,
    "evaluate_every": 1,
    "evaluate_unit": "passes",
    "sources": ("dp",),
}
IMAGENET_1K = {
    "class_names": ("imagenet1k",),
    "learner.batch_size": 4 * 8 * 128,
    "lr": 0.0016,
    "initial_samples": 1_300_000,
    "round_samples": 650_000,
    "maximum_samples": 9_100_000,
    "iterations": 200_000,
    "patience": 1,
}
PAPER = {  # arXiv 2502.15588: sections 5 and C.5, Tables 1, 4 and 5
    "imagenet100-sd15": {
        "pipeline": "stable-diffusion-1.5",
        "class_names": ("imagenet100",),
        "learner.batch_size": 4 * 8 * 64,
        "lr": 0.003,
        "initial_samples": 130_000,
        "round_samples": 64_000,
        "maximum_samples": 1_900_000,
        "iterations": 100_000,
        "patience": 5,
    },
    "imagenet1k-sd15": {"pipeline": "stable-diffusion-1.5", **IMAGENET_1K},
    "imagenet1k-dit": IMAGENET_1K,
}


@pytest.mark.parametrize("name", sorted(PAPER))
def test_every_value_is_the_papers_or_says_that_it_is_ours(name):
    recipe = Recipe.load(name)
    values = flat(recipe.to_dict())
    paper, named, section = COMMON | PAPER[name], set(), ""
    for line in (RECIPES / f"{name}.toml").read_text().splitlines():
        if header := re.match(r"\[(\w+)\]", line):
            section = f"{header[1]}."
        setting = re.match(r"(\w+) = ", line)
        if setting is None:
            continue
        key = short_name(section + setting[1])
        named.add(key)
        if re.search(r"#.*\bours\b", line) is None:
            wanted = paper[key]
            wanted = pytest.approx(wanted) if isinstance(wanted, float) else wanted
            assert values[key] == wanted, key
    assert paper.keys() <= named


@pytest.fixture
def folders(stable_diffusion_folder, tmp_path, monkeypatch):
    """A generator and real images of the classes of ImageNet-100, and no weights may be read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PipelineFolder, "model", lambda *_, **__: pytest.fail("weights were read"))
    generator, validation = tmp_path / "generator", tmp_path / "validation"
    shutil.copytree(stable_diffusion_folder, generator)
    for wordnet_id in imagenet.load().ids_of(imagenet.named("imagenet100")):
        (validation / wordnet_id).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (8, 8), color=i).save(validation / wordnet_id / f"{i}.png")
    return generator, validation


def no_image(generator, validation):
    for image in (validation / "n02869837").iterdir():
        image.unlink()


def no_weights(generator, validation):
    next((generator / "vae").glob("*.safetensors")).unlink()


def cut_short(generator, validation):
    path = next((generator / "text_encoder").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


def no_shard(generator, validation):
    index = {"weight_map": {"weight": "model-00002-of-00002.safetensors"}}
    (generator / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN = {
    r"pipeline = .*generator'\)?: no such folder": lambda g, v: shutil.rmtree(g),
    r"the folder has no part 'unet', which a StableDiffusionPipeline needs": lambda g, v: (
        shutil.rmtree(g / "unet")
    ),
    r"'vae' has no \.safetensors weights": no_weights,
    r"'text_encoder': .*safetensors is damaged or cut short": cut_short,
    r"'text_encoder' lacks model-00002-of-00002.safetensors, "
    r"which model.safetensors.index.json names": no_shard,
    r"validation = .*: no such folder": lambda g, v: shutil.rmtree(v),
    r"validation = .*: it has no sub-folders": lambda g, v: (shutil.rmtree(v), v.mkdir()),
    r"validation = .*: classes that the learner does not know: terrier": lambda g, v: (
        v / "terrier"
    ).mkdir(),
    r"validation = .*: no images of 'bonnet, poke bonnet'": no_image,
    r"validation = .*: no images of .* and 98 more classes": lambda g, v: [
        shutil.rmtree(path) for path in sorted(v.iterdir())[1:]
    ],
}


@pytest.mark.parametrize("message", BROKEN)
def test_folders_that_do_not_fit_are_named_before_weights_are_read(
    message, folders, capsys, tmp_path
):
    BROKEN[message](*folders)
    arguments = ["--pipeline", str(folders[0]), "--validation", str(folders[1])]
    assert main(["run", "imagenet100-sd15", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert {path.name for path in tmp_path.iterdir()} <= {
        "generator",
        "validation",
    }  # nothing half-written


@pytest.mark.parametrize("name", sorted(PAPER))
def test_a_recipe_without_its_folders_names_all_options_that_are_missing(name, folders, capsys):
    generator, validation = ["--pipeline", str(folders[0])], ["--validation", str(folders[1])]
    said = f"dpfast: error: recipe = '{name}': needs folders of yours, say "
    for given, missing in (
        ([], "--pipeline FOLDER --validation FOLDER"),
        (generator, "--validation FOLDER"),
        (validation, "--pipeline FOLDER"),
    ):
        assert main(["run", name, *given]) == 2
        assert capsys.readouterr().err == f"{said}{missing}\n"
    assert main(["sample", "--recipe", name, "--labels", "0", "--out", "images"]) == 2
    assert capsys.readouterr().err == f"{said}--pipeline FOLDER\n"
