"""What a generator is asked for: several prompts a class, negative prompts, sizes of images."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from dpfast import imagenet
from dpfast.errors import InputError
from dpfast.generate.bounded import BoundedPath
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.models.denoiser import PromptRows
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.pipelines.prompts import Prompts
from dpfast.generate.sampler import GuidedSampler
from tests import tiny_pipelines
from tests.tiny_pipelines import NAMES

PROMPTS = {
    "cat": ["a photo of a cat", "red cat"],
    "dog": "a dog",
    "*": ["photo of a {}", "{}", "a"],
}


@pytest.fixture
def file(tmp_path):
    def write(table):
        (tmp_path / "prompts.json").write_text(json.dumps(table, ensure_ascii=False), "utf-8")
        return str(tmp_path / "prompts.json")

    return write


def test_a_file_has_one_prompt_or_several_for_each_class(file):
    prompts = Prompts(file=file(PROMPTS), negative="blurry")
    assert prompts.of(NAMES) == (
        ("a photo of a cat", "red cat"),
        ("a dog",),
        ("photo of a red bicycle", "red bicycle", "a"),
    )
    assert prompts.texts(NAMES)[-2:] == ["a", "blurry"]
    assert prompts.rows(NAMES, torch.device("cpu")).counts.tolist() == [2, 1, 3]
    assert Prompts(file=file({"*": "a {}"})).rows(NAMES, torch.device("cpu")) is None
    assert Prompts().texts(("cat",)) == ["a photo of a cat", ""]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"cat": "a"}, r"has no prompts of 'dog' and 1 more classes; '\*' stands for all others"),
        ({**PROMPTS, "ship": "a"}, "'ship' is none of the class names 'cat', 'dog', 'red bicycle'"),
        ({**PROMPTS, "dog": []}, r"'dog' has \[\]; expected a prompt or a list"),
        ({**PROMPTS, "dog": ["a", " "]}, "'dog' has .*none of them empty"),
        ({**PROMPTS, "*": ["a", 3]}, r"'\*' has .*; expected a prompt"),
        ({**PROMPTS, "cat ": "a"}, "'cat ' is the class 'cat', which it has twice"),
        (["cat"], "expected a table of class names and prompts"),
    ],
)
def test_a_file_that_leaves_a_class_open_is_refused_in_one_line(table, words, file):
    with pytest.raises(InputError, match=rf"prompts = '.*prompts\.json': {words}"):
        Prompts(file=file(table)).of(NAMES)


def test_a_file_that_is_not_there_or_no_json_is_named(tmp_path):
    with pytest.raises(InputError, match=r"prompts = '.*none\.json': no such file"):
        Prompts(file=str(tmp_path / "none.json")).of(NAMES)
    (tmp_path / "bad.json").write_text('{"cat": "a", "cat": "b"}')
    with pytest.raises(InputError, match=r"bad\.json: 'cat' stands in it twice|cannot be read"):
        Prompts(file=str(tmp_path / "bad.json")).of(NAMES)


def test_wordnet_ids_are_no_prompts(file):
    """Those of ImageNet are asked for by their names; they may call the classes of a file."""
    known = imagenet.load()
    ids = (known.ids[0], known.ids[1])
    assert Prompts().of(ids) == (
        (f"a photo of a {known.names[0]}",),
        (f"a photo of a {known.names[1]}",),
    )
    with pytest.raises(InputError, match="class_names: 'n99999999' is a WordNet id and no prompt"):
        Prompts().of(("n99999999",))
    by_id = {known.ids[0]: "a fish", known.ids[1]: ["a {} bird"]}
    names = (known.names[0], known.names[1])
    assert Prompts(file=file(by_id)).of(names) == (("a fish",), (f"a {names[1]} bird",))
    both = tuple(known.names[i] for i, name in enumerate(known.names) if name == "crane")
    assert len(both) == 2
    with pytest.raises(InputError, match="'crane' is the name of classes 0 and 1; say their WordN"):
        Prompts(file=file({"crane": "a", "*": "b"})).of(both)


def test_rows_spread_over_a_class_and_belong_to_the_id_alone():
    rows = PromptRows([4, 1, 144], torch.device("cpu"))
    ids = torch.arange(0, 40_000, 10)  # as those of one class among ten
    found = rows.of(torch.zeros_like(ids), ids)
    counts = found.bincount(minlength=4)
    assert len(counts) == 4
    assert (counts - 1000).abs().max() < 4 * (4000 * 0.25 * 0.75) ** 0.5
    assert set(rows.of(torch.ones_like(ids), ids).tolist()) == {4}
    far = torch.tensor([2**40 + 1, 2**62, 5, 2**63 - 1])
    picked = rows.of(torch.full_like(far, 2), far)
    assert ((picked >= 5) & (picked < 149)).all()
    for one, id in zip(picked, far, strict=True):
        assert rows.of(torch.tensor([2]), id[None]) == one
    # MurmurHash3's finaliser, by Python's own whole numbers
    h = 12345
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    h ^= h >> 16
    assert rows.of(torch.tensor([2]), torch.tensor([12345])).item() == 5 + (h * 144 >> 32)


@pytest.fixture
def asked(stable_diffusion_folder, file):
    return Pipeline.from_pretrained(
        stable_diffusion_folder, class_names=NAMES, prompts=file(PROMPTS), negative_prompt="dog"
    )


def test_a_sample_is_what_diffusers_makes_of_its_prompt(asked, stable_diffusion_folder, file):
    """And of the negative one; in any batch."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(stable_diffusion_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False
    )
    sampler = GuidedSampler(asked, steps=4, cfg_scale=3.0, compile=False)
    labels, ids = [0, 1, 2, 0, 2, 0], [0, 3, 5, 9, 10, 2**33 + 1]
    made = sampler.generate(labels, ids)
    texts = Prompts(file=file(PROMPTS)).texts(NAMES)
    rows = asked.denoiser.rows.of(torch.tensor(labels), torch.tensor(ids)).tolist()
    assert len({rows[0], rows[3], rows[5]}) == 2  # both prompts of the cat
    begun = sampler.begin(labels, ids).x
    expected = pipe(
        [texts[row] for row in rows],
        negative_prompt=["dog"] * 6,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=begun,
        output_type="latent",
    ).images
    torch.testing.assert_close(made.latents.float(), expected, rtol=0, atol=0.02)  # float16
    advanced = sampler.advance(sampler.begin(labels, ids)).x
    torch.testing.assert_close(advanced, expected, rtol=0, atol=1e-4)
    alone = sampler.advance(sampler.begin([0], [2**33 + 1])).x
    torch.testing.assert_close(alone[0], advanced[5], rtol=0, atol=1e-4)


@pytest.mark.parametrize("through", ["denoiser", "latent"])
def test_guidance_goes_through_the_prompt_of_the_sample(through, asked, learner):
    """The gradient of a class's second prompt is that of a generator with this prompt alone; the
    criterion sees the label.
    """
    guidance = GuidanceConfig(omega=0.1, every=1, through=through, criterion="loss")
    options = {"steps": 3, "cfg_scale": 2.0, "compile": False, "guidance": guidance}
    labels, ids = [0, 2, 2], [9, 5, 9]
    rows = asked.denoiser.rows.of(torch.tensor(labels), torch.tensor(ids)).tolist()
    made = GuidedSampler(asked, learner, **options).generate(labels, ids).images
    import copy

    plain = copy.copy(asked.denoiser)
    plain.rows = None
    plain.embeddings = asked.denoiser.embeddings[[*[0] * 3, -1]].clone()
    plain.null_label = 3
    for at, label in enumerate(labels):
        plain.embeddings[label] = asked.denoiser.embeddings[rows[at]]
        one = GuidedSampler(replace(asked, denoiser=plain), learner, **options)
        expected = one.generate([label], [ids[at]]).images[0]
        assert (expected.int() - made[at].int()).abs().max() <= 1


def test_chunks_of_guidance_take_the_prompts_along(asked, learner):
    sampler = GuidedSampler(asked, learner, steps=2, compile=False)
    labels = torch.tensor([0, 2, 2, 1, 0])
    x = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = asked.denoiser.rows.of(labels, torch.arange(5))
    levels = (torch.tensor(300), labels, torch.tensor(0.8), torch.tensor(0.6))
    path = sampler.parts.path
    whole = path.gradient(x, *levels, conditions=rows)
    for taped in (False, True):
        bounded = BoundedPath.of(path, chunk=2, taped=taped)
        for one, other in zip(bounded.gradient(x, *levels, conditions=rows), whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    other = path.gradient(x, *levels)[1]
    assert not torch.equal(other, whole[1])


def test_prompts_of_a_pipeline_without_text_are_refused(pipeline_folder, pixel_folder, file):
    for folder in (pipeline_folder, pixel_folder):
        with pytest.raises(InputError, match="takes no prompts; leave prompts out"):
            Pipeline.from_pretrained(folder, prompts=file(PROMPTS))
        with pytest.raises(InputError, match="takes no prompts; leave negative_prompt out"):
            Pipeline.from_pretrained(folder, negative_prompt="blurry")


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("family", ["stable_diffusion_folder", "stable_diffusion_3_folder"])
def test_images_of_another_size_are_those_of_diffusers(family, cfg_scale, request):
    folder = request.getfixturevalue(family)
    height, width = (24, 8) if family == "stable_diffusion_folder" else (16, 8)
    pipeline = Pipeline.from_pretrained(folder, class_names=NAMES, height=height, width=width)
    assert pipeline.denoiser.sample_shape == (4, height // 2, width // 2)
    sampler = GuidedSampler(pipeline, steps=4, cfg_scale=cfg_scale, compile=False)
    labels = [0, 2]
    noise = randn_tensor((2, 4, height // 2, width // 2), torch.Generator().manual_seed(3))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if family == "stable_diffusion_folder":
        pipe.scheduler = diffusers.DDIMScheduler.from_config(
            pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False
        )
    begun = sampler.begin(labels)
    begun = replace(begun, x=noise * sampler.table.initial_scale)
    expected = pipe(
        [f"a photo of a {NAMES[label]}" for label in labels],
        num_inference_steps=4,
        guidance_scale=cfg_scale,
        latents=noise,
        height=height,
        width=width,
        output_type="latent",
    ).images
    made = sampler.advance(begun)
    torch.testing.assert_close(made.x, expected, rtol=0, atol=1e-4)
    assert sampler.finish(made).images.shape == (2, 1, height, width)


def test_a_side_that_the_latents_do_not_divide_is_refused(
    stable_diffusion_folder, stable_diffusion_3_folder, pipeline_folder, pixel_folder
):
    for folder, options, words in (
        (stable_diffusion_folder, {"height": 7}, "height = 7: expected a multiple of 2, the pixel"),
        (stable_diffusion_3_folder, {"width": 6}, "width = 6: expected a multiple of 4, .*a patch"),
        (stable_diffusion_3_folder, {"height": 64}, "height = 64: expected at most 32"),
        (stable_diffusion_folder, {"height": -2}, "height = -2: expected pixels"),
        (pipeline_folder, {"width": 16}, "width = 16: a DiTPipeline makes images of its own size"),
        (pixel_folder, {"height": 16}, "height = 16: a DDIMPipeline makes images of its own size"),
    ):
        with pytest.raises(InputError, match=words):
            Pipeline.from_pretrained(folder, class_names=NAMES, **options)
    one = Pipeline.from_pretrained(stable_diffusion_folder, class_names=NAMES, width=32)
    assert one.denoiser.sample_shape == (4, 8, 16)


def test_a_negative_prompt_of_a_model_that_embeds_its_scale_is_refused(tmp_path):
    folder = tiny_pipelines.stable_diffusion_xl(
        tmp_path, diffusers.LCMScheduler(), time_cond_proj_dim=8
    )
    Pipeline.from_pretrained(folder, class_names=NAMES)
    with pytest.raises(InputError, match="negative_prompt: its model embeds the scale of guidance"):
        Pipeline.from_pretrained(folder, class_names=NAMES, negative_prompt="blurry")
