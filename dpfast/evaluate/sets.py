"""The sets that a finished classifier is measured on, beside its held-out test images: each a row
of the final table.

A recipe's ``evaluation`` names them: "shifts" for the shifted copies of the held-out images
(``dpfast.evaluate.shifts``), one shift of them ("blur"), a folder of images, or one with a name of
its own ("mine=/data/mine"). The names imagenet-val, imagenet-v2, imagenet-sketch, imagenet-r and
imagenet-a ("imagenet-r=/data/imagenet-r") promise that the folder holds the classes of that set,
and allow a learner of fewer classes, which is measured on those that it knows.

A learner is measured on the 200 classes of ImageNet-R and ImageNet-A among those 200 alone, as
their authors do: the logits of the other classes are left out. A folder with exactly their WordNet
ids is taken for them whatever its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpfast import imagenet
from dpfast.data.class_folders import holds_classes, imagenet_ids, some_of, wordnet_ids
from dpfast.data.folders import BATCH, open_folder
from dpfast.data.real import RealSet
from dpfast.errors import InputError
from dpfast.evaluate.measures import Evaluation, measure, predict, score
from dpfast.evaluate.shifts import SEVERITIES, SHIFTS, shift
from dpfast.files import is_folder
from dpfast.parallel import ALONE, Ranks

Batches = Callable[..., Iterable[tuple[Tensor, Tensor]]]
IMAGENET_SETS = {
    "imagenet-val": "",
    "imagenet-v2": "",
    "imagenet-sketch": "",
    "imagenet-r": "r",
    "imagenet-a": "a",
}


@dataclass(frozen=True)
class EvaluationSet:
    """Labelled real images in batches of uint8 (n, C, H, W) and class ids (n,); every call of
    ``batches`` starts anew.

    ``batches(ranks)`` gives a rank's part of them, ``batches()`` all.

    severity: of a shift, 1 to 5. among: the class ids that a prediction is chosen from; None: all.
    """

    name: str
    batches: Batches
    severity: int | None = None
    among: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Row:
    """One line of the final table: a set, its images, the classes that predictions were chosen
    from, the measures.
    """

    name: str
    severity: int | None
    images: int
    classes: int
    result: Evaluation

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able: name, severity, images, classes, top1, top5, loss, entropy,
        calibration_error.
        """
        measures = {
            key: getattr(self.result, key)
            for key in ("top1", "top5", "loss", "entropy", "calibration_error")
        }
        return {
            "name": self.name,
            "severity": self.severity,
            "images": self.images,
            "classes": self.classes,
        } | measures


def evaluation_sets(
    names: Sequence[str], test: RealSet, classes: Sequence[str], *, seed: int = 0
) -> list[EvaluationSet]:
    """Returns the sets of a recipe, checked before any work; folders are listed, nothing is read.

    Args:
        names: the recipe's ``evaluation``.
        test: the held-out images, whose shifts "shifts" stands for and whose shape folders are read
        in.
        classes: the learner's class names, by index.
        seed: of the shifts.

    Raises ``InputError`` for an unknown name, a missing folder and classes that the learner does
    not know.
    """
    sets: list[EvaluationSet] = []
    for name in names:
        if (name == "shifts" or name in SHIFTS) and not holds_classes(Path(name)):
            kinds = list(SHIFTS) if name == "shifts" else [name]
            sets += [
                _shifted(test, kind, severity, seed) for kind in kinds for severity in SEVERITIES
            ]
        else:
            sets.append(_folder(name, tuple(test.images.shape[1:]), classes))
    seen = [(s.name, s.severity) for s in sets]
    twice = sorted({name for name, severity in seen if seen.count((name, severity)) > 1})
    if twice:
        raise InputError(
            f"evaluation: {', '.join(twice)} comes twice; name folders apart by NAME=FOLDER"
        )
    return sets


def evaluate_sets(
    model: Callable[[Tensor], Tensor], sets: Iterable[EvaluationSet], ranks: Ranks = ALONE
) -> list[Row]:
    """Measures a classifier (images scaled to [-1, 1] -> logits) on every set; one batch is in
    memory at a time.
    """
    return [_row(model, one, ranks) for one in sets]


def _row(model: Callable[[Tensor], Tensor], one: EvaluationSet, ranks: Ranks) -> Row:
    scores = []
    classes = 0
    among = None if one.among is None else list(one.among)
    for images, labels in one.batches(ranks):
        logits = predict(model, images)
        if among is not None:
            place = torch.full((logits.shape[1],), -1)
            place[among] = torch.arange(len(among))
            logits, labels = logits[:, among], place[labels]
        scores.append(score(logits, labels))
        classes = logits.shape[1]
        ranks.beat()
    total, classes = int(ranks.total(sum(map(len, scores)))), int(ranks.most(classes))
    return Row(one.name, one.severity, total, classes, measure(scores, classes, ranks))


def _shifted(test: RealSet, kind: str, severity: int, seed: int) -> EvaluationSet:
    def batches(ranks: Ranks = ALONE) -> Iterator[tuple[Tensor, Tensor]]:
        ids = ranks.indices(int(ranks.total(len(test))), BATCH).split(BATCH)
        for images, labels, part in zip(
            test.images.split(BATCH), test.labels.split(BATCH), ids, strict=True
        ):
            yield shift(images, kind, severity, ids=part, seed=seed), labels

    return EvaluationSet(kind, batches, severity)


def _folder(name: str, shape: tuple[int, ...], classes: Sequence[str]) -> EvaluationSet:
    title, equals, place = name.rpartition("=")
    path = Path(place)
    if not equals and not is_folder(path):
        known = ", ".join(("shifts", *SHIFTS))
        raise InputError(f"evaluation = {name!r}: neither a folder nor one of {known}")
    if not is_folder(path):
        raise InputError(f"evaluation = {name!r}: no folder {place!r}")
    present = wordnet_ids(path)
    ids = imagenet_ids(path, classes)
    known_set = title if title in IMAGENET_SETS else None
    if known_set is None and ids is not None:
        known_set = _recognised(present)
    if known_set is not None:
        if ids is None:
            raise InputError(
                f"evaluation = {name!r}: the learner's classes are not those of ImageNet"
            )
        wanted = imagenet.load().subset(IMAGENET_SETS[known_set])
        _same_classes(name, known_set, wanted, present)
        if not wanted & set(ids):
            raise InputError(
                f"evaluation = {name!r}: {known_set} has none of the learner's {len(ids)} classes"
            )
    folder = open_folder(
        path, classes, shape, ids=ids, only=known_set is not None, field="evaluation"
    )
    among = None
    if known_set in ("imagenet-r", "imagenet-a"):
        among = tuple(label for label, wordnet_id in enumerate(ids or ()) if wordnet_id in wanted)
    return EvaluationSet(title or known_set or path.name, folder.batches, among=among)


def _recognised(present: frozenset[str]) -> str | None:
    return next((f"imagenet-{s}" for s in ("r", "a") if present == imagenet.load().subset(s)), None)


def _same_classes(
    name: str, known_set: str, wanted: frozenset[str], present: frozenset[str]
) -> None:
    for problem, ids in (("lacks", wanted - present), ("has besides", present - wanted)):
        if ids:
            raise InputError(
                f"evaluation = {name!r}: {known_set} has {len(wanted)} classes; the folder "
                f"{problem} {some_of(sorted(ids))}"
            )
