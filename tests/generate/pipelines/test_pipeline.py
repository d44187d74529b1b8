"""Loading a pipeline folder: every missing or unsafe part is named."""

import json
import shutil

import diffusers
import pytest
import safetensors.torch
import torch

from dpfast.errors import InputError
from dpfast.generate.models.decoder import IdentityDecoder, TinyDecoder, VaeDecoder
from dpfast.generate.pipelines import Pipeline
from tests import tiny_pipelines
from tests.tiny_pipelines import NAMES


@pytest.fixture
def broken(pipeline_folder, tmp_path):
    return shutil.copytree(pipeline_folder, tmp_path / "broken")


@pytest.fixture
def broken_text(stable_diffusion_folder, tmp_path):
    return shutil.copytree(stable_diffusion_folder, tmp_path / "broken")


def edit(path, **values):
    """Sets fields of a JSON file; None removes one."""
    table = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not None}))


@pytest.mark.parametrize(
    ("folder", "part"),
    [
        *(("pipeline_folder", part) for part in ("transformer", "vae", "scheduler")),
        *(
            ("stable_diffusion_folder", part)
            for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
        ),
        *(
            ("stable_diffusion_xl_folder", part)
            for part in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer_2")
        ),
        *(
            ("stable_diffusion_3_folder", part)
            for part in ("text_encoder_2", "tokenizer_2", "text_encoder_3")
        ),
        *(("pixel_folder", part) for part in ("unet", "scheduler")),
    ],
)
def test_a_missing_part_is_named(folder, part, tmp_path, request):
    copy = shutil.copytree(request.getfixturevalue(folder), tmp_path / "broken")
    shutil.rmtree(copy / part)
    with pytest.raises(InputError, match=f"no part '{part}'"):
        Pipeline.from_pretrained(copy, class_names=NAMES)


def test_a_folder_that_is_no_pipeline_is_refused(broken, tmp_path):
    with pytest.raises(
        InputError, match="no such folder; expected a diffusers pipeline folder or one of: fashion"
    ):
        Pipeline.from_pretrained(tmp_path / "missing")
    index = broken / "model_index.json"
    index.write_text(json.dumps({"_class_name": "AudioLDMPipeline"}))
    with pytest.raises(
        InputError,
        match="a AudioLDMPipeline; expected one of DDIMPipeline, DDPMPipeline, DiTPipeline",
    ):
        Pipeline.from_pretrained(broken)
    for text, named in (("{", ": cannot be read as JSON"), ("[]", " is not a table")):
        index.write_text(text)
        with pytest.raises(InputError, match=rf"model_index\.json{named}"):
            Pipeline.from_pretrained(broken)
    index.unlink()
    with pytest.raises(InputError, match=r"model_index\.json"):
        Pipeline.from_pretrained(broken)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_pickled_weights_are_refused(part, broken_text):
    (weights,) = (broken_text / part).glob("*.safetensors")
    torch.save({"weight": torch.zeros(1)}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(InputError, match=rf"'{part}' has no \.safetensors weights; pickled"):
        Pipeline.from_pretrained(broken_text, class_names=NAMES)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_incomplete_and_damaged_weights_are_refused(part, broken_text):
    """diffusers and transformers would fill what is missing with random numbers."""
    (path,) = (broken_text / part).glob("*.safetensors")
    weights = safetensors.torch.load_file(path)
    lost = sorted(weights)[0]
    safetensors.torch.save_file(
        {k: v for k, v in weights.items() if k != lost}, path, metadata={"format": "pt"}
    )
    with pytest.raises(
        InputError, match=f"'{part}' lacks 1 weights of a .*, the first is .*{lost.split('.')[-2]}"
    ):
        Pipeline.from_pretrained(broken_text, class_names=NAMES)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=f"'{part}': .*safetensors is damaged or cut short"):
        Pipeline.from_pretrained(broken_text, class_names=NAMES)


def test_the_published_form_of_a_1_x_folder_is_read(broken_text):
    """Attention weights of the decoder called query, key, value and proj_attn; prefixed text
    weights with a saved
    index; a tokenizer of vocab.json and merges.txt."""
    before = Pipeline.from_pretrained(broken_text, class_names=NAMES)

    def rewrite(path, change):
        weights = change(safetensors.torch.load_file(path))
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})

    def old_attention(name):
        for new, old in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            name = name.replace(f".{new}.", f".{old}.")
        return name

    def old_text(weights):
        prefixed = {
            f"text_model.{name.removeprefix('text_model.')}": weight
            for name, weight in weights.items()
        }
        return {**prefixed, "text_model.embeddings.position_ids": torch.arange(16)[None]}

    vae, text = (
        broken_text / "vae" / "diffusion_pytorch_model.safetensors",
        broken_text / "text_encoder",
    )
    rewrite(vae, lambda weights: {old_attention(name): weight for name, weight in weights.items()})
    rewrite(text / "model.safetensors", old_text)
    tokenizer = broken_text / "tokenizer"
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    (tokenizer / "tokenizer.json").unlink()
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))

    after = Pipeline.from_pretrained(broken_text, class_names=NAMES)
    assert torch.equal(after.denoiser.embeddings, before.denoiser.embeddings)
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(after.decoder(latents), before.decoder(latents))


def test_a_tokenizer_that_cannot_be_read_is_refused(broken_text):
    for path in (broken_text / "tokenizer").iterdir():
        path.write_text("{")
    with pytest.raises(InputError, match="'tokenizer' cannot be loaded"):
        Pipeline.from_pretrained(broken_text, class_names=NAMES)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("stable_diffusion_folder", r"vocab\.json and merges\.txt"),
        ("pixart_folder", r"spiece\.model"),
        ("sana_folder", r"tokenizer\.model"),
    ],
)
def test_a_tokenizer_without_its_words_is_refused(family, words, request, tmp_path):
    """transformers makes one that knows no word, and every prompt would be the same."""
    copied = shutil.copytree(request.getfixturevalue(family), tmp_path / "copied")
    (copied / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(
        InputError, match=f"'tokenizer' has no words: expected tokenizer.json, or {words}$"
    ):
        Pipeline.from_pretrained(copied, class_names=NAMES)


def test_parts_that_do_not_fit_their_configurations_are_named(
    broken_text, pipeline_folder, tmp_path
):
    edit(broken_text / "text_encoder" / "config.json", hidden_size=20)
    with pytest.raises(InputError, match=r"'text_encoder' .* not of the shapes that its config"):
        Pipeline.from_pretrained(broken_text, class_names=NAMES)
    edit(broken_text / "unet" / "config.json", sample_size=None)
    with pytest.raises(InputError, match=r"'unet' has no sample_size in its config\.json"):
        Pipeline.from_pretrained(broken_text, class_names=NAMES)
    tiny = tiny_pipelines.tiny_vae(latent_channels=16)
    tiny.save_pretrained(tmp_path / "tiny")
    with pytest.raises(InputError, match="the tiny decoder takes 16 channels and the denoiser has"):
        Pipeline.from_pretrained(pipeline_folder, tiny_decoder=str(tmp_path / "tiny"))


def test_prompts_need_class_names(broken_text):
    with pytest.raises(
        InputError, match=r"StableDiffusionPipeline needs class names: pass class_names = .*\.json"
    ):
        Pipeline.from_pretrained(broken_text)
    path = broken_text / "class_names.json"
    path.write_text(json.dumps(["ship", "frog"]))
    assert Pipeline.from_pretrained(broken_text).class_names == ("ship", "frog")
    assert Pipeline.from_pretrained(broken_text, class_names=["one"]).class_names == ("one",)
    for names, named in (
        (["a", 3], "3 is no name"),
        (["a", " "], "' ' is no name"),
        ([], "at least one"),
        ("ab", "list"),
    ):
        path.write_text(json.dumps(names))
        with pytest.raises(InputError, match=rf"class_names\.json.*{named}"):
            Pipeline.from_pretrained(broken_text)
        with pytest.raises(InputError, match=f"class_names.*{named}"):
            Pipeline.from_pretrained(broken_text, class_names=names)


@pytest.mark.parametrize("template", ["a photo", "a {} of a {}", 3])
def test_a_prompt_template_has_one_place_for_the_name(template, stable_diffusion_folder):
    with pytest.raises(InputError, match=r"prompt_template = .*expected text with one '{}'"):
        Pipeline.from_pretrained(
            stable_diffusion_folder, class_names=NAMES, prompt_template=template
        )


@pytest.mark.parametrize(
    ("names", "named"), [({"0": "a", "2": "b"}, "without gaps"), (["a"], "not a table")]
)
def test_id2label_is_checked(names, named, broken):
    edit(broken / "model_index.json", id2label=names)
    with pytest.raises(InputError, match=f"id2label in model_index.json.*{named}"):
        Pipeline.from_pretrained(broken)


def test_more_names_than_the_model_has_classes_are_refused(pipeline_folder, tmp_path):
    with pytest.raises(InputError, match="1001 class names for a model of 1000 classes"):
        Pipeline.from_pretrained(pipeline_folder, class_names=["x"] * 1001)
    folder = tiny_pipelines.pixel(tmp_path, class_embeddings=5)
    with pytest.raises(
        InputError, match="3 class names for a model of 5 class embeddings; expected 5, or 4"
    ):
        Pipeline.from_pretrained(folder, class_names=NAMES)


def test_models_of_other_conditions_are_refused(broken_text, pixel_folder, tmp_path):
    """A UNet of class ids, one that takes nine channels, and pixels without a size."""
    options = {**diffusers.UNet2DConditionModel.load_config(broken_text / "unet")}
    for changed, named in (
        ({"num_class_embeds": 8}, "num_class_embeds = 8"),
        ({"in_channels": 9}, "takes 9 channels"),
    ):
        diffusers.UNet2DConditionModel.from_config({**options, **changed}).save_pretrained(
            broken_text / "unet"
        )
        with pytest.raises(InputError, match=named):
            Pipeline.from_pretrained(broken_text, class_names=NAMES)
    pixels = shutil.copytree(pixel_folder, tmp_path / "pixels")
    edit(pixels / "unet" / "config.json", sample_size=None)
    with pytest.raises(InputError, match="'unet' has no sample_size"):
        Pipeline.from_pretrained(pixels)


def test_the_scheduler_fits_the_family(stable_diffusion_3_folder, pixel_folder, tmp_path):
    for folder, scheduler in (
        (stable_diffusion_3_folder, diffusers.DDIMScheduler()),
        (pixel_folder, diffusers.FlowMatchEulerDiscreteScheduler()),
    ):
        copy = shutil.copytree(folder, tmp_path / folder.name)
        scheduler.save_pretrained(copy / "scheduler")
        with pytest.raises(InputError, match=f"scheduler {type(scheduler).__name__}: a .* needs"):
            Pipeline.from_pretrained(copy, class_names=NAMES)


def test_decoders(pipeline_folder, pixel_folder, broken):
    pipeline = Pipeline.from_pretrained(pipeline_folder)
    assert isinstance(pipeline.decoder, VaeDecoder)
    assert isinstance(pipeline.guidance_decoder, TinyDecoder)
    pixels = Pipeline.from_pretrained(pixel_folder)
    assert isinstance(pixels.decoder, IdentityDecoder)
    assert pixels.image_channels == 1

    shutil.rmtree(broken / "tiny_decoder")
    without = Pipeline.from_pretrained(broken)
    assert without.guidance_decoder is without.decoder

    shutil.rmtree(broken / "vae")
    shutil.copytree(pipeline_folder / "tiny_decoder", broken / "vae")
    edit(broken / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    assert isinstance(Pipeline.from_pretrained(broken).decoder, TinyDecoder)
    edit(broken / "model_index.json", vae=["diffusers", "VQModel"])
    with pytest.raises(InputError, match="'vae' is VQModel; expected one of AutoencoderKL, "):
        Pipeline.from_pretrained(broken)


def test_timesteps_between_those_of_training_are_refused_where_there_are_tables(tmp_path):
    folder = tiny_pipelines.dit(tmp_path / "dit")
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="linspace")
    scheduler.save_pretrained(folder / "scheduler")
    with pytest.raises(InputError, match=r"solver = 'euler': in 3 steps it stops between the time"):
        Pipeline.from_pretrained(folder).table(3, solver="euler")


def test_dtype_and_attention_are_checked(pipeline_folder):
    with pytest.raises(
        InputError, match=r"dtype = 'torch\.int8': expected one of float32, bfloat16, float16"
    ):
        Pipeline.from_pretrained(pipeline_folder, dtype=torch.int8)
    with pytest.raises(InputError, match="attention = 'flash': expected 'sdpa' or 'xformers'"):
        Pipeline.from_pretrained(pipeline_folder, attention="flash")


def test_names_and_shapes_come_from_the_folder(pipeline):
    assert pipeline.class_names == NAMES
    assert pipeline.denoiser.classes == 3
    assert pipeline.denoiser.sample_shape == (4, 8, 8)
    assert pipeline.denoiser.prediction == "epsilon"
    assert pipeline.image_channels == 1
    assert pipeline.table(5, solver="dpmpp2m").needs_x0_prev


def test_a_loaded_model_is_frozen(stable_diffusion_folder):
    """No gradient reaches the generator's weights, nor the embeddings of its prompts."""
    pipeline = Pipeline.from_pretrained(stable_diffusion_folder, class_names=NAMES)
    tensors = [
        *pipeline.denoiser.model.parameters(),
        *pipeline.decoder.model.parameters(),
        pipeline.denoiser.embeddings,
    ]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert not pipeline.denoiser.model.training
    assert pipeline.denoiser.embeddings.shape == (4, 16, 16)
