"""The sources of samples that exist: real images, mixtures, other pools, and what is reused."""

import json
from dataclasses import replace
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from dpfast.config import SourceName
from dpfast.data.folders import fit_file
from dpfast.data.real import check_apart
from dpfast.errors import InputError, RecipeError
from dpfast.feed import check_groups
from dpfast.feed.order import Order
from dpfast.feed.torch_loader import TorchLoader
from dpfast.generate.sampler import GuidedSampler
from dpfast.parallel import Ranks
from dpfast.planning.plan import plan
from dpfast.pool.codecs import to_jpeg
from dpfast.pool.importing import import_pool
from dpfast.pool.reader import open_pool
from dpfast.pool.record import RECORD
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.run_paths import check_vacant
from dpfast.practice.stopping import Stop, Stopped
from dpfast.sources.existing import ExistingSource, chosen
from dpfast.sources.labels import LabelOrder
from dpfast.sources.real_images import RealImages
from dpfast.sources.reuse import SOURCES, ReusedSamples, _made_so
from dpfast.sources.source import RoundRequest
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
        assert practice.existing["real"].batch(range(45)).labels.bincount().tolist() == [15] * 3
    (result,) = practice.run(progress=False)
    assert (len(result.pool), result.cost.samples, result.generation_seconds) == (45, 0, 0)
    assert result.pool.column("label").bincount().tolist() == [15, 15, 15]


def test_a_mixture_begins_with_real_images_and_makes_the_rest(recipe, train, caplog):
    recipe = changed(recipe, sources=("mix",), real=str(train), maximum_samples=45)
    recipe = changed(recipe, sources=("mix", "dynamic"), mix_with="dynamic", real_in_batch=(0.75,))
    with caplog.at_level("INFO", "dpfast"):
        dynamic, mix = run(changed(recipe, add_at=(4,)))
    assert "15 samples exist already" in caplog.text  # beside the real ones
    steps = mix.pool.column("steps")
    assert (steps[:15] == 0).all()
    assert (steps[15:] == 3).all()
    assert mix.pool.column("sample_id").tolist() == list(range(45))
    rows = torch.arange(15, 45)
    assert torch.equal(mix.pool.images(rows), dynamic.pool.images(rows))
    assert mix.cost.samples == 30


@pytest.mark.long
def test_a_learner_of_real_images_alone_guides_what_is_added(recipe, train):
    both = changed(recipe, sources=("mix",), real=str(train), real_share=1.0, maximum_samples=45)
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
            DeliberatePractice(changed(again, **fields), real=REAL)
    with pytest.raises(RecipeError, match="seed = 0 there, 1 here"):
        DeliberatePractice(replace(again, seed=1), real=REAL)
    with pytest.raises(InputError, match="not the folder of a run"):
        DeliberatePractice(changed(again, reuse=str(tmp_path)), real=REAL)
    shard = next((tmp_path / "small" / "pool_static").glob("shard-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1])
    known = ReusedSamples(str(tmp_path / "small"), again, LabelOrder(3), contents={})
    with pytest.warns(UserWarning, match="its samples are made again"):
        assert known.images(torch.arange(20), again.generator.cfg_scale) is None
    assert len(known) == 0
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

    def batch(**fields):
        found = DeliberatePractice(changed(again, **fields), real=REAL).existing["pool"]
        return found.batch(range(len(found)))

    rounds = batch(pool_rounds=(0, 2))
    assert rounds.sample_ids.tolist() == [*range(30), *range(45, 60)]
    few = batch(maximum_samples=33, pool={"codec": "jpeg"})
    assert few.labels.bincount().tolist() == [11, 11, 11]
    assert [file[:2] for file in few.files] == [b"\xff\xd8"] * 33
    assert len(import_pool(tmp_path / "whole")[0]) == 60
    with pytest.raises(InputError, match=r"pool_rounds = 7: .* has the rounds 0, 1, 2"):
        batch(pool_rounds=(7,))
    with pytest.raises(InputError, match="class 'cat' is none of the run's"):
        DeliberatePractice(
            changed(again, generator={"class_names": ("a", "b", "c")}), real=noise(60)
        )
    with pytest.raises(InputError, match=r"pool_from: .*no such folder"):
        batch(pool_from=str(tmp_path / "nowhere"))
    # whoever made what the source "pool" has, the generator of its own recipe did not
    with pytest.raises(InputError, match="saved no samples of the sources static, prune"):
        DeliberatePractice(changed(grown, reuse=str(tmp_path / "whole")), real=REAL)


def test_a_guided_round_is_not_reused_where_a_class_has_no_guidance(recipe):
    records = np.zeros(6, RECORD)
    records["steps"], records["sample_id"] = 3, np.arange(6)
    records["round"], records["omega"] = [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0.2, 0.2]
    made = {every: _made_so(records, recipe, every=every).tolist() for every in (False, True)}
    assert made[False] == [True] * 3 + [False] * 3
    assert made[True] == [True] * 4 + [False] * 2
    records["seed"][0], records["steps"][1] = 1, 4
    assert _made_so(records, recipe, every=True).tolist() == [
        False,
        False,
        True,
        True,
        *[False] * 2,
    ]
    assert {name: SOURCES.get(name) for name in get_args(SourceName)} == {
        **{"static": True, "prune": True, "dynamic": True, "dp": False, "mix": False},
        **{"real": None, "pool": None},
    }


def test_kept_candidates_are_the_samples_of_their_ids(recipe, tmp_path):
    """Made in the same batches, of which each run keeps its own part."""
    recipe = changed(recipe, initial_samples=40, round_samples=20, maximum_samples=60, oversample=2)
    recipe = changed(recipe, iterations=10, add_at=(5,))
    run(changed(recipe, sources=("prune",)), tmp_path / "prune")
    (static,) = run(changed(recipe, sources=("static",), maximum_samples=80, add_at=()))
    reused = ReusedSamples(str(tmp_path / "prune"), recipe, LabelOrder(3), contents={})
    ids = open_pool(tmp_path / "prune" / "pool_prune").column("sample_id").sort().values
    assert (len(ids), int(ids.max()) > 60) == (60, True)
    assert torch.equal(reused.images(ids, recipe.generator.cfg_scale), static.pool.images(ids))
    gone = sorted({*range(80)} - {*ids.tolist()})[:1]
    assert reused.images(torch.tensor(gone), recipe.generator.cfg_scale) is None


def test_images_that_judge_a_run_do_not_train_it(train, tmp_path):
    link, held = tmp_path / "link", tmp_path / "held"
    link.symlink_to(train)
    (held / "cat").mkdir(parents=True)
    (held / "dog").symlink_to(train / "dog")
    for validation, held_out, named in (
        (str(train), "", "validation"),
        (str(link), "", "validation"),
        ("fashion", str(train / ".." / train.name), "held_out"),
        (str(held / "cat"), str(held), "held_out"),
    ):
        with pytest.raises(InputError, match=f"real = .* is a folder of {named} = "):
            check_apart("real", str(train), validation, held_out)
    for other in (str(held / "cat"), "fashion", str(tmp_path / "nowhere")):
        check_apart("real", str(train), other, "")


@pytest.mark.parametrize("field", ["pool_from", "reuse"])
@pytest.mark.parametrize("place", [".", "pool_static"])
@pytest.mark.parametrize("how", ["overwrite", "resume"])
def test_a_run_takes_nothing_of_its_own_folder(recipe, tmp_path, field, place, how):
    recipe = changed(recipe, **{field: str(tmp_path / place)})
    with pytest.raises(InputError, match=f"{field} = .*: lies in the run's own folder, out = "):
        check_vacant(tmp_path, recipe, **{how: True})


def test_a_loader_of_ones_own_is_told_what_is_real():
    def plain(pool, batch_size, **options): ...
    def deaf(pool, batch_size): ...

    for loader in ("torch", plain, TorchLoader):
        check_groups(loader)
    with pytest.raises(InputError, match="takes no groups") as error:
        check_groups(deaf)
    assert str(error.value).startswith("real_in_batch: loader = ")
    with pytest.raises(InputError, match="takes no groups"):
        check_groups("operator:add")


def test_each_rank_reads_its_part_and_goes_on_in_it(train):
    samples = images_of(train, seed=0)(most=60)
    request = RoundRequest(number=0, start=0, count=60)

    def ids(rank, done=0):
        made = ExistingSource(samples, 60, Ranks(rank, 2), 20).make(request, done)
        return [number for batch in made for number in batch.sample_ids.tolist()]

    assert ids(0) == [*range(20), *range(40, 60)]
    assert ids(1) == list(range(20, 40))
    assert ids(0, done=20) == list(range(40, 60))


@pytest.mark.long
def test_an_existing_source_goes_on_after_a_stop(recipe, train, tmp_path):
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
        (
            {"sources": ("mix",), "real": "x", "real_share": 0.999, "mix_with": "static"},
            "real_share = 0.999: expected below 1",
        ),
        (
            {"sources": ("mix",), "real": "x", "real_share": 0.01},
            "real_share = 0.01: expected enough for one real image among 30 samples",
        ),
        ({"sources": ("mix",), "real": "x", "overlap": 1}, "overlap = 1: expected 0 with"),
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


def test_a_plan_counts_no_generation_of_what_exists(recipe, train):
    recipe = changed(recipe, sources=("real",), real=str(train))
    made = plan(recipe, "h100")
    assert made.samples == 60
    assert {phase.name for phase in made.phases if phase.units} == {"training", "evaluation"}
    assert "unguided samples" not in {phase.phase for phase in made.fit.phases}
    mixed = changed(recipe, sources=("mix",), real_share=0.1)
    units = {phase.name: phase.units for phase in plan(mixed, "h100").phases}
    assert (units["unguided samples"], units["guided samples"]) == (27, 40)


@pytest.mark.parametrize(("saved", "new"), [(0, 70), (39, 50), (69, 10), (70, 0)])
def test_a_plan_counts_whole_batches_of_what_is_reused(recipe, monkeypatch, saved, new):
    monkeypatch.setattr("dpfast.planning.plan.count_known", lambda _: saved)
    found = plan(changed(recipe, sources=("static",)), "h100").phases
    assert sum(phase.units for phase in found if phase.name == "unguided samples") == new
