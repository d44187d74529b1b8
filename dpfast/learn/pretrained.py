"""Learners that begin with weights that somebody has trained: ``[learner] pretrained``.

All weights are the file's but those of the head, which are new where the file tells other classes
apart, or none. Nothing else is left out or made up: the first name that does not fit is an error. A
run keeps what it began with in its folder, so that whoever goes on, or builds its learner again,
needs no other.

Files are safetensors; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dpfast.config import Recipe
from dpfast.errors import InputError, first_line
from dpfast.files import check_readable, is_folder, there
from dpfast.learn.parts import Logits, in_head, library_model

log = logging.getLogger(__name__)

KEPT = "pretrained"  # in a run's folder: what its learners began with
WEIGHTS, CONFIG = "model.safetensors", "config.json"  # the names of transformers
NAMES_OF_CLASSES = ("id2label", "label2id", "num_labels")
Shape = Sequence[int]


def settings_of(kind: Any, source: str) -> dict[str, Any]:
    """Returns the settings of the model of transformers in ``source``, without the names of its
    classes.

    Raises ``InputError`` where there is none, and for one of another architecture.
    """
    folder = _folder(source)
    try:
        with quiet():
            settings, _ = kind.config_class.get_config_dict(folder)
    except Exception as error:  # those of two libraries
        raise _unread(source, error) from error
    found, wanted = settings.get("model_type"), kind.config_class.model_type
    if found != wanted:
        raise InputError(
            f"pretrained = {source!r}: of model_type {found!r}; {kind.__name__} needs {wanted!r}"
        )
    return {name: value for name, value in settings.items() if name not in NAMES_OF_CLASSES}


def load_transformers(kind: Any, source: str, config: Any) -> nn.Module:
    """Returns a learner of transformers with the weights in ``source``, in float32, of the class
    ``kind``.

    config: of the model, as ``settings_of`` gives it.

    Raises ``InputError`` where the weights cannot be read or do not fit, the head's apart.
    """
    folder = _folder(source)
    try:
        with quiet():
            model, found = kind.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # those of three libraries
        raise _unread(source, error) from error
    learner = Logits(model)
    shapes = {name: (old, new) for name, old, new in found["mismatched_keys"]}
    _check(source, learner, shapes, found["missing_keys"], found["unexpected_keys"])
    return learner


def load_weights(learner: nn.Module, source: str) -> None:
    """Fills a learner from a file of safetensors, or from the folder that a run has kept.

    Raises ``InputError`` as ``load_transformers`` does; the learner is then of no use.
    """
    path = Path(source)
    path = path / WEIGHTS if is_folder(path) else path
    if not there(path) or not path.name.endswith(".safetensors"):
        raise InputError(
            f"pretrained = {source!r}: expected a .safetensors file, the state dict of the model"
        )
    check_readable(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unread(source, error) from error
    own = library_model(learner).state_dict()
    shapes = {
        name: (tensors[name].shape, own[name].shape)
        for name in own.keys() & tensors.keys()
        if tensors[name].shape != own[name].shape
    }
    _check(source, learner, shapes, own.keys() - tensors.keys(), tensors.keys() - own.keys())
    kept = {name: value for name, value in tensors.items() if name in own and name not in shapes}
    library_model(learner).load_state_dict(kept, strict=False)


def _check(
    source: str,
    learner: nn.Module,
    shapes: Mapping[str, tuple[Shape, Shape]],
    missing: Collection[str],
    unexpected: Collection[str],
) -> None:
    """Raises ``InputError`` with the first name beyond the head that does not fit, and says what
    becomes of the head.

    shapes: name -> that of the file and that of the learner, where they differ.
    """
    order = list(library_model(learner).state_dict())
    for name in order:
        if name in missing and not in_head(learner, name):
            raise InputError(f"pretrained = {source!r}: has no {name}, which the learner needs")
        if name in shapes:
            old, new = map(tuple, shapes[name])
            if not (in_head(learner, name) and old[1:] == new[1:]):
                raise InputError(
                    f"pretrained = {source!r}: {name} has the shape {old} there, and {new} in the "
                    "learner"
                )
    for name in sorted(unexpected):
        if not _of_another_head(learner, name):
            raise InputError(f"pretrained = {source!r}: has {name}, which the learner has not")
    drawn = next((name for name in order if name in shapes or name in missing), None)
    if drawn is not None:
        was = f"was of {shapes[drawn][0][0]} classes" if drawn in shapes else "was not there"
        log.info("the learner begins with %s; its head is new, it %s", source, was)


def _of_another_head(learner: nn.Module, name: str) -> bool:
    """Returns True if a name that a model of transformers has not is of what others have in place
    of its head. A folder of a base model leaves the prefix of the names out.
    """
    model = library_model(learner)
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(learner, Logits) or not isinstance(base, nn.Module):
        return False
    parts = (part for part, module in base.named_children() if module is not None)
    return in_head(learner, name) and name.partition(".")[0] not in parts


def keep(learner: nn.Module, run: Path) -> None:
    """Writes the initial weights of a run's learner into its folder, and its settings where it has
    any. Raises ``OSError``.
    """
    part = run / f".{KEPT}.tmp"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    if isinstance(learner, Logits):
        with quiet():
            learner.model.save_pretrained(part)  # type: ignore[operator]
    else:
        state = learner.state_dict()
        weights = {name: each.detach().cpu().contiguous().clone() for name, each in state.items()}
        save_file(weights, part / WEIGHTS)
    os.replace(part, run / KEPT)


def as_kept(recipe: Recipe, run: Path) -> Recipe:
    """Returns a run's recipe whose learner begins with the weights that the run has kept, if it
    has.
    """
    if not recipe.learner.pretrained or not is_folder(run / KEPT):
        return recipe
    return replace(recipe, learner=replace(recipe.learner, pretrained=str(run / KEPT)))


def _folder(source: str) -> Path:
    """Returns the folder of a model of transformers, of a name that in the Hub's cache. What the
    cache lacks is downloaded, unless HF_HUB_OFFLINE forbids it. Raises ``InputError`` where there
    is none.
    """
    from dpfast.generate.pipelines import hub  # which imports diffusers

    wanted = "expected one of transformers' save_pretrained, or OWNER/NAME of a model of the Hub"
    path = Path(source)
    if not is_folder(path):
        if there(path) or not hub.is_model_id(hub.parted(source)[0]):
            raise InputError(f"pretrained = {source!r}: no such folder; {wanted}")
        try:
            path = hub.located(source, field="pretrained")
        except hub.IncompleteError:
            if hub.offline():
                raise
            hub.fetch(*hub.parted(source), field="pretrained")
            path = hub.located(source, field="pretrained")
    if not there(path / CONFIG):
        raise InputError(f"pretrained = {source!r}: has no {CONFIG}; {wanted}{hub.hint(path)}")
    return path


def _unread(source: str, error: Exception) -> InputError:
    return InputError(f"pretrained = {source!r}: cannot be read: {first_line(error)}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers within a ``with`` block: what it says, a run says in a line of its
    own.
    """
    logging = importlib.import_module("transformers").utils.logging
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
