"""Models of the Hugging Face Hub by name, from a cache on this machine, offline."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.errors
import pytest
import torch

from dpfast.config import Generator
from dpfast.errors import InputError
from dpfast.generate.from_recipe import fetched, folder_of, load_pipeline
from dpfast.generate.models.decoder import TinyDecoder, VaeDecoder
from dpfast.generate.pipelines import Pipeline, hub
from dpfast.generate.pipelines.folder import PipelineFolder
from tests import tiny_pipelines
from tests.hub_cache import FIRST, SECOND, cached
from tests.tiny_pipelines import NAMES

MODEL = "someone/tiny-dit"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    place = tmp_path / "home" / "hub"
    place.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return place


def weights_of(folder, part="transformer"):
    (found,) = (folder / part).glob("*.safetensors")
    return found


def test_a_model_is_found_by_its_name_and_revision(cache, pipeline_folder):
    first = cached(cache, MODEL, pipeline_folder)
    second = cached(cache, MODEL, pipeline_folder, SECOND, ref="v2")
    assert PipelineFolder(MODEL).path == first
    assert PipelineFolder(MODEL, revision="v2").path == second
    assert PipelineFolder(MODEL, revision=SECOND).path == second
    assert hub.commit_of(second) == SECOND
    pipeline, there = Pipeline.from_pretrained(MODEL), Pipeline.from_pretrained(pipeline_folder)
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(pipeline.decoder(latents), there.decoder(latents))


def test_the_folder_of_a_model_in_a_cache_may_be_given_as_a_path(cache, pipeline_folder, tmp_path):
    """Also in another cache than the environment's, and a snapshot of it."""
    other = tmp_path / "elsewhere"
    first = cached(other, MODEL, pipeline_folder)
    second = cached(other, MODEL, pipeline_folder, SECOND, ref="v2")
    model = other / "models--someone--tiny-dit"
    assert PipelineFolder(model).path == first
    assert PipelineFolder(model, revision="v2").path == second
    assert PipelineFolder(second, revision=SECOND).path == second
    with pytest.raises(InputError, match=rf"revision = '{FIRST}': is for models of the Hub"):
        PipelineFolder(second, revision=FIRST)


def test_a_folder_goes_before_a_model_of_the_same_name(cache, pipeline_folder, tmp_path):
    cached(cache, MODEL, pipeline_folder)
    local = shutil.copytree(pipeline_folder, tmp_path / MODEL)
    assert PipelineFolder(MODEL).path.resolve() == local
    with pytest.raises(InputError, match="revision = 'main': is for models of the Hub, and pipe"):
        PipelineFolder(MODEL, revision="main")
    shutil.rmtree(tmp_path / "someone")
    with pytest.raises(InputError, match="no such folder; expected a diffusers pipeline folder"):
        PipelineFolder(f"./{MODEL}")


@pytest.mark.parametrize(
    ("source", "revision", "words"),
    [
        (
            "nobody/nothing",
            "",
            r"pipeline = 'nobody/nothing': no such folder, and no model of that name in the Hub's "
            r"cache '.*hub' \(HF_HUB_OFFLINE is set\); to download it: hf download nobody/nothing$",
        ),
        (
            MODEL,
            "v3",
            r"revision = 'v3': pipeline = 'someone/tiny-dit' has in the Hub's cache .* main, 1{40} "
            r"alone; to download it: hf download someone/tiny-dit --revision v3$",
        ),
        (MODEL, SECOND, rf"revision = '{SECOND}': pipeline .*--revision {SECOND}$"),
        (MODEL, "../main", r"revision = '\.\./main': .*hf download|revision = '\.\./main'"),
        ("runs/genrator", "", "pipeline = 'runs/genrator': no such folder, and no model"),
        ("fashion", "main", "revision = 'main': is for models of the Hub, and pipeline = 'fashi"),
    ],
)
def test_what_the_cache_lacks_is_said_in_one_line_with_the_command(
    source, revision, words, cache, pipeline_folder
):
    cached(cache, MODEL, pipeline_folder)
    with pytest.raises(InputError, match=words) as error:
        PipelineFolder(source, revision=revision)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lost", ["file", "blob", "part", "index", "config"])
def test_an_incomplete_download_is_named(lost, cache, pipeline_folder):
    snapshot = cached(cache, MODEL, pipeline_folder)
    if lost == "file":
        weights_of(snapshot).unlink()
    elif lost == "blob":
        weights_of(snapshot).resolve().unlink()
    elif lost == "part":
        shutil.rmtree(snapshot / "transformer")
    elif lost == "index":
        (snapshot / "model_index.json").unlink()
        trees = snapshot.parent.parent / "trees"  # what the commit holds, as newer versions note
        trees.mkdir()
        files = {"model_index.json": {"size": 9, "blob_id": "0" * 40}}
        (trees / f"{FIRST}.json").write_text(json.dumps({"format_version": 1, "files": files}))
    else:
        (snapshot / "transformer" / "config.json").unlink()
    words = {
        "file": r"'transformer' has no \.safetensors weights",
        "blob": r"'transformer' lacks .*safetensors, a link that leads nowhere",
        "part": "the folder has no part 'transformer'",
        "index": r"it has no model_index\.json",
        "config": "'transformer' ",
    }[lost]
    complete = f"; its download is not complete: hf download {MODEL} --revision {FIRST}$"
    with pytest.raises(InputError, match=f"pipeline = '{MODEL}': .*{words}.*{complete}"):
        Pipeline.from_pretrained(MODEL)


def test_a_cache_that_may_not_be_written_is_read(cache, pipeline_folder, tmp_path):
    snapshot = cached(cache, MODEL, pipeline_folder)
    before = sorted(str(each) for each in tmp_path.rglob("*"))
    for folder, _, _ in os.walk(cache.parent):
        Path(folder).chmod(0o555)
    try:
        assert load_pipeline(Generator(pipeline=MODEL), device="cpu").folder == snapshot
    finally:
        for folder, _, _ in os.walk(cache.parent):
            Path(folder).chmod(0o755)
    assert sorted(str(each) for each in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "form",
    [
        "fp16",
        "former",
        pytest.param("sharded", marks=pytest.mark.long),
        pytest.param("mixed", marks=pytest.mark.long),
    ],
)
def test_weights_of_a_variant_are_read(form, cache, stable_diffusion_folder, tmp_path):
    """As save_pretrained(variant = "fp16") writes them, whole and in shards; as older versions
    wrote shards; and where one part has none.
    """
    import diffusers

    whole = Pipeline.from_pretrained(stable_diffusion_folder, class_names=NAMES)
    folder = tmp_path / "half"
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        stable_diffusion_folder, safety_checker=None
    )
    pipe.save_pretrained(folder, variant="fp16")
    if form in ("sharded", "former"):
        weights_of(folder, "unet").unlink()
        pipe.unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size="20KB")
    if form == "former":
        (index,) = (folder / "unet").glob("*.index.fp16.json")
        table = json.loads(index.read_text())
        names = {}
        for name in set(table["weight_map"].values()):
            names[name] = name.replace(".fp16-", "-").replace(".safetensors", ".fp16.safetensors")
            (folder / "unet" / name).rename(folder / "unet" / names[name])
        table["weight_map"] = {k: names[v] for k, v in table["weight_map"].items()}
        index.write_text(json.dumps(table))
    if form == "mixed":
        weights_of(folder, "vae").unlink()
        pipe.vae.save_pretrained(folder / "vae")
    cached(cache, MODEL, folder)
    read = Pipeline.from_pretrained(MODEL, variant="fp16", class_names=NAMES)
    for name, value in whole.denoiser.model.state_dict().items():
        assert torch.equal(read.denoiser.model.state_dict()[name], value)
    assert torch.equal(read.denoiser.embeddings, whole.denoiser.embeddings)
    with pytest.raises(
        InputError, match=r"has weights of the variant 'fp16' alone; say --variant fp16$"
    ):
        Pipeline.from_pretrained(MODEL, class_names=NAMES)
    with pytest.raises(InputError, match="'fp16' alone"):
        Pipeline.from_pretrained(MODEL, variant="bf16", class_names=NAMES)
    lost = sorted((cache / "models--someone--tiny-dit").rglob("unet/*.safetensors"))[-1]
    lost.unlink()
    with pytest.raises(InputError, match=r"'unet' (lacks|has no) .*not complete"):
        Pipeline.from_pretrained(MODEL, variant="fp16", class_names=NAMES)


def test_a_variant_that_no_part_has_is_refused(pipeline_folder):
    words = r"variant = 'fp16': none of its weights are of it \(transformer, vae\); leave it out"
    for folder in (pipeline_folder, "fashion"):
        with pytest.raises(InputError, match=words if folder != "fashion" else "variant = 'fp16'"):
            Pipeline.from_pretrained(folder, variant="fp16")


def test_a_tiny_decoder_comes_from_elsewhere(cache, tmp_path):
    folder = tiny_pipelines.dit(tmp_path / "dit", tiny=False)
    tiny_pipelines.tiny_vae().save_pretrained(tmp_path / "taesd")
    cached(cache, "someone/taesd", tmp_path / "taesd")
    assert isinstance(Pipeline.from_pretrained(folder).guidance_decoder, VaeDecoder)
    latents = torch.randn(1, 4, 8, 8)
    made = []
    for tiny in (str(tmp_path / "taesd"), "someone/taesd"):
        pipeline = load_pipeline(Generator(pipeline=str(folder), tiny_decoder=tiny), device="cpu")
        assert isinstance(pipeline.guidance_decoder, TinyDecoder)
        assert isinstance(pipeline.decoder, VaeDecoder)
        made.append(pipeline.guidance_decoder(latents))
    assert torch.equal(*made)
    for tiny, words in (
        (folder / "vae", r"tiny_decoder = '.*vae': AutoencoderKL; expected AutoencoderTiny"),
        (tmp_path / "none", r"tiny_decoder = '.*none': no such folder"),
        ("someone/other", r"tiny_decoder = 'someone/other': no such folder, and no model"),
        (folder, "'tiny_decoder' has no config"),
    ):
        with pytest.raises(InputError, match=words):
            Pipeline.from_pretrained(folder, tiny_decoder=str(tiny))


def test_a_generator_is_fetched_only_where_the_cache_lacks_it(cache, pipeline_folder, monkeypatch):
    asked = []

    def fetch(source, *given, **options):
        asked.append((source, *given))
        cached(cache, source, pipeline_folder)

    monkeypatch.setattr(hub, "fetch", fetch)
    generator = Generator(pipeline=MODEL, variant="")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        fetched(generator)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert fetched(generator).revision == FIRST
    assert asked == [(MODEL, "", "")]
    assert fetched(generator).revision == FIRST
    weights_of(folder_of(generator).path).unlink()
    assert fetched(generator).revision == FIRST
    assert len(asked) == 2
    assert fetched(Generator(pipeline=str(pipeline_folder))).revision == ""


def test_a_download_beats_while_it_grows_and_its_failure_is_one_line(cache, monkeypatch):
    import diffusers

    beats, blobs = [], cache / "models--someone--tiny-dit" / "blobs"
    monkeypatch.setattr(hub, "WATCHED", 0.02)

    def download(*_, **__):
        blobs.mkdir(parents=True)
        for size in range(5):
            (blobs / "x.incomplete").write_bytes(b"0" * size)
            time.sleep(0.05)
        grown = len(beats)
        time.sleep(0.3)
        assert len(beats) - grown <= 1  # a download that hangs is no progress
        raise OSError("no route to the Hub\nand more")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    threads = threading.active_count()
    words = "downloading it failed: no route to the Hub; where there is a network: hf download "
    with pytest.raises(InputError, match=f"{words}{MODEL}$"):
        hub.fetch(MODEL, beat=lambda: beats.append(1))
    assert len(beats) >= 3
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", f"give it on https://huggingface.co/{MODEL}, and say 'hf auth login'$"),
        ("RepositoryNotFoundError", "the Hub has no model of that name, or it is private"),
        ("RevisionNotFoundError", "it has no revision 'v2'$"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_what_helps(kind, words, monkeypatch):
    """It is asked once, before anything is downloaded: libraries try five times in 25 seconds."""
    asked = []

    def model_info(_, model, *, revision, timeout):
        asked.append((model, revision, timeout))
        error = getattr(huggingface_hub.errors, kind)
        raise error.__new__(error, "401 Client Error\nand more")  # without the Hub's response

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    for field in ("pipeline", "pretrained"):
        with pytest.raises(InputError, match=f"^{field} = '{MODEL}': .*{words}") as caught:
            hub.fetch(MODEL, "v2", field=field)
        assert "\n" not in str(caught.value)
    assert asked == [(MODEL, "v2", hub.ANSWERS)] * 2


@pytest.mark.long
def test_the_environment_says_where_the_cache_is(tmp_path, pipeline_folder):
    cached(tmp_path / "hub", MODEL, pipeline_folder)
    code = f"from dpfast.generate.pipelines.hub import located; print(located({MODEL!r}))"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip().endswith(f"snapshots/{FIRST}")
