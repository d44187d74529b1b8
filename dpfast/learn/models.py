"""Learners from their names: any ``nn.Module`` that maps images (B, C, H, W) to logits (B, K)."""

from __future__ import annotations

import copy
import importlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dpfast.config import (
    ASSETS,
    RECIPE_FILE,
    Learner,
    Recipe,
    imported,
    imported_module,
    kind_of,
    objects_of,
    read_recipe,
)
from dpfast.errors import InputError, first_line
from dpfast.extras import EXTRAS, require
from dpfast.files import check_readable, there
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.protocol import OwnPipeline
from dpfast.learn.parts import Logits
from dpfast.learn.precision import in_precision
from dpfast.learn.pretrained import as_kept, load_transformers, load_weights, settings_of
from dpfast.textfiles import lines

NewLearner = Callable[[], nn.Module]  # gives a learner with the same initial weights each time
Named = tuple[str, Tensor]
JUDGES = {  # class of transformers and folder of the assets
    1: ("RegNetForImageClassification", "fashion_judge"),
    2: ("ResNetForImageClassification", "fashion_judge_2"),
}


def build_learner(spec: str, *, classes: int, channels: int, **options: Any) -> nn.Module:
    """Builds a randomly initialised classifier in channels-last memory.

    Args:
        spec: "transformers:RegNetForImageClassification" (any image classification class of
        transformers),
            "timm:resnet18" (any model of timm), or "package.module:factory", called with
            ``classes``, ``channels`` and the options.
        classes, channels: K and C.
        options: the model's own settings.

    Raises ``InputError`` when the library is not installed, does not know the name or an option, or
    gives no module.
    """
    library, _, name = spec.partition(":")
    if library in EXTRAS:
        require(library)
    # what timm calls a model is no name of its module
    found: Any = (imported_module if library == "timm" else imported)("model", spec)
    try:
        if library == "transformers":
            model: nn.Module = _transformers_model(found, classes, channels, options)
        elif library == "timm":
            model = found.create_model(name, num_classes=classes, in_chans=channels, **options)
        else:
            model = found(classes=classes, channels=channels, **options)
        if not isinstance(model, nn.Module):
            raise TypeError(f"gives a {type(model).__name__}, expected an nn.Module")
        check_tensors(f"model = {spec!r}", model)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    except InputError:
        raise
    except Exception as error:  # whatever a foreign factory raises
        raise InputError(f"model = {spec!r}: {first_line(error)}") from error


def check_tensors(what: str, model: nn.Module) -> None:
    """Raises ``InputError`` that begins with ``what`` for tensors that cannot be trained or loaded
    into: lazy, sparse and expanded ones, and trained ones that lie in the memory of others.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, value in named:
        if is_lazy(value):
            raise InputError(
                f"{what}: {name} has no shape before the first batch; expected layers of known "
                "sizes"
            )
        if value.layout != torch.strided:
            raise InputError(f"{what}: {name} is sparse, and a file of weights takes dense tensors")
        strides = zip(value.shape, value.stride(), strict=True)
        if any(size > 1 and not stride for size, stride in strides):
            raise InputError(
                f"{what}: {name} is an expanded tensor, into which nothing can be loaded; expected "
                "memory of its own, as clone() gives"
            )
    for pair in overlaps(named):
        if any(value.requires_grad for _, value in pair):
            names = " and ".join(name for name, _ in pair)
            raise InputError(
                f"{what}: {names} share memory, and training changes it; expected memory of their "
                "own, or one parameter under both names"
            )


def overlaps(named: Sequence[Named]) -> Iterator[tuple[Named, Named]]:
    """Yields pairs of different tensors, with their names, of which one reaches into the other's
    memory.
    """
    spans = []
    for name, value in named:
        if value.numel() and value.device.type != "meta":
            extent = zip(value.shape, value.stride(), strict=True)
            elements = 1 + sum((size - 1) * stride for size, stride in extent)
            start = value.data_ptr()
            spans.append((start, start + elements * value.itemsize, (name, value)))
    spans.sort(key=lambda span: (span[0], -span[1]))
    furthest = 0
    last: Named | None = None
    for start, end, tensor in spans:
        if last is not None and start < furthest:
            yield last, tensor
        if end > furthest:
            furthest, last = end, tensor


def recipe_learner(config: Learner, *, classes: int, channels: int) -> nn.Module:
    """Returns the learner of a recipe as it begins, random or pretrained, in channels-last memory;
    where torch's default device is "meta" no file of weights is read.

    classes, channels: K and C.

    Raises ``InputError`` as ``build_learner`` does, and for weights that cannot be read or do not
    fit, but for those of the head.
    """
    library = config.model.partition(":")[0]
    numbers = torch.get_default_device().type != "meta"
    if not config.pretrained:
        return build_learner(config.model, classes=classes, channels=channels, **config.options)
    if library != "transformers":
        learner = build_learner(config.model, classes=classes, channels=channels, **config.options)
        if numbers:
            load_weights(learner, config.pretrained)
        return learner
    require(library)
    kind = imported("model", config.model)
    settings = settings_of(kind, config.pretrained) | config.options
    _check_options(kind, config.options)
    try:
        made = kind.config_class(**settings | {"num_channels": channels, "num_labels": classes})
        shapes = None if numbers else Logits(kind(made))
    except Exception as error:  # whatever transformers raises
        raise InputError(f"model = {config.model!r}: {first_line(error)}") from error
    loaded = shapes or load_transformers(kind, config.pretrained, made)
    return loaded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _transformers_model(
    kind: Any, classes: int, channels: int, options: dict[str, Any]
) -> nn.Module:
    _check_options(kind, options)
    return Logits(kind(kind.config_class(num_channels=channels, num_labels=classes, **options)))


def _check_options(kind: Any, options: dict[str, Any]) -> None:
    unknown = set(options) - set(kind.config_class().to_dict())
    if unknown:
        raise InputError(
            f"options: {kind.config_class.__name__} has no {', '.join(sorted(unknown))}"
        )


def load_judge(number: int = 1) -> nn.Module:
    """Returns an embedded judge, a classifier of real Fashion-MNIST images: (B, 1, 32, 32) in [-1,
    1] to logits (B, 10).

    A yardstick for samples (label agreement, Fréchet distance). No learner ever sees it or what it
    was trained on.

    number: 1, a RegNet of bottlenecks, or 2, a ResNet of basic blocks and of another seed, so that
        what is said of samples hangs on no single network.

    Raises ``InputError`` for another number.
    """
    if type(number) is not int or number not in JUDGES:  # True and 2.0 equal two of them
        raise InputError(f"judge = {number!r}: expected one of {', '.join(map(str, JUDGES))}")
    require("transformers")
    name, folder = JUDGES[number]
    kind = getattr(importlib.import_module("transformers"), name)
    model = kind(kind.config_class.from_pretrained(ASSETS / folder))
    # float16 on disk, copied into float32
    model.load_state_dict(load_file(ASSETS / folder / "model.safetensors"))
    return Logits(model).eval().requires_grad_(False)


def learner_factory(
    recipe: Recipe,
    pipeline: Pipeline | OwnPipeline,
    learner: nn.Module | NewLearner | None = None,
) -> NewLearner:
    """Returns a function that gives a run's initial learner on the pipeline's device, a new one
    each time.

    Args:
        recipe: names the learner where no other one is given, and its seed, which is set before a
            learner is built: it is initialised alike on any device.
        pipeline: whose classes and channels a learner by name gets.
        learner: a module, of which copies are given as it is now, or a function that builds a new
            one with each call.

    Raises ``InputError``, as the function does, for what is neither or does not build new modules.
    """
    if not (learner is None or callable(learner)):
        raise InputError(
            f"learner is a {type(learner).__name__}: "
            "expected an nn.Module, or a function that returns one"
        )
    if learner is not None and not isinstance(learner, nn.Module):
        _check_no_arguments(learner)
    if learner is not None and recipe.learner.pretrained:
        raise InputError(
            f"pretrained = {recipe.learner.pretrained!r}: the learner is an object of yours; load "
            "its weights into it"
        )
    held = None
    if isinstance(learner, nn.Module):
        check_tensors(f"learner = {kind_of(learner)}", learner)  # a copy has no memory of others
        held = _copied(learner)
    built: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def new_learner() -> nn.Module:
        torch.manual_seed(recipe.learner_seed)
        if held is not None:
            return copy.deepcopy(held).to(pipeline.device)
        if learner is None:
            model = recipe_learner(
                recipe.learner,
                classes=len(pipeline.class_names),
                channels=image_channels(pipeline),
            )
            if recipe.learner.pretrained:  # a head may have been drawn, or not
                torch.manual_seed(recipe.seed)
        else:
            model = learner()
        if not isinstance(model, nn.Module):
            raise InputError(
                f"learner: the function gives a {type(model).__name__}, expected an nn.Module"
            )
        if model in built:
            raise InputError(
                "learner: the function gives the same module again, which has been trained; give "
                "the module itself, which is copied"
            )
        built.add(model)
        return model.to(pipeline.device)

    return new_learner


def _copied(learner: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(learner)
    except Exception as error:  # of any of its attributes
        raise InputError(
            f"learner = {kind_of(learner)}: it cannot be copied: {first_line(error)}"
        ) from error


def _check_no_arguments(learner: NewLearner) -> None:
    """Raises ``InputError`` where a function or a class needs arguments to be called."""
    try:
        inspect.signature(learner).bind()
    except TypeError as error:
        raise InputError(f"learner: the function is called without arguments: {error}") from error
    except ValueError:
        pass  # what is built into Python may not tell


def image_channels(pipeline: Pipeline | OwnPipeline) -> int:
    """Returns C of a pipeline's images (C, H, W)."""
    return pipeline.image_channels if isinstance(pipeline, Pipeline) else pipeline.image_shape[0]


def load_learner(folder: str | Path | None, pipeline: Pipeline, *, source: str = "dp") -> nn.Module:
    """Returns the finished classifier of a run in eval mode and its precision; without a folder the
    embedded judge network.

    Raises ``InputError`` when the folder holds no learner, or one whose classes are not the
    pipeline's; and without a folder for a pipeline whose images the judge does not know.
    """
    if folder is None:
        return _judge_of(pipeline)
    weights = Path(folder) / f"learner_{source}.safetensors"
    if not there(weights) or not there(Path(folder) / RECIPE_FILE):
        raise InputError(
            f"learner = {str(folder)!r}: not the folder of a finished run, it has no {weights.name}"
        )
    check_readable(weights)
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"learner = {str(folder)!r}: {weights.name} cannot be read: {first_line(error)}"
        ) from error
    return learner_of_run(Path(folder), pipeline, tensors)


def learner_of_run(folder: Path, pipeline: Pipeline, weights: dict[str, Tensor]) -> nn.Module:
    """Returns the classifier of the run in ``folder`` with these weights, in eval mode and its
    precision.

    Raises ``InputError`` for a learner that was an object of its run, and for weights that do not
    fit the one of its recipe for this pipeline.
    """
    kind = objects_of(folder).get("learner")
    if kind is not None:
        raise InputError(
            f"learner = {str(folder)!r}: an object of its run, "
            f"{kind}; load its weights into another one"
        )
    recipe = as_kept(Recipe.from_dict(read_recipe(folder / RECIPE_FILE)), folder)
    model = learner_factory(recipe, pipeline)()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # a heading, then a line a tensor
        why = lines(str(error))[:2][-1].strip()
        raise InputError(f"learner = {str(folder)!r}: does not fit the pipeline: {why}") from error
    return in_precision(
        model.eval().requires_grad_(False), recipe.learner.precision, pipeline.device
    )


def _judge_of(pipeline: Pipeline) -> nn.Module:
    """Returns the embedded judge. Raises ``InputError`` for a pipeline of other images than it
    knows.
    """
    judge: Any = load_judge().to(pipeline.device)
    channels, classes = judge.model.config.num_channels, judge.model.config.num_labels
    if (image_channels(pipeline), len(pipeline.class_names)) != (channels, classes):
        raise InputError(
            f"learner: name the run whose learner guides; the embedded judge knows {classes} "
            f"classes of images with {channels} channel, and the pipeline makes "
            f"{len(pipeline.class_names)} with {image_channels(pipeline)}"
        )
    return judge


class Committee(nn.Module):
    """Several weights of one classifier as one learner, for criteria that compare predictions.

    Images (B, C, H, W) to logits (B, M, K), a row for each of M members, which are read live. The
    first member speaks for all where one prediction is asked for. A batch costs the forwards and
    backwards of all.
    """

    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images) for member in self.members], dim=1)


def guiding(criterion: str, guide: nn.Module, other: nn.Module) -> nn.Module:
    """Returns a sampler's learner: ``guide``, or for the criterion "disagreement" it and
    ``other``.
    """
    return Committee(guide, other) if criterion == "disagreement" else guide
