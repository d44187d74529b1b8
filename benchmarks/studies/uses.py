"""Two uses of what a trajectory knows of its label, in the form of the study of anchored guidance.

    dpfast bench uses              # each run a line of benchmarks/results/uses.jsonl
    dpfast bench uses --tables     # beside plain and anchored runs of the same seeds

Samples are guided as by plain dp's best arm; what is known of their labels is "path" of
``benchmarks.studies.evidence``, the sum of c.(x' - x).

    kappa    an anchor by sample: from half of the steps on, kappa is 1 for those of the lower
             half of their class in the batch by the evidence so far, and 0 for the others
    drop     the evidence at birth: a ninth more of each class is made, and the samples of the
             least evidence in their class do not enter the pool

and what tells the evidence from what it comes with:

    random   kappa for a random half of each class in the place of the lower one
    late     kappa for all samples, from half of the steps on
    always   half of kappa for all samples in all guided steps

All arms run six seeds; then all run the others of the study. A run that has a line is skipped. The
plain and anchored runs are those of ``dpfast bench anchored``, whose record has to be there.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.harness.arguments import add_lines, lines_file, new_parser
from benchmarks.harness.records import append_line, read_records
from benchmarks.studies import anchored
from benchmarks.studies.anchored import FULL, SHORT, Design, Run, chosen, runs
from benchmarks.studies.anchored_tables import LINE, interval, paired
from benchmarks.studies.births_tables import BIRTHS
from benchmarks.studies.tables import table
from dpfast.errors import InputError
from dpfast.generate import step
from dpfast.ops import guided_step
from dpfast.samples import SampleBatch
from dpfast.sources.costs import Cost
from dpfast.sources.guided_methods import FromNoise, GuidedRequest, joined
from dpfast.terminal import say

RECORDS = RESULTS / "uses.jsonl"
USES = ("kappa", "drop", "random", "late", "always")
KAPPA = 1.0
MORE = 9  # one more sample for each so many of a class: a tenth of what is made
FIRST_ID = 1 << 40  # of the samples beyond a round's own
KINDS = {**LINE, "births": BIRTHS}
Line = dict[str, Any]


class Evidence:
    """Stands in for ``guided_step`` while samples are made, and sums the evidence of each.

    use: of ``USES``; labels: (B,) of the samples that are being made, None for others, which stay
    as they are; half: the first step of the second half; path: (B,) of the last ones.
    """

    def __init__(self, use: str, steps: int) -> None:
        self.use, self.half = use, steps // 2
        self.labels: Tensor | None = None
        self.path = self._drawn = torch.empty(0)
        self._chance = torch.Generator().manual_seed(0)

    def anchor(self, number: int, labels: Tensor) -> Tensor | None:
        """The kappas (B,) of a guided step; None: the paper's."""
        if self.use == "always":
            return torch.full((len(labels),), KAPPA / 2)
        if self.use == "drop" or number < self.half:
            return None
        if self.use == "late":
            return torch.full((len(labels),), KAPPA)
        score = self.path if self.use == "kappa" else self._drawn
        return KAPPA * lower_half(score, labels).float()

    def guided_step(
        self,
        x: Tensor,
        cond: Tensor,
        uncond: Tensor,
        grad: Tensor | None,
        rows: Tensor,
        index: Tensor,
        **options: Any,
    ) -> Tensor:
        if self.labels is None:
            return guided_step(x, cond, uncond, grad, rows, index, **options)
        assert options["prediction"] == "v"
        number, before = int(index), x.clone()
        if number == 0:
            self.path = torch.zeros(len(x))
            self._drawn = torch.rand(len(x), generator=self._chance)
        if grad is not None:
            options["anchor"] = self.anchor(number, self.labels)
        following = guided_step(x, cond, uncond, grad, rows, index, **options)
        alpha, sigma = rows[number, :2]
        c = alpha / sigma * (uncond - cond)  # eps = sigma x + alpha v
        self.path += (c * (following - before)).flatten(1).sum(1)
        return following


def lower_half(score: Tensor, labels: Tensor) -> Tensor:
    """Which samples (B,) lie below the median of their class in the batch."""
    below = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        own = labels == label
        below[own] = score[own] < score[own].quantile(0.5)
    return below


def with_more(labels: Tensor) -> Tensor:
    """The labels (n,) of a round and, behind them, one more for each ``MORE`` of a class, the last
    of them begun.
    """
    more = [label.repeat(-(-int((labels == label).sum()) // MORE)) for label in labels.unique()]
    return torch.cat([labels, *more])


def most_evident(score: Tensor, made: Tensor, wanted: Tensor) -> Tensor:
    """Rows (n,) of the samples with labels ``made`` (m,) that stay, in the order of the labels
    ``wanted`` (n,): those of the highest scores of each class.
    """
    rows = torch.empty_like(wanted)
    for label in wanted.unique():
        places, own = (wanted == label).nonzero()[:, 0], (made == label).nonzero()[:, 0]
        rows[places] = own[score[own].argsort(descending=True, stable=True)[: len(places)]]
    return rows


def made_by(use: str, watch: Evidence) -> Any:
    """``FromNoise.make`` with a use of the evidence."""

    def make(method: FromNoise, request: GuidedRequest, cost: Cost) -> Iterator[SampleBatch]:
        rest = request.rest(method.batch)
        wanted, ids = request.labels[rest], request.start + rest
        labels = wanted
        if use == "drop":
            labels = with_more(wanted)
            ids = torch.cat([ids, FIRST_ID + request.start + torch.arange(len(labels) - len(ids))])
        price = method.prices.at(request.cfg_scale)
        batches, evidence = [], []
        for first in range(0, len(labels), method.batch):
            part = labels[first : first + method.batch]
            watch.labels = part
            stream = method.sampler.stream(
                part,
                sample_ids=ids[first : first + method.batch],
                batch_size=method.batch,
                **request.strengths.rows(part),
                cfg_scale=request.cfg_scale,
                learner_step=request.learner_step,
            )
            (batch,) = cost.timed(stream, price)
            watch.labels = None
            batches.append(batch)
            evidence.append(watch.path)
        made = joined(batches)
        yield (
            made.take(most_evident(torch.cat(evidence), labels, wanted)) if use == "drop" else made
        )

    return make


@contextlib.contextmanager
def used(use: str, steps: int) -> Iterator[Evidence]:
    """Runs of the source "dp" make their guided samples with a use of the evidence meanwhile."""
    watch = Evidence(use, steps)
    with (
        mock.patch.object(step, "guided_step", watch.guided_step),
        mock.patch.object(FromNoise, "make", made_by(use, watch)),
    ):
        yield watch


def wanted_runs(use: str, lines: Sequence[Line], design: Design) -> Iterator[Run]:
    """The runs of a use: those of plain dp's best arm. Raises ``InputError`` where the selection
    has not chosen it yet.
    """
    if chosen("dp", lines, design) is None:
        raise InputError("plain dp's best omega is not known: run dpfast bench anchored first")
    for run in runs("confirmation", lines, design):
        if (run.kind, run.size) == ("dp", design.sizes[0]):
            yield replace(run, part="uses", arm=use, shifts=False)


def measure(run: Run) -> Line:
    """The line of a run. Raises ``InputError`` where no step of a guided sample was seen."""
    with used(run.arm, run.fields["steps"]) as watch:
        line = anchored.measure(run)
    if not len(watch.path):
        raise InputError(f"use {run.arm}: its sampler compiled the step that was to be watched")
    return line


def tables(lines: Sequence[Line], others: Sequence[Line]) -> Iterator[str]:
    """The lines of Markdown tables: each use, and its differences to plain dp and anchored runs of
    the same seeds, that of "kappa" to its control as well. others: lines of ``dpfast bench
    anchored`` of the chosen arms at that size.
    """
    by_kind = {
        kind: {line["seed"]: line for line in others if line["kind"] == kind}
        for kind in ("dp", "anchored")
    }
    by_use = {use: {line["seed"]: line for line in lines if line["arm"] == use} for use in USES}
    rows, differences = [], []
    for use, found in by_use.items():
        if not found:
            continue
        rows.append([use, *_described(list(found.values()))])
        control = {"random": by_use["random"]} if use == "kappa" else {}
        for kind, beside in {**by_kind, **control}.items():
            first, second = (
                {seed: 100 * line["test_accuracy"] for seed, line in each.items()}
                for each in (found, beside)
            )
            values = paired(first, second)
            if len(values) > 1:
                middle, low, high = interval(values)
                wins = f"{sum(value > 0 for value in values)} of {len(values)}"
                told = [f"{middle:+.2f}", f"{low:+.2f} to {high:+.2f}", wins]
                differences.append([f"{use} - {kind}", *told])
    seeds = {seed for found in by_use.values() for seed in found}
    for kind, beside in by_kind.items():
        same = [line for seed, line in beside.items() if seed in seeds]
        if same:
            rows.append([kind, *_described(same)])
    head = ["", "seeds", "held-out, %", "judges agree, %", "useful, %", "TFLOPs of generation"]
    yield from table(head, rows)
    yield from table(["difference, points", "mean", "95 % interval", "better in"], differences)


def _described(lines: Sequence[Line]) -> list[str]:
    def mean(values: Sequence[float], of: float = 100) -> str:
        return f"{of * sum(values) / len(values):.2f}" if values else ""

    added = [line["births"]["added"] for line in lines if line.get("births")]
    return [
        str(len(lines)),
        mean([line["test_accuracy"] for line in lines]),
        *(mean([each[name] for each in added]) for name in ("agreed", "useful")),
        mean([line["flops"] for line in lines], 1e-12),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser("uses", __doc__)
    parser.add_argument(
        "--use", choices=USES, action="append", help="may be repeated; default: all"
    )
    parser.add_argument(
        "--study", type=Path, metavar="FILE", help="record of dpfast bench anchored, if another"
    )
    add_lines(parser, "run", short="few samples and few iterations")
    options: argparse.Namespace = parser.parse_args(arguments)
    design = SHORT if options.short else FULL
    results = lines_file(options.results, RECORDS, only_read=options.tables)
    study = anchored.read(lines_file(options.study, anchored.RECORDS, only_read=True), needed=True)
    lines = read_records(results, KINDS, needed=options.tables)
    if not options.tables:
        asked = [run for use in options.use or USES for run in wanted_runs(use, study, design)]
        _, few = design.seeds["confirmation"]
        for run in sorted(asked, key=lambda run: run.fields["seed"] not in few):
            lines = read_records(results, KINDS)  # of other processes too
            if (run.arm, run.fields) in [(each["arm"], each["fields"]) for each in lines]:
                continue
            append_line(results, measure(run))
        lines = read_records(results, KINDS)
    best = {kind: chosen(kind, study, design) for kind in ("dp", "anchored")}
    others = [
        line
        for line in study
        if (line["part"], line["size"]) == ("confirmation", design.sizes[0])
        and line["arm"] == best.get(line["kind"])
    ]
    say("\n".join(tables(lines, others)))
    return 0
