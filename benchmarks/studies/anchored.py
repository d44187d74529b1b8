"""The study of anchored guidance: chosen on some seeds, confirmed on others, paired and resumable.

    dpfast bench anchored --part selection --workers 2
    dpfast bench anchored --tables --figure docs/images/anchored.png

    selection      arms of every kind at the middle size; of each kind the one of the highest
                   validation accuracy goes on, of "late" to the replication; static runs of
                   the same seeds, for their gains
    confirmation   static, plain dp, dp with more CFG, anchored, anchored late, and prune on other
                   seeds, at all sizes, the middle one first; additions after the same steps
                   (``add_at``) in all
    replication    plain dp, the late arm that the selection chose, and the one that was found
                   before, at the middle size, on seeds that no earlier part has
    patience       the arms of the confirmation at the middle size, each adding by its own patience

"late" has an anchor in the last steps alone. Its first arm was a control of ``dpfast bench uses``,
on the first six seeds of the confirmation, which runs it (``FOUND``) whatever the selection says;
late arms joined the selection after that.

Every finished run is one line of ``benchmarks/results/anchored.jsonl``, appended by the process
that deals the runs; workers with one thread each make them, so that a line does not depend on what
runs beside it, its seconds apart. A run that has a line is skipped, so a study that
was killed loses the runs that were running.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import RESULTS
from benchmarks.harness.arguments import add_lines, lines_file, new_parser
from benchmarks.harness.processes import command
from benchmarks.harness.records import append_line, check_picture, read_records
from benchmarks.studies.anchored_tables import KINDS, LINE, anchored_tables, figure, of_seeds
from benchmarks.studies.births import Births
from benchmarks.studies.births_tables import BIRTHS, births_tables
from benchmarks.studies.settings import COMMON, Fields, late, recipe_of
from benchmarks.studies.study import Curve, cached, line_of, shared
from dpfast.cli.parser import at_least
from dpfast.config import Recipe
from dpfast.errors import InputError
from dpfast.planning.training import count_training
from dpfast.practice.experiment import DeliberatePractice
from dpfast.terminal import say
from dpfast.textfiles import NUMBER

RECORDS = RESULTS / "anchored.jsonl"
OMEGAS = (0.05, 0.08, 0.12)
CFG_SCALES = (2.5, 3.5)
ANCHORS, ANCHORED_OMEGAS = (0.5, 1.0), (0.08, 0.12, 0.2)
FOUND = "omega 0.12, kappa 1 late"
LATE_OMEGAS, LATE_KAPPAS, LATE_BEGINS = (0.12, 0.2, 0.3), (0.5, 1.0, 2.0), (0.25, 0.75)
# kinds of a part in the order in which a seed runs them; prune, the dearest, when others are there
GROUPS = {
    "confirmation": (("static", "dp", "cfg", "anchored", "late"), ("prune",)),
    "replication": (("dp", "late", "found"),),
    "patience": (("dp", "cfg", "anchored", "late"), ("prune",)),  # static adds nothing
}
PARTS = ("selection", *GROUPS)
LINE_KNOWN = {"births": BIRTHS, "nearest": NUMBER.or_null()}
ITERATIONS = 1200
MOMENTS = (250, 350, 450, 550, 650, 750)  # steps of ``ITERATIONS`` after which a round is added
Line = dict[str, Any]


@dataclass(frozen=True)
class Design:
    """sizes: samples, the middle one first; selection: its seeds; seeds: of each other part those
    at the middle size and those at the others.
    """

    iterations: int
    sizes: tuple[int, ...]
    selection: Sequence[int]
    seeds: Mapping[str, tuple[Sequence[int], Sequence[int]]]

    @property
    def moments(self) -> list[int]:
        """The steps after which rounds are added."""
        return [step * self.iterations // ITERATIONS for step in MOMENTS]


FULL = Design(
    ITERATIONS,
    (2000, 1000, 500, 4000, 8000),
    range(3),
    {
        "confirmation": (range(3, 15), range(3, 9)),
        "replication": (range(15, 27), ()),
        "patience": (range(3, 9), ()),
    },
)
SHORT = Design(
    40,
    (80, 160),
    range(1),
    {
        "confirmation": (range(3, 5), range(3, 4)),
        "replication": (range(5, 6), ()),
        "patience": (range(3, 4), ()),
    },
)


@dataclass(frozen=True)
class Run:
    """One line to be. kind: of ``KINDS``; arm: what tells it from others of its kind; shifts:
    whether the shifted held-out images are measured too, which takes a quarter of a run's seconds.
    """

    part: str
    kind: str
    arm: str
    size: int
    shifts: bool
    fields: Fields

    @property
    def made_from(self) -> tuple[Recipe, int]:
        """Whose unguided samples it shares, and how many."""
        return recipe_of({name: self.fields[name] for name in ("seed", "steps")}), self.size


def arms(kind: str, lines: Sequence[Line], design: Design) -> dict[str, Fields]:
    """Name -> fields of the arms of a kind that the selection compares. Those of more CFG are known
    when plain dp's best is; late ones that begin elsewhere when the best of the half is.
    """
    if kind == "dp":
        return {f"omega {omega:g}": {"omega": omega} for omega in OMEGAS}
    if kind == "cfg":
        best = chosen("dp", lines, design)
        if best is None:
            return {}
        plain = arms("dp", lines, design)[best]
        return {
            f"{best}, CFG {scale:g}": {**plain, "cfg_scale_rounds": [scale]} for scale in CFG_SCALES
        }
    if kind == "anchored":
        return {
            f"omega {omega:g}, kappa {kappa:g}": {"omega": omega, "anchor": kappa}
            for omega in ANCHORED_OMEGAS
            for kappa in ANCHORS
        }
    if kind == "found":
        return {FOUND: arms("late", (), design)[FOUND]}
    if kind == "late":
        half = {
            f"omega {omega:g}, kappa {kappa:g} late": {
                "omega": omega,
                "anchor": kappa,
                "anchor_schedule": late(),
            }
            for omega in LATE_OMEGAS
            for kappa in LATE_KAPPAS
        }
        best = _best(kind, half, lines, design)
        if best is None:
            return half
        return half | {
            f"{best} from {begin:g}": {**half[best], "anchor_schedule": late(begin)}
            for begin in LATE_BEGINS
        }
    return {kind: {}}


def chosen(kind: str, lines: Sequence[Line], design: Design) -> str | None:
    """The arm of a kind with the highest mean validation accuracy over the seeds of the selection;
    None until all of them ran.
    """
    if kind in ("static", "prune"):
        return kind
    if kind == "found":
        return FOUND
    return _best(kind, arms(kind, lines, design), lines, design)


def compared(kind: str, part: str, lines: Sequence[Line], design: Design) -> str | None:
    """The arm of a kind that a part compares; None until it is known."""
    if kind == "late" and part in ("confirmation", "patience"):
        return FOUND
    return chosen(kind, lines, design)


def compared_arms(lines: Sequence[Line], design: Design) -> dict[str, dict[str, str | None]]:
    """Part -> kind -> the arm of its tables."""
    return {part: {kind: compared(kind, part, lines, design) for kind in KINDS} for part in PARTS}


def _best(kind: str, names: Iterable[str], lines: Sequence[Line], design: Design) -> str | None:
    found = {}
    for name in names:
        by_seed = {
            line["seed"]: line["validation_accuracy"]
            for line in lines
            if (line["part"], line["size"]) == ("selection", design.sizes[0])
            and (line["kind"], line["arm"]) == (kind, name)
        }
        if not by_seed.keys() >= {*design.selection}:
            return None
        found[name] = mean(by_seed[seed] for seed in design.selection)
    return max(found, key=found.__getitem__, default=None)


def runs(part: str, lines: Sequence[Line], design: Design) -> Iterator[Run]:
    """The runs of a part in their order, as far as ``lines`` say which they are."""
    middle = design.sizes[0]
    if part == "selection":
        for kind in ("dp", "cfg", "anchored", "late", "static"):
            for name, fields in arms(kind, lines, design).items():
                for seed in design.selection:
                    yield _run(part, kind, name, middle, seed, fields, design)
        return
    at_middle, elsewhere = design.seeds[part]
    for kinds in GROUPS[part]:
        for size in design.sizes:
            for seed in at_middle if size == middle else elsewhere:
                for kind in kinds:
                    best = compared(kind, part, lines, design)
                    if best is not None:
                        fields = arms(kind, lines, design)[best]
                        yield _run(part, kind, best, size, seed, fields, design)


def _run(
    part: str, kind: str, name: str, size: int, seed: int, fields: Fields, design: Design
) -> Run:
    """A run of a quarter of its samples at the start and the rest in equal rounds."""
    initial = size // 4
    shape = {
        "sources": kind if kind in ("static", "prune") else "dp",
        "maximum_samples": size,
        "initial_samples": initial,
        "round_samples": -(-(size - initial) // len(MOMENTS)),
        "iterations": design.iterations,
        "seed": seed,
    }
    if part != "patience":
        shape["add_at"] = design.moments
    shifts = part == "confirmation" and size == design.sizes[0]
    recorded = json.loads(json.dumps({**COMMON, **shape, **fields}))  # as its line will hold them
    return Run(part, kind, name, size, shifts, recorded)


def measure(run: Run) -> Line:
    """The line of a run, which this process makes."""
    sets = "shifts" if run.shifts else ""
    recipe, curve = recipe_of(run.fields | {"evaluation": sets}), Curve()
    practice = DeliberatePractice(recipe, unguided=shared(*run.made_from))
    births = Births(practice)
    (result,) = practice.run(progress=False, callbacks=[curve, births])
    shifts: dict[str, list[float]] = {}
    for row in result.sets:
        shifts.setdefault(row.name, []).append(row.result.top1)
    learner, image = recipe.learner, practice.real.validation.images.shape[1:]
    step = count_training(learner, len(practice.real.classes), tuple(image), half=False)
    return {
        "part": run.part,
        "kind": run.kind,
        "arm": run.arm,
        "size": run.size,
        **line_of(recipe, result, curve),
        "training_flops": step.flops * learner.batch_size * result.iterations,
        "calibration_error": result.test.calibration_error,
        "test_loss": result.test.loss,
        "shifts": {name: round(mean(each), 5) for name, each in shifts.items()},
        "shifts_calibration_error": _mean([row.result.calibration_error for row in result.sets]),
        "births": births.measured(),
        "fields": run.fields,
    }


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def serve() -> None:
    """Answers every run on a line of the standard input with its line."""
    for asked in sys.stdin:
        print(json.dumps(measure(Run(**json.loads(asked)))), flush=True)


class Worker:
    """A process with one thread that makes runs, one after the other."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            command("benchmarks.studies.anchored"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def measure(self, run: Run) -> Line:
        """The line of a run. Raises ``InputError`` where the process ends before."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(vars(run)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            code = self.process.wait()
            raise InputError(f"run {json.dumps(run.fields)}: its process ended with {code}")
        line: Line = json.loads(answer)
        return line

    def close(self) -> None:
        """Ends the process, with the run that it is at."""
        self.process.terminate()
        self.process.communicate()


def deal(parts: Sequence[str], results: Path, design: Design, workers: int) -> None:
    """Runs what has no line yet, so many at a time, and appends a line as soon as one ends."""
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(workers))
        idle: list[Worker] = []
        for _ in range(workers):
            idle.append(Worker())
            stack.callback(idle[-1].close)
        running: dict[Future[Line], tuple[Run, Worker]] = {}
        while True:
            begun = [run for run, _ in running.values()]
            for run in _next(parts, read(results), design, begun)[: len(idle)]:
                worker = idle.pop()
                running[threads.submit(worker.measure, run)] = (run, worker)
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                idle.append(running.pop(future)[1])
                append_line(results, future.result())


def _next(
    parts: Sequence[str], lines: Sequence[Line], design: Design, running: list[Run]
) -> list[Run]:
    """What may begin now, in order: of runs that share unguided samples one makes them."""
    begun = [run.fields for run in running]
    making = {cached(*run.made_from) for run in running}
    found = []
    for run in (run for part in parts for run in left(part, lines, design)):
        file = cached(*run.made_from)
        if run.fields not in begun and (file.is_file() or file not in making):
            making.add(file)
            found.append(run)
    return found


def left(part: str, lines: Sequence[Line], design: Design) -> list[Run]:
    """The runs of a part that have no line yet, as far as they are known."""
    taken = [line["fields"] for line in lines]
    return [run for run in runs(part, lines, design) if run.fields not in taken]


def read(results: Path, *, needed: bool = False) -> list[Line]:
    """The lines so far. needed: whether there has to be a file. Raises ``InputError`` as
    ``read_records`` does.
    """
    return read_records(results, LINE, LINE_KNOWN, needed=needed)


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser("anchored", __doc__)
    parser.add_argument(
        "--part", choices=PARTS, action="append", help="may be repeated; default: all"
    )
    parser.add_argument(
        "--workers", type=at_least(1), default=1, help="runs at a time, of one thread each"
    )
    add_lines(parser, "run", short="two small sizes and few iterations")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="draw the confirmation so far, and run nothing"
    )
    options = parser.parse_args(arguments)
    if options.figure is not None:
        check_picture("figure", options.figure)
    only_read = options.tables or options.figure is not None
    design = SHORT if options.short else FULL
    parts = options.part or PARTS
    results = lines_file(options.results, RECORDS, only_read=only_read)
    lines = read(results, needed=only_read)
    if not only_read:
        deal(parts, results, design, options.workers)
        return 0
    best = compared_arms(lines, design)
    if options.figure is not None:
        figure(lines, best["confirmation"]).savefig(options.figure, dpi=110)
    if not options.tables:
        return 0
    missing = {part: [run.kind for run in left(part, lines, design)] for part in PARTS}
    say("\n".join([*anchored_tables(lines, best, missing), *births_tables(of_seeds(lines))]))
    return 0


if __name__ == "__main__":
    serve()
