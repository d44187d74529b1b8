"""Measures of a classifier and of samples on real images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpfast.data.folders import BATCH
from dpfast.hardware.out_of_memory import HalvingBatches
from dpfast.ops import entropy
from dpfast.parallel import ALONE, Ranks

MANY, FEW = 100, 20  # shots: classes with more are many, with fewer few (ImageNet-LT)
SHOTS = {  # group of classes -> what a table calls it
    "many": f"many: over {MANY}",
    "medium": f"medium: {FEW} to {MANY}",
    "few": f"few: under {FEW}",
}
BINS = 15  # of the calibration error, as in Guo et al. 2017
# model -> the batch that fitted where memory ran out
_FITTING: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class Evaluation:
    """The measures of a classifier on one set of N labelled images.

    Attributes:
        top1: Fraction of right labels, in [0, 1].
        top5: Fraction of labels among the first five, in [0, 1]; with five classes or fewer it is
            1.
        loss: Cross-entropy, mean, nats.
        entropy: Entropy of the predictions, mean, nats.
        calibration_error: Expected calibration error in [0, 1].
        per_class: (K,) fractions of right labels, NaN for a class without images.
        shots: Of a run with class counts what ``by_shots`` gives, else empty.
    """

    top1: float
    top5: float
    loss: float
    entropy: float
    calibration_error: float
    per_class: Tensor
    shots: dict[str, tuple[float, int]] = field(default_factory=dict)


def predict(
    model: Callable[[Tensor], Tensor], images: Tensor, *, batch_size: int = BATCH
) -> Tensor:
    """Returns logits (N, K), float32, of uint8 images (N, C, H, W), scaled to [-1, 1]; on the
    device of the model.

    A module is run in eval mode and put back. Batches halve where memory runs out.
    """
    return torch.cat([logits for _, logits in predictions(model, images, batch_size=batch_size)])


def predictions(
    model: Callable[[Tensor], Tensor], images: Tensor, *, batch_size: int = BATCH
) -> Iterator[tuple[slice, Tensor]]:
    """Yields predictions batch by batch: the rows of ``images``, and their logits."""
    was_training, device = False, images.device
    if isinstance(model, nn.Module):
        was_training = model.training
        device = next((p.device for p in model.parameters()), device)
        model.eval()
    batches = HalvingBatches(min(batch_size, _FITTING.get(model, batch_size)), device)

    @torch.no_grad()
    def made(rows: slice) -> tuple[slice, Tensor]:
        return rows, model(images[rows].to(device).float().div(127.5).sub(1.0)).float()

    try:
        yield from batches.over(len(images), made)
    finally:
        if batches.retries:
            _FITTING[model] = batches.size
        if isinstance(model, nn.Module):
            model.train(was_training)


def evaluate(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, ranks: Ranks = ALONE
) -> Evaluation:
    """Evaluates on uint8 images (N, C, H, W) with labels (N,), all or this rank's part of them.

    All ranks get the measures of the whole set, and the same as one rank would. A batch's logits
    are in memory at a time.
    """
    scores, classes = [], 0  # a small set, many ranks: one may have no image
    for rows, logits in predictions(model, images):
        scores.append(score(logits, labels[rows]))
        classes = logits.shape[1]
        ranks.beat()
    return measure(scores, classes, ranks)


def score(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the values that ``measure`` needs of a batch's logits (n, K) with labels (n,): (n, 7)
    float64, on their device.

    The columns: label, right, right among the top five, cross-entropy, entropy, highest
    probability, right in float64.
    """
    labels = labels.to(logits.device)
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
    top, guess = logits.double().softmax(1).max(1)
    values = [
        labels,
        ranked[:, 0],
        ranked.any(1),
        F.cross_entropy(logits, labels, reduction="none"),
        entropy(logits),
    ]
    return torch.stack([value.double() for value in (*values, top, guess == labels)], 1)


def measure(scores: Sequence[Tensor], classes: int, ranks: Ranks = ALONE) -> Evaluation:
    """Returns all measures of this rank's ``score``, N >= 1 over all ranks. classes: K, 0 where
    this rank has none.
    """
    rows = torch.cat([*scores]) if scores else torch.empty(0, 7).double()
    known, counts = zip(*ranks.all_gather_object([classes, len(rows)]), strict=True)
    classes, rows = max(known), ranks.gather(rows, sum(counts), BATCH)
    hits, near, loss, entropies = (rows[:, i].float() for i in (1, 2, 3, 4))
    labels = rows[:, 0].long()
    right = torch.zeros(classes).index_add_(0, labels, hits)
    return Evaluation(
        top1=float(hits.mean()),
        top5=float(near.mean()),
        loss=float(loss.mean()),
        entropy=float(entropies.mean()),
        calibration_error=_calibration_error(rows[:, 5], rows[:, 6], BINS),
        per_class=right / torch.bincount(labels, minlength=classes),
    )


def by_shots(per_class: Tensor, counts: Tensor) -> dict[str, tuple[float, int]]:
    """Returns the mean accuracy of the classes with many, medium and few samples, and how many they
    are.

    per_class: (K,) fractions, of which NaN, a class without images, is left out; counts: (K,)
    samples of each class: "many" has more than 100, "few" fewer than 20, "medium" the others (Liu
    et al. 2019, arXiv 1904.05160, section 5). A group without a class is left out.
    """
    counts = counts.to(per_class.device)
    many, few = counts > MANY, counts < FEW
    found = {}
    for name, members in (("many", many), ("medium", ~many & ~few), ("few", few)):
        known = per_class[members & ~per_class.isnan()]
        if len(known):
            found[name] = (float(known.double().mean()), len(known))
    return found


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = BINS) -> float:
    """Returns expected calibration error of logits (N, K) (Guo et al. 2017, arXiv 1706.04599, eq.
    3), in [0, 1].

    The top probabilities fall into ``bins`` intervals of equal width, closed at their upper end;
    the gaps between a bin's accuracy and its mean probability are averaged, weighted by the bins'
    counts.
    """
    top, guess = logits.double().softmax(1).max(1)
    return _calibration_error(top, (guess == labels).double(), bins)


def _calibration_error(top: Tensor, right: Tensor, bins: int) -> float:
    """Returns the error of top probabilities (N,) float64; right: 1 where they are right, else
    0.
    """
    bin_of = (top * bins).ceil().long().clamp(1, bins) - 1
    sums = torch.zeros(bins, dtype=torch.float64, device=top.device).index_add_(
        0, bin_of, right - top
    )
    return float(sums.abs().sum() / len(top))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Returns the Fréchet distance of two sets of features (N, D) and (M, D) (Heusel et al. 2017,
    eq. 6), in float64.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)); the trace of the root is that of the root of
    B^(1/2) A B^(1/2).
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_b)
    root_b = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_b @ cov_a @ root_b).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def features(judge: nn.Module, images: Tensor) -> Tensor:
    """Returns the pooled features (N, D), float32, of uint8 images (N, C, H, W): what the last
    layer of a judge (``dpfast.learn.models.load_judge``) reads.
    """
    model: Any = judge.model  # of transformers
    return predict(lambda part: model.base_model(part).pooler_output.flatten(1), images)


def neighbour_radii(points: Tensor, neighbours: int = 3) -> Tensor:
    """Returns the distance (N,) of each of N > ``neighbours`` points (N, D) to its so many-th
    nearest of the others.
    """
    return torch.cat(
        [
            torch.cdist(part, points).topk(neighbours + 1, largest=False).values[:, -1]
            for part in points.split(BATCH)
        ]
    )


def precision_and_recall(
    made: Tensor, real: Tensor, *, neighbours: int = 3, real_radii: Tensor | None = None
) -> tuple[float, float]:
    """Returns improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2), in [0, 1].

    Precision is the share of the samples that lie within the ball of some real image, which reaches
    to its so many-th nearest of the real ones; recall the share of the real images that lie within
    such a ball of some sample. More samples have smaller balls, and cover more: only numbers of
    equally many compare.

    Args:
        made, real: features (N, D) and (M, D), N and M > ``neighbours``.
        real_radii: ``neighbour_radii`` of the real ones, where they are at hand.
    """
    radii = neighbour_radii(made, neighbours)
    real_radii = neighbour_radii(real, neighbours) if real_radii is None else real_radii
    precise = torch.zeros(len(made), dtype=torch.bool, device=made.device)
    recalled = 0
    for part, reach in zip(real.split(BATCH), real_radii.split(BATCH), strict=True):
        distance = torch.cdist(part, made)
        precise |= (distance <= reach[:, None]).any(0)
        recalled += int((distance <= radii).any(1).sum())
    return float(precise.float().mean()), recalled / len(real)
