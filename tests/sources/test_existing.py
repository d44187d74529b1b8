"""The sources of samples that exist: real images, mixtures, other pools, and what is reused."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from dpfast.config import Recipe
from dpfast.data.folders import fit_file
from dpfast.errors import InputError, RecipeError
from dpfast.feed.order import Order
from dpfast.generate.sampler import GuidedSampler
from dpfast.parallel import Ranks
from dpfast.planning.plan import plan
from dpfast.pool.codecs import to_jpeg
from dpfast.pool.importing import import_pool
from dpfast.pool.reader import open_pool
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.stopping import Stop, Stopped
from dpfast.sources.existing import chosen
from dpfast.sources.labels import LabelOrder
from dpfast.sources.real_images import RealImages
from tests.practice.small import CLASSES, REAL, noise

SHAPE = (1, 16, 16)


@pytest.fixture
def recipe(recipe):
    """The recipe of seconds in a few steps."""
    return changed(recipe, iterations=12, evaluate_every=5)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """20 images of each of three classes, those of the first as JPEG, one of 30 x 20 pixels."""
    folder = tmp_path_factory.mktemp("train")
    for number, (image, label) in enumerate(zip(*noise(60, seed=1), strict=True)):
        place = folder / CLASSES[label]
        place.mkdir(exist_ok=True)
        if label == 0:
            (place / f"{number:03d}.jpg").write_bytes(to_jpeg(image))
        else:
            Image.fromarray(image[0].numpy()).save(place / f"{number:03d}.png")
    Image.new("RGB", (30, 20), (200, 10, 10)).save(folder / "dog" / "001.png")
    return folder


def changed(recipe, **fields):
    """The recipe with other fields: of [practice], or of the section that is named."""
    sections = {
        name: replace(getattr(recipe, name), **fields.pop(name))
        for name in ("generator", "learner", "pool")
        if name in fields
    }
    return replace(recipe, practice=replace(recipe.practice, **fields), **sections)


def run(recipe, folder=None, **options):
    return DeliberatePractice(recipe, real=REAL).run(folder, progress=False, **options)


def images_of(folder, **options):
    return partial(RealImages, str(folder), CLASSES, SHAPE, order=LabelOrder(3), **options)


def test_a_smaller_choice_of_real_images_is_the_beginning_of_a_larger_one(train):
    make = images_of(train, seed=0)
    whole, part = make(most=1000), make(most=10)
    assert (len(whole), whole.total, len(part)) == (60, 60, 10)
    both = whole.batch(range(10)), part.batch(range(10))
    assert torch.equal(both[0].images, both[1].images)
    assert both[0].labels.bincount().tolist() == [4, 3, 3]
    other = images_of(train, seed=1)(most=10).batch(range(10))
    assert not torch.equal(other.images, both[1].images)
    assert (both[0].origins["steps"] == 0).all()
    assert (both[0].origins["cfg_scale"] == 1).all()


def test_class_counts_say_how_many_of_each_class_are_taken():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    order = LabelOrder(3, torch.tensor([3, 2, 1]))
    rows = chosen(labels, order, 6, "real")
    assert labels[rows].tolist() == order.between(0, 6).tolist()
    assert sorted(rows.tolist()) == [0, 1, 2, 3, 4, 6]
    with pytest.raises(InputError, match="real: 3 samples of class 0; expected 4"):
        chosen(labels, LabelOrder(3, torch.tensor([4, 2, 1])), 7, "real")


def test_a_file_stays_where_it_has_the_shape_of_the_run():
    image = noise(1)[0][0]
    data = to_jpeg(image)
    shown, kept = fit_file(data, "a", SHAPE)
    assert kept == data
    assert shown.shape == SHAPE
    assert fit_file(data, "a", (1, 8, 8))[1] is None
    assert fit_file(data, "a", (3, 16, 16))[1] is None
    with pytest.raises(InputError, match="torn: cannot be read as an image"):
        fit_file(data[:50], "torn", SHAPE)


def test_an_image_is_cropped_to_its_proportions_and_no_further(train):
    picture = np.zeros((16, 32), np.uint8)
    picture[:, 8:24] = 255
    wide = train.parent / "wide.png"
    Image.fromarray(picture).save(wide)
    assert (fit_file(wide.read_bytes(), "wide", SHAPE)[0] == 255).all()


def test_real_images_alone_need_no_weights_of_the_generator(recipe, train, monkeypatch):
    monkeypatch.setattr(GuidedSampler, "stream", lambda *_, **__: pytest.fail("made samples"))
    recipe = changed(recipe, sources=("real",), real=str(train), maximum_samples=45)
    for path in recipe.generator.pipeline, "fashion":
        names = CLASSES if path == "fashion" else ()
        known = changed(recipe, generator={"pipeline": path, "class_names": names})
        known = changed(known, generator={"image_size": 16}, pool={"codec": "jpeg"})
        practice = DeliberatePractice(known, real=REAL)
        assert type(practice.pipeline).__name__ == "NoGenerator"
        (result,) = practice.run(progress=False)
        assert (len(result.pool), result.cost.samples, result.generation_seconds) == (45, 0, 0)
        assert result.pool.column("label").bincount().tolist() == [15, 15, 15]


def test_a_mixture_begins_with_real_images_and_makes_the_rest(recipe, train):
    recipe = changed(recipe, sources=("mix",), real=str(train), maximum_samples=45)
    recipe = changed(recipe, sources=("mix", "dynamic"), mix_with="dynamic", real_in_batch=(0.75,))
    dynamic, mix = run(changed(recipe, add_at=(4,)))
    steps = mix.pool.column("steps")
    assert (steps[:15] == 0).all()
    assert (steps[15:] == 3).all()
    assert mix.pool.column("sample_id").tolist() == list(range(45))
    rows = torch.arange(15, 45)
    assert torch.equal(mix.pool.images(rows), dynamic.pool.images(rows))
    assert mix.cost.samples == 30
    both = changed(recipe, mix_with="dp", real_share=1.0, real_in_batch=(), sources=("mix",))
    (guided,) = run(changed(both, add_at=(4,)))
    assert guided.pool.column("omega").gt(0).tolist() == [False] * 30 + [True] * 15


def test_a_share_of_every_batch_is_drawn_from_each_group():
    order = Order(0, 8)
    for size in (20, 40):  # the first ten are one group
        drawn = order.next(size, size - 10, batches=size, share=0.25)
        assert (drawn.view(-1, 8) < 10).sum(1).tolist() == [6] * size
        assert len(drawn[drawn < 10].unique()) == 10
        assert len(drawn[drawn >= 10].unique()) == size - 10


def test_a_larger_run_makes_what_a_smaller_one_has_not_saved(recipe, tmp_path, monkeypatch):
    static = changed(recipe, sources=("static",), maximum_samples=40)
    run(static, tmp_path / "small")
    made = []
    stream = GuidedSampler.stream

    def counted(self, labels, **options):
        made.extend(options["sample_ids"].tolist())
        return stream(self, labels, **options)

    monkeypatch.setattr(GuidedSampler, "stream", counted)
    larger = changed(static, maximum_samples=70, learner={"seed": 5})
    (whole,) = run(larger)
    assert sorted(made) == list(range(70))
    made.clear()
    again = changed(larger, reuse=str(tmp_path / "small"))
    (reused,) = run(again)
    assert made == list(range(40, 70))
    rows = torch.arange(70)
    assert torch.equal(whole.pool.images(rows), reused.pool.images(rows))
    for name in ("sample_id", "label", "steps", "omega", "cfg_scale", "seed", "round"):
        assert torch.equal(whole.pool.column(name), reused.pool.column(name)), name
    assert whole.test.top1 == reused.test.top1
    assert whole.cost.forwards == reused.cost.forwards

    for fields, named in (
        ({"generator": {"steps": 4}}, "steps = 3 there, 4 here"),
        ({"generator": {"eta": 0.5}}, "eta = 0.0 there, 0.5 here"),
    ):
        with pytest.raises(RecipeError, match=named):
            run(changed(again, **fields))
    with pytest.raises(RecipeError, match="seed = 0 there, 1 here"):
        run(replace(again, seed=1))
    with pytest.raises(InputError, match="not the folder of a run"):
        run(changed(again, reuse=str(tmp_path)))
    shard = next((tmp_path / "small" / "pool_static").glob("shard-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1])
    made.clear()
    with pytest.warns(UserWarning, match="its samples are made again"):
        run(again)
    assert made == list(range(70))
    text = (
        (tmp_path / "small" / "recipe.json")
        .read_text()
        .replace(recipe.generator.pipeline, "elsewhere")
    )
    (tmp_path / "small" / "recipe.json").write_text(text)  # the folder has moved: known by contents
    DeliberatePractice(again, real=REAL)
    (tmp_path / "small" / "contents.json").write_text(json.dumps({"pipeline": {"a.json": "0"}}))
    with pytest.raises(RecipeError, match="there holds other things"):
        DeliberatePractice(again, real=REAL)


def test_a_pool_is_trained_on_again_in_parts(recipe, tmp_path):
    grown = changed(recipe, sources=("dp",), maximum_samples=60, add_at=(4, 8))
    run(grown, tmp_path / "dp")
    saved = open_pool(tmp_path / "dp" / "pool_dp")
    again = changed(grown, sources=("pool",), pool_from=str(tmp_path / "dp"), add_at=())
    again = changed(again, generator={"pipeline": "no such folder"})  # the pool says all
    (whole,) = run(again, tmp_path / "whole")
    for name in ("sample_id", "label", "omega", "learner_step", "seed"):
        assert torch.equal(whole.pool.column(name), saved.column(name)), name
    assert torch.equal(whole.pool.images(torch.arange(60)), saved.images(torch.arange(60)))
    assert whole.generation_seconds == 0
    (first,) = run(changed(again, pool_rounds=(0, 2)))
    assert first.pool.column("sample_id").tolist() == [*range(30), *range(45, 60)]
    small = changed(again, maximum_samples=33, pool={"codec": "jpeg"})
    (few,) = run(small)
    assert few.pool.column("label").bincount().tolist() == [11, 11, 11]
    assert len(import_pool(tmp_path / "whole")[0]) == 60
    with pytest.raises(InputError, match=r"pool_rounds = 7: .* has the rounds 0, 1, 2"):
        run(changed(again, pool_rounds=(7,)))
    with pytest.raises(InputError, match="class 'cat' is none of the run's"):
        DeliberatePractice(
            changed(again, generator={"class_names": ("a", "b", "c")}), real=noise(60)
        )
    with pytest.raises(InputError, match=r"pool_from: .*no such folder"):
        run(changed(again, pool_from=str(tmp_path / "nowhere")))


def test_an_existing_source_goes_on_after_a_stop(recipe, train, tmp_path):
    """It is stopped among its samples, and on two ranks each reads its part."""
    recipe = changed(recipe, sources=("real",), real=str(train), maximum_samples=60)
    (whole,) = run(recipe, tmp_path / "whole")
    read = RealImages.batch
    with pytest.MonkeyPatch.context() as patch:
        stop = Stop()

        def stopped(self, places):
            stop.requested = places.start >= 20
            return read(self, places)

        patch.setattr(RealImages, "batch", stopped)
        with pytest.raises(Stopped):
            run(recipe, tmp_path / "cut", stop=stop)
    (result,) = run(recipe, tmp_path / "cut", resume=True)
    rows = torch.arange(60)
    assert torch.equal(result.pool.images(rows), whole.pool.images(rows))
    assert result.test.top1 == whole.test.top1
    parts = [
        torch.cat([torch.arange(p.start, p.stop) for p in Ranks(rank, 2).batches(60, 20)])
        for rank in range(2)
    ]
    assert sorted(torch.cat(parts).tolist()) == list(range(60))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sources": ("real",)}, "real = '': expected a folder, which the source 'real' trains on"),
        ({"sources": ("mix", "real")}, "the source 'real' and the source 'mix' trains on"),
        ({"sources": ("pool",)}, "pool_from = '': expected a folder"),
        ({"pool_rounds": (1, 1)}, "pool_rounds = '1,1': expected rounds, each once"),
        (
            {"sources": ("mix",), "real": "x", "real_in_batch": (0.5,), "fresh_weight": 2.0},
            "fresh_weight = 2.0: expected 1 with real_in_batch",
        ),
        (
            {"sources": ("mix",), "real": "x", "real_share": 1.0, "mix_with": "static"},
            "real_share = 1.0: expected below 1",
        ),
        ({"real_in_batch": (1.0,)}, "real_in_batch"),
    ],
)
def test_fields_that_contradict_each_other_are_one_line(recipe, fields, named):
    with pytest.raises(RecipeError) as error:
        changed(recipe, **fields)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_training_set_is_one_line(recipe, train, tmp_path):
    (tmp_path / "cat").mkdir()
    for folder, named in (
        (tmp_path / "nowhere", "no such folder; expected a folder with a sub-folder of images"),
        (train / "cat", "it has no sub-folders"),
        (tmp_path, "no images of 'cat' and 2 more classes"),
    ):
        with pytest.raises(InputError, match=named) as error:
            run(changed(recipe, sources=("real",), real=str(folder)))
        assert str(error.value).startswith("real = ")
    few = changed(recipe, sources=("mix",), real=str(train), real_share=1.0, initial_samples=63)
    with pytest.raises(RecipeError, match=r"real_share = 1: 63 real images; .* holds 60"):
        run(few)
    with pytest.raises(RecipeError, match=r"codec = 'latents': .* the source 'mix' has images"):
        changed(few, pool={"codec": "latents"})


def test_a_plan_counts_no_generation_of_what_exists(train):
    recipe = Recipe.load("fashion", sources=("real",), real=str(train))
    made = plan(recipe, "h100")
    assert made.samples == 60
    assert {phase.name for phase in made.phases if phase.units} == {"training", "evaluation"}
    assert "unguided samples" not in {phase.phase for phase in made.fit.phases}
    mixed = Recipe.load("fashion", sources=("mix",), real=str(train), real_share=0.05)
    units = {phase.name: phase.units for phase in plan(mixed, "h100").phases}
    assert (units["unguided samples"], units["guided samples"]) == (950, 3000)
