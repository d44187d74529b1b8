"""What a trajectory knows of its label without another forward: scores of each sample from the two
predictions of classifier-free guidance, against whether the judge denies the label.

    dpfast bench evidence                # guided samples of a young learner; a line for each form
    dpfast bench evidence --tables

With eps_c and eps_u the noise predicted with and without the label, D = eps_c - eps_u:

    c = -D / sigma = grad log p(label | x)           the label's score at one noise level
    path        sum c.(x' - x)                       of the steps x -> x': how far they climbed it
    early       the same of the first half of the steps, when omega could still be changed
    fisher      -sum |c|^2                           how much the label changes the prediction
    hindsight   sum |e - eps_u|^2 - |e - eps_c|^2    e = (x - alpha x0) / sigma, the noise that
                                                     would have led from the x0 reached to x
    alignment   mean cosine of c and x' - x
    whole       path and its known remainder

log p(label | x) changes along a path by more than its gradient: with z = x / alpha and s = sigma /
alpha both densities obey the heat equation, so that d log p(label | z) = c.dz + s ds (div c + c.(a
+ b)), a and b being the scores with and without the label. The divergence takes a derivative of the
denoiser and is not in hand; "whole" is the rest. Were the sampler one with noise, the ratio of the
two transition densities would be the evidence exactly (Girsanov); a step of DDIM has none.

"label loss" of the learner that guided is there for comparison: it finds hard samples first. A
score is useful if dropping the lowest tenth of each class lowers the share of wrong labels, and not
that of useful samples, which the learner gets wrong and the judge right. AUC: the probability that
a sample with a wrong label has the lower score, "within": of the same class, for labels are
balanced and some classes are confused more than others.
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import RESULTS
from benchmarks.harness import timing
from benchmarks.harness.arguments import add_lines, lines_file, new_parser
from benchmarks.harness.records import read_records
from benchmarks.systems.fewer_steps import mean
from benchmarks.systems.guidance_tables import MEAN
from dpfast.cli.parser import at_least
from dpfast.config import Recipe
from dpfast.evaluate.measures import predict
from dpfast.generate import step
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.sampler import GuidedSampler
from dpfast.learn.models import JUDGES, load_judge
from dpfast.ops import guided_step
from dpfast.practice.experiment import DeliberatePractice
from dpfast.terminal import say
from dpfast.textfiles import NUMBER, Kind, rows_of

RECORDS = RESULTS / "evidence.jsonl"
FIRST_ID = 1 << 40  # ids that no run uses
BATCH = 100
SEED = 7  # of their noise
FORMS = ((0.0, 0.0), (0.05, 0.0), (0.08, 0.0), (0.12, 0.0), (0.12, 0.5))  # omega, kappa
LEARNER: dict[str, Any] = {"sources": "static", "initial_samples": 1000, "maximum_samples": 1000}
BRIEFLY = {"initial_samples": 40, "maximum_samples": 40}
HARDEST = (0.5, 0.25, 0.1, 0.05)  # fractions of the unguided samples
ITERATIONS = 500  # of the learner: about where a run of 1,200 adds
Record = dict[str, Any]


class Trajectory:
    """Stands in for ``guided_step`` while samples are made, and keeps what each step had.

    steps: (x, x_next, eps_c, eps_u, alpha, sigma) of each.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, ...]] = []

    def guided_step(
        self,
        x: Tensor,
        cond: Tensor,
        uncond: Tensor,
        grad: Tensor | None,
        rows: Tensor,
        *o: Any,
        **options: Any,
    ) -> Tensor:
        assert options["prediction"] == "v"
        before, (alpha, sigma) = x.clone(), rows[int(o[0]), :2]
        eps = [sigma * before + alpha * each for each in (cond, uncond)]
        following = guided_step(x, cond, uncond, grad, rows, *o, **options)
        self.steps.append((before, following.clone(), *eps, alpha, sigma))
        return following

    def scores(self, x0: Tensor) -> dict[str, Tensor]:
        """(B,) of each kind, of the samples that ended at x0."""
        found: dict[str, Tensor] = {}
        ahead = [(alpha, sigma) for *_, alpha, sigma in self.steps[1:]]
        ends = [*ahead, (torch.tensor(1.0), torch.tensor(0.0))]
        for number, (taken, (alpha_next, sigma_next)) in enumerate(
            zip(self.steps, ends, strict=True)
        ):
            x, following, eps_c, eps_u, alpha, sigma = taken
            c, moved = (eps_u - eps_c) / sigma, following - x
            e = (x - alpha * x0) / sigma
            lengths = (_dot(c, c) * _dot(moved, moved)).sqrt().clamp(min=1e-12)
            parts = {
                "path": _dot(c, moved),
                "fisher": -_dot(c, c),
                "hindsight": _dot(e - eps_u, e - eps_u) - _dot(e - eps_c, e - eps_c),
                "alignment": _dot(c, moved) / lengths,
            }
            if alpha > 1e-2:  # z has no scale in pure noise
                s, ds = sigma / alpha, sigma_next / alpha_next - sigma / alpha
                scaled = following / alpha_next - x / alpha
                parts["whole"] = alpha * _dot(c, scaled) - _dot(c, eps_c + eps_u) * sigma / s * ds
            if 2 * number < len(ends):
                parts["early"] = parts["path"]
            for name, part in parts.items():
                found[name] = found.get(name, 0) + part
        return found


WORTH = {  # of a score
    **dict.fromkeys(("auc", "auc_within"), NUMBER.or_null()),
    **dict.fromkeys(("denied", "useful"), NUMBER),
}
KINDS = {  # of a line, as far as the table reads it
    "omega": NUMBER,
    "kappa": NUMBER,
    "agreement": rows_of(MEAN, 1),
    "useful": MEAN,
    "scores": Kind(
        lambda scores: (
            isinstance(scores, dict)
            and all(
                isinstance(worth, dict)
                and all(name in worth and kind.holds(worth[name]) for name, kind in WORTH.items())
                for worth in scores.values()
            )
        ),
        f"a table of scores, each with {', '.join(WORTH)}",
    ),
}


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def auc(score: Tensor, wrong: Tensor) -> float | None:
    """The probability that a sample (n,) with a wrong label has the lower score than one with a
    right one, ties counting half; None without one of either.
    """
    low, high = score[wrong].double(), score[~wrong].double()
    if not len(low) or not len(high):
        return None
    below = (low[:, None] < high).double() + 0.5 * (low[:, None] == high).double()
    return float(below.mean())


def auc_within(score: Tensor, wrong: Tensor, labels: Tensor) -> float | None:
    """The mean of ``auc`` over classes, weighted by their wrong labels."""
    total, weight = 0.0, 0
    for label in labels.unique():
        own = labels == label
        found = auc(score[own], wrong[own])
        if found is not None:
            total, weight = total + found * int(wrong[own].sum()), weight + int(wrong[own].sum())
    return total / weight if weight else None


def kept(score: Tensor, labels: Tensor, share: float = 0.9) -> Tensor:
    """Indices (m,) of the samples that stay if the lowest of each class are dropped."""
    rows = []
    for label in labels.unique():
        own = (labels == label).nonzero()[:, 0]
        rows.append(own[score[own].argsort(descending=True)[: round(share * len(own))]])
    return torch.cat(rows)


def judged(score: Tensor, denied: Tensor, useful: Tensor, labels: Tensor) -> Record:
    """What a score is worth: its areas, and shares of the samples that stay. denied, useful:
    (n,) bool, labels that the judge denies, and those of useful samples.
    """
    stay = kept(score, labels)
    return {
        "auc": auc(score, denied),
        "auc_within": auc_within(score, denied, labels),
        "denied": float(denied[stay].float().mean()),
        "useful": float(useful[stay].float().mean()),
    }


def measure(
    practice: DeliberatePractice, learner: nn.Module, omega: float, kappa: float, count: int
) -> Record:
    """The line of one form of guidance."""
    generator = practice.recipe.generator
    sampler = GuidedSampler(
        practice.pipeline,  # type: ignore[arg-type]  # the recipe's
        learner,
        guidance=GuidanceConfig(omega=omega, every=2, anchor=kappa),
        steps=generator.steps,
        cfg_scale=generator.cfg_scale,
        seed=SEED,
        compile=False,  # a compiled step would look its name up no more
    )
    labels = torch.arange(count) % len(practice.pipeline.class_names)
    images, entropies, found = [], [], []
    for start in range(0, count, BATCH):
        rows, trajectory = torch.arange(start, min(start + BATCH, count)), Trajectory()
        with mock.patch.object(step, "guided_step", trajectory.guided_step):
            batch = sampler.generate(labels[rows], rows + FIRST_ID)
        assert batch.latents is not None
        images.append(batch.images)
        entropies.append(batch.entropy)
        found.append(trajectory.scores(batch.latents.float()))
    made = torch.cat(images)
    scores = {name: torch.cat([each[name] for each in found]) for name in found[0]}
    logits = predict(learner, made)
    scores["label loss"] = logits.log_softmax(1)[torch.arange(count), labels]
    agrees = torch.stack(
        [predict(load_judge(number), made).argmax(1) == labels for number in JUDGES]
    )
    wrong = logits.argmax(1) != labels
    line = described(agrees, wrong, scores, labels)
    if not omega:
        line["hardest"] = hardest(torch.cat(entropies), ~agrees[0], wrong)
    settings = {"omega": omega, "kappa": kappa, "cfg_scale": generator.cfg_scale}
    return settings | {"projected": False} | line


def described(agrees: Tensor, wrong: Tensor, scores: dict[str, Tensor], labels: Tensor) -> Record:
    """What the samples (n,) of a form are, in the words of ``dpfast bench guidance``, and what each
    score knows.

    agrees: (judges, n) bool, whether a judge gives a sample its label; a label is denied where the
    first one does not. wrong: (n,) bool, whether the learner gives it another one.
    """
    both, denied = agrees.all(0), ~agrees[0]
    useful = wrong & both
    return {
        "samples": len(labels),
        "agreement": [mean(each.float()) for each in agrees],
        "wrong": mean(wrong.float()),
        "right_of_wrong": [
            mean(each[wrong].float()) if wrong.sum() > 1 else None for each in (*agrees, both)
        ],
        "useful": mean(useful.float()),
        "scores": {name: judged(each, denied, useful, labels) for name, each in scores.items()},
    }


def hardest(entropy: Tensor, denied: Tensor, wrong: Tensor) -> list[Record]:
    """What pruning would keep of samples (n,): for each fraction those of the highest entropy."""
    order = entropy.argsort(descending=True)
    rows = [(keep, order[: max(1, round(keep * len(order)))]) for keep in HARDEST]
    return [
        {
            "keep": keep,
            "denied": float(denied[own].float().mean()),
            "wrong": float(wrong[own].float().mean()),
        }
        for keep, own in rows
    ]


def tables(lines: list[Record]) -> list[str]:
    """The lines of a Markdown table, the newest line of each form."""
    newest = {(line["omega"], line["kappa"]): line for line in lines}
    head = [
        "score",
        "AUC",
        "within a class",
        "wrong labels",
        "of the kept",
        "useful",
        "of the kept",
    ]
    rows = []
    for (omega, kappa), line in newest.items():
        rows.append([f"**omega {omega:g}, kappa {kappa:g}**", *[""] * (len(head) - 1)])
        for name, worth in line["scores"].items():
            areas = [worth["auc"], worth["auc_within"]]
            denied = 1 - line["agreement"][0][0]
            shares = [denied, worth["denied"], line["useful"][0], worth["useful"]]
            rows.append(
                [
                    name,
                    *("" if area is None else f"{area:.2f}" for area in areas),
                    *(f"{share:.1%}" for share in shares),
                ]
            )
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser("evidence", __doc__)
    parser.add_argument(
        "--count", type=at_least(20), default=2500, help="samples of each form (default 2500)"
    )
    add_lines(parser, "form", short="two forms and a learner of few steps")
    options: argparse.Namespace = parser.parse_args(arguments)
    results = lines_file(options.results, RECORDS, only_read=options.tables)
    read_records(results, KINDS, needed=options.tables)
    if not options.tables:
        iterations = 40 if options.short else ITERATIONS
        sizes = BRIEFLY if options.short else {}
        recipe = Recipe.load("fashion", **(LEARNER | sizes), steps=8, iterations=iterations)
        practice = DeliberatePractice(recipe)
        (result,) = practice.run(progress=False)
        learner = result.learner.eval()
        for omega, kappa in FORMS[-2:] if options.short else FORMS:
            record = measure(practice, learner, omega, kappa, options.count)
            timing.append(results, "evidence", [record])
    say("\n".join(tables(read_records(results, KINDS))))
    return 0
