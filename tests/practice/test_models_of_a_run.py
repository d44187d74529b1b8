"""What a run remembers of the models that it was born with."""

from dataclasses import replace

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from dpfast.config import Recipe
from dpfast.errors import RecipeError
from dpfast.generate.from_recipe import fetched
from dpfast.practice.changes import continued, write_recipe
from tests import tiny_pipelines
from tests.hub_cache import FIRST, SECOND, cached

MODEL = "someone/tiny-dit"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def with_generator(recipe, **changes):
    return replace(recipe, generator=replace(recipe.generator, **changes))


def test_a_run_goes_on_with_the_commit_that_it_began_with(cache, pipeline_folder, tmp_path):
    """A branch that has moved since is not followed; another commit, though its files have the same
    sizes, is refused, and named.
    """
    asked = Recipe.load("fashion", pipeline=MODEL)
    cached(cache, MODEL, pipeline_folder)
    born = replace(asked, generator=fetched(asked.generator))
    assert born.generator.revision == FIRST
    run = tmp_path / "run"
    run.mkdir()
    write_recipe(run, born)
    cached(cache, MODEL, pipeline_folder, SECOND)  # moves main
    assert continued(run, asked).generator.revision == FIRST
    assert continued(run, with_generator(asked, revision=FIRST)).generator.revision == FIRST
    for revision in (SECOND, "main"):
        with pytest.raises(RecipeError, match=rf"holds other .*: commit is {SECOND}, was {FIRST}"):
            continued(run, with_generator(asked, revision=revision))
    more = cache / "models--someone--tiny-dit" / "snapshots" / FIRST / "README.json"
    more.write_text("{}")  # a file more of the same commit is the same commit
    assert continued(run, asked).generator.revision == FIRST
    # a folder has moved where it holds the same
    moved = with_generator(asked, pipeline=str(pipeline_folder))
    more.unlink()
    assert continued(run, moved).generator.pipeline == str(pipeline_folder)


def test_tiny_decoder_and_lora_of_the_hub_keep_the_commits_that_they_began_with(
    cache, stable_diffusion_folder, tmp_path
):
    style = tmp_path / "style"
    tiny_pipelines.tiny_vae().save_pretrained(tmp_path / "tiny")
    style.mkdir()
    tiny, lora = ("someone/taesd", ("someone/style/one.safetensors:0.5", "someone/style"))
    asked = Recipe.load(
        "fashion", pipeline=str(stable_diffusion_folder), tiny_decoder=tiny, lora=lora
    )
    run = tmp_path / "run"
    run.mkdir()
    for commit in (FIRST, SECOND):
        save_file({"of": torch.tensor(int(commit[0]))}, style / "one.safetensors")
        cached(cache, tiny, tmp_path / "tiny", commit)
        cached(cache, "someone/style", style, commit)
        found = fetched(asked.generator)
        assert found.tiny_decoder == f"{tiny}@{commit}"
        name = f"someone/style@{commit}"
        assert found.lora == (f"{name}/one.safetensors:0.5", name)
        assert fetched(found) == found
        if commit == FIRST:
            write_recipe(run, replace(asked, generator=found))
    # main has moved: the command as it was goes on with the first commits
    goes_on = continued(run, asked).generator
    assert goes_on == fetched(goes_on)
    assert goes_on.tiny_decoder == f"{tiny}@{FIRST}"
    assert all(FIRST in text for text in goes_on.lora)
    for field, words in (("tiny_decoder", f"commit is {SECOND}, was {FIRST}"), ("lora", "0 is ")):
        other = with_generator(replace(asked, generator=goes_on), **{field: getattr(found, field)})
        with pytest.raises(RecipeError, match=f"{field} = '.*{SECOND}.*: holds other .*{words}"):
            continued(run, other)


def test_another_tiny_decoder_is_refused(cache, pipeline_folder, tmp_path):
    for name in ("one", "other"):
        tiny = tiny_pipelines.tiny_vae()
        if name == "other":
            tiny.register_to_config(force_upcast=True)
        tiny.save_pretrained(tmp_path / name)
    run = tmp_path / "run"
    run.mkdir()
    recipe = Recipe.load(
        "fashion", pipeline=str(pipeline_folder), tiny_decoder=str(tmp_path / "one")
    )
    write_recipe(run, recipe)
    continued(run, recipe)
    with pytest.raises(RecipeError, match=r"tiny_decoder = '.*other': holds other things"):
        continued(run, with_generator(recipe, tiny_decoder=str(tmp_path / "other")))
