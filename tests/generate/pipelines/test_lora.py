"""LoRA weights are fused into the models of a folder as they are read."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from dpfast.errors import InputError
from dpfast.extras import installed
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.pipelines.folder import PipelineFolder
from dpfast.generate.pipelines.lora import LoraFile, model_id
from tests.tiny_pipelines import NAMES

ATTENTION = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
CONVOLUTION = "unet.down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.1.self_attn"
RANK = 2


def factors(*shapes):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


A, B, C, D, E, F = factors(
    (RANK, 16), (16, RANK), (RANK, 8, 3, 3), (8, RANK, 1, 1), (RANK, 16), (16, RANK)
)
PEFT = {
    f"{ATTENTION}.to_q.lora_A.weight": A,
    f"{ATTENTION}.to_q.lora_B.weight": B,
    f"{CONVOLUTION}.lora_A.weight": C,
    f"{CONVOLUTION}.lora_B.weight": D,
    f"{TEXT}.q_proj.lora_A.weight": E,
    f"{TEXT}.q_proj.lora_B.weight": F,
    f"{TEXT}.out_proj.lora_A.weight": E,
    f"{TEXT}.out_proj.lora_B.weight": -F,
}
CHANGES = {  # by hand
    f"{ATTENTION}.to_q": B @ A,
    CONVOLUTION: torch.einsum("or,rikl->oikl", D[:, :, 0, 0], C),
    f"{TEXT}.q_proj": F @ E,
    f"{TEXT}.out_proj": -F @ E,
}
OLD = {
    f"{ATTENTION}.processor.to_q_lora.down.weight": A,
    f"{ATTENTION}.processor.to_q_lora.up.weight": B,
    f"{TEXT}.to_q_lora.down.weight": E,
    f"{TEXT}.to_q_lora.up.weight": F,
    f"{TEXT}.to_out_lora.down.weight": E,
    f"{TEXT}.to_out_lora.up.weight": -F,
}


def kohya(alpha):
    def named(module):
        return (
            module.replace("text_encoder.", "lora_te.", 1)
            .replace("unet.", "lora_unet.", 1)
            .replace(".", "_")
        )

    table = {}
    for module, (down, up) in {
        f"{ATTENTION}.to_q": (A, B),
        CONVOLUTION: (C, D),
        f"{TEXT}.q_proj": (E, F),
        f"{TEXT}.out_proj": (E, -F),
    }.items():
        table[f"{named(module)}.lora_down.weight"] = down
        table[f"{named(module)}.lora_up.weight"] = up
        table[f"{named(module)}.alpha"] = torch.tensor(float(alpha))
    return table


def weights(folder, part, kind):
    return folder.model(kind, part, device="cpu", dtype=torch.float32).state_dict()


def models(source, *lora):
    import diffusers
    import transformers

    folder = PipelineFolder(source, lora=lora)
    unet = weights(folder, "unet", diffusers.UNet2DConditionModel)
    text = weights(folder, "text_encoder", transformers.CLIPTextModel)
    return {f"unet.{k}": v for k, v in unet.items()} | {
        f"text_encoder.text_model.{k.removeprefix('text_model.')}": v for k, v in text.items()
    }


@pytest.fixture
def file(tmp_path):
    def write(table, name="lora.safetensors", **metadata):
        table = {key: value.clone().contiguous() for key, value in table.items()}
        safetensors.torch.save_file(table, tmp_path / name, metadata=metadata or None)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("form", "scale"),
    [
        ("peft", 1),
        ("old", 1),
        ("kohya", 0.25),
        ("peft with alpha", 4),
        ("peft with rslora", 6 / 2**0.5),
    ],
)
@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_weights_change_by_the_product_of_the_factors(
    form, scale, weight, file, stable_diffusion_folder
):
    if form == "old":
        given, changes = file(OLD), {k: v for k, v in CHANGES.items() if k != CONVOLUTION}
    elif form == "kohya":
        given, changes = file(kohya(0.5)), CHANGES
    else:
        settings = {
            "peft": {},
            "peft with alpha": {
                "lora_alpha": 2,
                "alpha_pattern": {"to_q": 8, "conv1": 8, "q_proj": 8, "out_proj": 8},
            },
        }.get(form, {"lora_alpha": 6, "use_rslora": True})
        noted = {f"{p}.{k}": v for p in ("unet", "text_encoder") for k, v in settings.items()}
        given = file(PEFT, lora_adapter_metadata=json.dumps(noted))
        changes = CHANGES
    before = models(stable_diffusion_folder)
    after = models(stable_diffusion_folder, given if weight == 1 else f"{given}:{weight}")
    for name, value in before.items():
        change = changes.get(name.removesuffix(".weight"), torch.zeros(()))
        if name.endswith(".bias"):
            change = torch.zeros(())
        torch.testing.assert_close(
            after[name], value + weight * scale * change, rtol=1e-6, atol=1e-6
        )


def test_several_files_add_up_and_reach_the_pipeline(file, stable_diffusion_folder):
    one, other = file(PEFT, "one.safetensors"), file(OLD, "other.safetensors")
    options = {"class_names": NAMES}
    both = Pipeline.from_pretrained(
        stable_diffusion_folder, lora=(f"{one}:0.5", f"{other}:-0.5"), **options
    )
    plain = Pipeline.from_pretrained(stable_diffusion_folder, **options)
    torch.testing.assert_close(both.denoiser.embeddings, plain.denoiser.embeddings)
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor(300), torch.tensor([0, 2])
    moved = Pipeline.from_pretrained(stable_diffusion_folder, lora=(one,), fused=True, **options)
    also = Pipeline.from_pretrained(stable_diffusion_folder, lora=(one,), **options)
    assert not torch.allclose(also.denoiser(x, t, labels), plain.denoiser(x, t, labels), atol=1e-3)
    torch.testing.assert_close(
        moved.denoiser(x, t, labels), also.denoiser(x, t, labels), rtol=1e-3, atol=1e-4
    )


@pytest.mark.skipif(not installed("peft"), reason="peft is not installed")
@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_it_is_what_diffusers_fuses_by_peft(form, file, stable_diffusion_folder):
    import diffusers

    given = file(PEFT if form == "peft" else kohya(0.5))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(stable_diffusion_folder)
    pipe.load_lora_weights(given)
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    ours = models(stable_diffusion_folder, f"{given}:0.7")
    for name, value in pipe.unet.state_dict().items():
        torch.testing.assert_close(ours[f"unet.{name}"], value)
    for name, value in pipe.text_encoder.state_dict().items():
        name = f"text_encoder.text_model.{name.removeprefix('text_model.')}"
        torch.testing.assert_close(ours[name], value)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"unet.conv_in.hada_w1_a": A}, r"holds 'unet\.conv_in\.hada_w1_a'; expected the factors"),
        (
            {**PEFT, f"{ATTENTION}.to_q.lora_magnitude_vector.weight": A[0].clone()},
            "expected the factors",
        ),
        (
            {**PEFT, f"{CONVOLUTION}.lora_B.bias": A[0].clone()},
            r"lora_B\.bias; expected the factors",
        ),
        ({f"{ATTENTION}.to_q.lora_A.weight": A}, "has one factor alone of unet"),
        (
            {"unet.middle.to_q.lora_A.weight": A, "unet.middle.to_q.lora_B.weight": B},
            r"changes unet\.middle\.to_q, which this 'unet' does not have; it is for another arch",
        ),
        (
            {**PEFT, f"{ATTENTION}.to_q.lora_A.weight": A[:, :8]},
            r"changes unet\..*to_q, of shape \(16, 16\), by \(16, 8\); it is for another arch",
        ),
        (
            {"transformer.x.lora_A.weight": A, "transformer.x.lora_B.weight": B},
            "changes 'transformer', which pipeline = '.*' does not have",
        ),
        (
            {"controlnet.x.lora_A.weight": A, "controlnet.x.lora_B.weight": B},
            "changes 'controlnet', which is no part of a pipeline",
        ),
        ({}, "holds 'nothing'"),
    ],
)
def test_a_file_that_is_no_lora_of_this_pipeline_is_refused(
    table, words, file, stable_diffusion_folder
):
    given = file(table)
    with pytest.raises(
        InputError, match=rf"^lora = '.*lora\.safetensors': {words}|lora = .*{words}"
    ):
        Pipeline.from_pretrained(stable_diffusion_folder, lora=(given,), class_names=NAMES)


def test_families_without_lora_and_files_that_are_none_are_refused(
    file, pipeline_folder, pixel_folder, stable_diffusion_folder, tmp_path
):
    given = file(PEFT)
    for folder, kind in ((pipeline_folder, "DiTPipeline"), (pixel_folder, "DDIMPipeline")):
        with pytest.raises(InputError, match=f"lora = .*: a {kind} takes no LoRA; leave it out"):
            Pipeline.from_pretrained(folder, lora=(given,))
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(given, two / name)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no header")
    for text, words in (
        (str(two), r"it has a\.safetensors, b\.safetensors; say which, as .*two/FILE"),
        (str(tmp_path / "none"), "no such folder|no such file"),
        (f"{given}:much", "'much' is no weight"),
        (f"{given}:nan", "'nan' is no weight"),
        (f"{given}:1e39", "'1e39' is no weight; expected a finite number of float32"),
        ("someone/style", "no model of that name in the Hub's cache"),
    ):
        with pytest.raises(InputError, match=words):
            LoraFile.of(text)
    with pytest.raises(InputError, match=r"bad\.safetensors is no file of safetensors"):
        Pipeline.from_pretrained(stable_diffusion_folder, lora=(str(bad),), class_names=NAMES)


def test_a_lora_is_found_in_the_cache_of_the_hub(tmp_path, monkeypatch, file):
    import huggingface_hub.constants

    from tests.hub_cache import cached

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "style"
    folder.mkdir()
    shutil.copy(file(PEFT), folder / "one.safetensors")
    cached(tmp_path / "hub", "someone/style", folder)
    found = LoraFile.of("someone/style:0.5")
    assert (found.file.name, found.weight) == ("one.safetensors", 0.5)
    shutil.copy(file(PEFT), folder / "two.safetensors")
    cached(tmp_path / "hub", "someone/style", folder)
    assert LoraFile.of("someone/style/two.safetensors:2").file.name == "two.safetensors"
    with pytest.raises(InputError, match="say which, as someone/style/FILE"):
        LoraFile.of("someone/style")
    assert model_id("someone/style/two.safetensors:2") == "someone/style"
    assert model_id("someone/style:0.5") == "someone/style"
    assert model_id(str(folder)) == model_id("./x/y") == ""
