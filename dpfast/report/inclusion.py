"""The fate of samples: their entropy at birth, and the learner's error on them before and after
inclusion.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from dpfast.config import Recipe
from dpfast.data.folders import BATCH
from dpfast.evaluate.measures import predict
from dpfast.learn.models import recipe_learner
from dpfast.learn.precision import in_precision
from dpfast.learn.pretrained import as_kept
from dpfast.plotting import COLORS, MUTED, axes_of, label_ends
from dpfast.pool.pool import SamplePool
from dpfast.practice import checkpoint
from dpfast.practice.saved_learners import weights_of
from dpfast.report.runs import Run


@dataclass(frozen=True)
class Errors:
    """Errors by rounds since inclusion, 0 being the learner that guided: error on all new samples,
    and on those it mistook.
    """

    offsets: tuple[int, ...]
    everything: tuple[float, ...]
    hard: tuple[float, ...]


def errors_around(
    run: Run,
    pool: SamplePool,
    classes: int,
    *,
    source: str = "dp",
    device: torch.device | str = "cpu",
) -> Errors | None:
    """Returns the errors of a run's learners, at the ends of its rounds and of the run, on the
    samples of every round.

    The learners run on ``device``. Returns None without the checkpoints of every round
    (``keep_rounds``).
    Source: Fig. 6 of arXiv 2502.15588.
    """
    saved = run.path / f"checkpoints_{source}"
    rounds = int(pool.column("round").max()) if len(pool) else 0
    paths = [checkpoint.at_round(saved, number) for number in range(rounds)]
    try:
        newest = checkpoint.latest(saved) if rounds and all(paths) else None
    except checkpoint.VersionError as error:
        warnings.warn(f"{error}; the errors by round are left out", stacklevel=2)
        return None
    if newest is None:
        return None
    recipe = as_kept(Recipe.from_dict(run.recipe), run.path)
    weights = recipe.guidance.guide_with
    channels = pool.images(torch.arange(1)).shape[1]
    model = recipe_learner(recipe.learner, classes=classes, channels=channels).to(device)
    of_round = pool.column("round")
    members = [torch.nonzero(of_round == number).flatten() for number in range(1, rounds + 1)]
    states = itertools.chain(
        (checkpoint.load(path) for path in paths if path is not None), [newest]
    )
    learner = in_precision(model, recipe.learner.precision, torch.device(device))
    wrong = []
    for state in states:
        _with(model, state, weights)
        wrong.append(_wrong(learner, pool, members))
    sums: dict[int, list[int]] = {}  # mistakes and samples, of all and of the hard ones
    for new in range(rounds):  # the samples of round new + 1; the learner at index new guided them
        mistaken = wrong[new][new]
        for at, mistakes in enumerate(wrong):
            again = mistakes[new][mistaken]
            counts = [int(mistakes[new].sum()), len(mistaken), int(again.sum()), len(again)]
            before = sums.get(at - new, [0, 0, 0, 0])
            sums[at - new] = [a + b for a, b in zip(before, counts, strict=True)]
    offsets = tuple(sorted(sums))
    return Errors(
        offsets,
        tuple(sums[o][0] / max(sums[o][1], 1) for o in offsets),
        tuple(sums[o][2] / max(sums[o][3], 1) for o in offsets),
    )


def _with(model: nn.Module, taken: checkpoint.Checkpoint, weights: str) -> nn.Module:
    """Returns ``model`` in eval mode with the "ema" or "raw" weights of a checkpoint."""
    model.load_state_dict(weights_of(taken, weights))
    return model.eval()


def _wrong(model: nn.Module, pool: SamplePool, members: list[Tensor]) -> list[Tensor]:
    """Returns which samples of each of ``members`` a model mistakes; it holds a batch of images at
    a time.
    """
    labels = pool.column("label")
    found = []
    for rows in members:
        batches = rows.split(BATCH)
        guesses = [
            predict(model, pool.images(batch)).argmax(1).cpu() for batch in batches if len(batch)
        ]
        found.append(torch.cat([*guesses, labels[:0]]) != labels[rows])
    return found


def inclusion(errors: Errors | None, size: tuple[float, float]) -> Figure | None:
    """Draws Fig. 6: the error of samples around their inclusion, over the learners at the ends of
    rounds.
    """
    if errors is None:
        return None
    figure, axes = axes_of(size, "rounds since inclusion", "error on the samples, %")
    ends = []
    for name, values, color in (
        ("hard", errors.hard, COLORS["dp"]),
        ("all", errors.everything, MUTED),
    ):
        axes.plot(errors.offsets, [100 * v for v in values], "o-", color=color, ms=4, lw=1.4)
        ends.append((name, float(errors.offsets[-1]), 100 * values[-1], color))
    axes.axvline(0, color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=0)
    axes.set_ylim(0, 105)
    axes.xaxis.get_major_locator().set_params(integer=True)
    label_ends(axes, ends)
    return figure


def births(pool: SamplePool, size: tuple[float, float]) -> Figure | None:
    """Draws histograms of the entropy at birth, a line for each round from the first addition
    on.
    """
    rounds, entropy = pool.column("round"), pool.column("entropy")
    numbers = [n for n in rounds.unique().tolist() if bool(entropy[rounds == n].isfinite().any())]
    if not numbers:
        return None
    figure, axes = axes_of(size, "entropy at birth, nats", "share of the round's samples, %")
    top = float(entropy[entropy.isfinite()].max())
    for place, number in enumerate(numbers):
        values = entropy[(rounds == number) & entropy.isfinite()]
        share = 100 * torch.histc(values, bins=20, min=0.0, max=max(top, 1e-3)) / len(values)
        edges = torch.linspace(0.0, max(top, 1e-3), 21)
        depth = 0.25 + 0.75 * (place + 1) / len(numbers)
        axes.stairs(
            share.numpy(),
            edges.numpy(),
            color=COLORS["dp"],
            alpha=depth,
            lw=1.5,
            label=f"round {number}",
        )
    axes.legend(frameon=False, fontsize=8)
    axes.set_ylim(bottom=0)
    return figure
