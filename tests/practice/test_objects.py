"""A loop of the caller's own objects: what fits, what is refused in one line, and how a run of them
goes on.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dpfast.errors import InputError, RecipeError
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.protocol import check_pipeline
from dpfast.learn.models import load_learner
from dpfast.practice.callbacks import Callback
from dpfast.practice.experiment import DeliberatePractice
from dpfast.samples import SampleBatch
from dpfast.sources.source import Source
from tests.practice.small import CLASSES, REAL, noise
from tests.practice.test_loop import with_


def net(classes=3):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=4), nn.SiLU(), nn.Flatten(), nn.Linear(128, classes)
    )


@pytest.fixture
def short(recipe):
    return with_(recipe, "practice", sources=("dp", "static"), iterations=20, maximum_samples=45)


def weights(learner):
    return torch.cat([value.flatten() for value in learner.state_dict().values()])


def test_every_source_starts_from_the_learner_as_it_was_given(short):
    given, begun = net(), []
    before = weights(given).clone()
    practice = DeliberatePractice(short, learner=given, real=REAL)
    nn.init.zeros_(given[0].weight)  # too late: a copy was taken

    class Watch(Callback):
        def on_start(self, progress):
            begun.append(weights(practice.loop.trainer.model).clone())

    dp, static = practice.run(progress=False, callbacks=[Watch()])
    assert torch.equal(begun[0], before)
    assert torch.equal(begun[1], before)
    assert dp.learner is not static.learner
    assert not torch.equal(weights(dp.learner), before)


def test_a_function_builds_the_same_learner_for_each_source(short):
    practice = DeliberatePractice(short, learner=net, real=REAL)
    assert torch.equal(weights(practice.new_learner()), weights(practice.new_learner()))
    module = net()
    with pytest.raises(InputError, match="gives the same module again"):
        DeliberatePractice(short, learner=lambda: module, real=REAL).run(progress=False)


def test_objects_give_the_bits_of_the_recipe_s_own_parts(short, pipeline_folder):
    named = DeliberatePractice(short, real=REAL)
    pipeline = Pipeline.from_pretrained(pipeline_folder)
    given = DeliberatePractice(
        short, pipeline=pipeline, learner=named.new_learner(), real=noise(60), sources=["dp"]
    )
    (expected, _), (found,) = named.run(progress=False), given.run(progress=False)
    assert torch.equal(weights(found.learner), weights(expected.learner))
    assert found.test.top1 == expected.test.top1


class NoSamples(Source):
    name = "dp"

    def available(self, pool_size):
        return 0

    def make(self, request, done=0):
        return iter(())


class Bare(NoSamples):
    """A source that calls no ``Source.__init__``."""

    name = "bare"

    def __init__(self):
        pass


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learner": net(4)}, r"logits are \(2, 4\) for 2 images, expected \(2, 3\)"),
        ({"learner": nn.Linear(3, 3)}, r"fails on images of shape \(2, 1, 16, 16\): mat1"),
        ({"learner": "resnet"}, "learner is a str: expected an nn.Module"),
        ({"learner": dict}, "the function gives a dict"),
        ({"learner": nn.Linear}, "called without arguments: missing .* 'in_features'"),
        ({"learner": nn.Flatten()}, "expected a module with parameters that can be trained"),
        (
            {"real": (REAL.test.images, [0, 1])},
            r"labels are torch.int64 \(2,\), expected an integer",
        ),
        ({"real": (REAL.test.images.numpy(),) * 2}, r"labels are torch.uint8 \(30, 1, 16, 16\)"),
        ({"ranks": 3}, "ranks is a int: expected dpfast.parallel.Ranks"),
        ({"unguided": 3}, "unguided is a int: expected UnguidedSamples"),
        ({"callbacks": 3}, "callbacks is a int: expected a list of dpfast.Callback"),
        ({"callbacks": Callback()}, "callbacks is a Callback: expected a list"),
        ({"sources": 3}, "sources is a int: expected a list of names and Sources"),
        ({"sources": "dp"}, "sources is a str: expected a list"),
        ({"sources": [Bare()]}, r"source 'bare': has no cost .* super\(\).__init__"),
        ({"pipeline": object()}, r"pipeline: a object has no class_names; .* dpfast.OwnPipeline"),
        ({"criterion": "entropy"}, "criterion is a str: expected a function"),
        ({"criterion": lambda z, y: z}, r"values of shape \(2, 3\) for 2 samples, expected \(2,\)"),
        (
            {"criterion": lambda z, y: z[:, 7]},
            r"criterion fails on logits of shape \(2, 3\): index 7",
        ),
        ({"loader": "torch"}, "loader is a str: expected a function"),
        ({"callbacks": [Callback]}, "callbacks: Callback is a class, expected an object of it"),
        ({"callbacks": [print]}, "callbacks: a builtin_function_or_method is no dpfast.Callback"),
        ({"sources": []}, "sources: expected one or more"),
        ({"sources": ["mine"]}, "sources: 'mine': expected a Source, or one of dp, static"),
        ({"sources": [NoSamples(1)]}, "name = 'dp': expected letters and digits that no other"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(short, options, said):
    with pytest.raises(InputError, match=said) as caught:
        DeliberatePractice(short, **{"real": REAL, **options})
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, RecipeError)  # an object is wrong, the recipe is not


@pytest.mark.parametrize("given", ["fashion", None])
def test_what_is_no_recipe_is_refused_in_a_line(given):
    with pytest.raises(InputError, match=r"recipe is a .*: expected a Recipe, as Recipe\.load"):
        DeliberatePractice(given)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"callbacks": [3]}, "callbacks: a int is no dpfast.Callback"),
        ({"stop": 3}, "stop is a int: expected dpfast.practice.stopping.Stop"),
        ({"folder": 3}, "folder is a int: expected a path"),
    ],
)
def test_a_run_refuses_other_arguments_in_a_line(short, options, said):
    with pytest.raises(InputError, match=said):
        DeliberatePractice(short, real=REAL).run(progress=False, **options)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (None, "source 'gives': make gives a NoneType, expected an iterator of SampleBatch"),
        ([3], "source 'gives': make yields a int, expected a SampleBatch"),
    ],
)
def test_a_source_that_makes_no_batches_is_refused(short, made, said):
    class Gives(Few):
        def make(self, request, done=0):
            return made

    practice = DeliberatePractice(short, real=REAL, sources=[Gives(initial_samples=30)])
    with pytest.raises(InputError, match=said):
        practice.run(progress=False)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"device": "cpu"}, "device of a SimpleNamespace is 'cpu'; expected a torch.device"),
        ({"image_shape": (16, 16)}, r"image_shape .* is \(16, 16\); expected \(C, H, W\), three"),
        ({"image_shape": (1, 0, 16)}, r"image_shape .* is \(1, 0, 16\)"),
        ({"class_names": ()}, r"class_names .* is \(\); expected a tuple of one or more names"),
        ({"class_names": "abc"}, "class_names .* is 'abc'"),
        ({"class_names": (0, 1)}, r"class_names .* is \(0, 1\)"),
        ({"sampler": None}, "sampler .* is None; expected a method"),
    ],
)
def test_a_pipeline_with_a_part_of_another_kind_is_refused(part, said):
    right = {
        "class_names": ("a", "b"),
        "image_shape": (1, 16, 16),
        "device": torch.device("cpu"),
        "sampler": print,
    }
    check_pipeline(SimpleNamespace(**right))
    with pytest.raises(InputError, match=said):
        check_pipeline(SimpleNamespace(**right | part))


class Few(Source):
    """Half of the samples that it is asked for."""

    def available(self, pool_size):
        return 0

    def make(self, request, done=0):
        images, labels = noise(request.count // 2)
        ids, unknown = torch.arange(len(labels)), torch.full((len(labels),), torch.nan)
        yield SampleBatch(images=images, labels=labels, sample_ids=ids, entropy=unknown)


def test_a_source_that_makes_fewer_samples_than_asked_for_is_refused(short):
    practice = DeliberatePractice(short, real=REAL, sources=[Few(initial_samples=30)])
    with pytest.raises(InputError, match="source 'few': round 0 has 15 samples, expected 30"):
        practice.run(progress=False)


def test_a_loader_without_a_part_of_the_protocol_is_refused(short):
    practice = DeliberatePractice(short, real=REAL, loader=lambda pool, **_: iter(()))
    with pytest.raises(InputError, match="loader: a tuple_iterator has no pool; expected"):
        practice.run(progress=False)


def test_a_run_of_objects_names_them_and_needs_the_same_kinds_to_go_on(short, tmp_path, pipeline):
    out = tmp_path / "run"
    options = {"real": REAL, "sources": ["static"]}
    DeliberatePractice(short, learner=net(), **options).run(out, progress=False)
    found = json.loads((out / "objects.json").read_text())
    assert found["learner"] == "torch.nn.modules.container.Sequential"
    assert found["real"] == "dpfast.data.real.RealData"
    lines = (out / "metrics.jsonl").read_text()
    for learner, said in (
        (None, "gets the recipe's"),
        (net, r"gets an object, .*test_objects.net"),
    ):
        with pytest.raises(InputError, match=rf"began with learner = an object, torch.* {said}"):
            DeliberatePractice(short, learner=learner, **options).run(out, resume=True)
    DeliberatePractice(short, learner=net(), **options).run(out, resume=True, progress=False)
    assert (out / "metrics.jsonl").read_text() == lines
    with pytest.raises(InputError, match=r"an object of its run, torch.*load its weights"):
        load_learner(out, pipeline, source="static")


def test_classes_of_real_images_are_those_of_the_generator(short):
    assert DeliberatePractice(short, real=noise(60)).real.classes == CLASSES
