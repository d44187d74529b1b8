"""From the published way of guiding to dpfast, one change at a time: `dpfast bench sampler`.

All rows make the same samples (labels, ids and noise) of the embedded generator, guided by one learner, and take turns
in one process with a matrix product among them. Rows that differ from the one above in execution alone make the same
images; for the others the table says what the change does to entropy, label agreement and gradient.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import timing
from benchmarks.naive import Batched, Models, Predecessor
from dpfast import roofline
from dpfast.config import Learner
from dpfast.data.real import load_real
from dpfast.evaluate.measures import predict
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.runtime.memory import peak_bytes
from dpfast.generate.sampler import GuidedSampler
from dpfast.learn.models import build_learner, load_judge
from dpfast.learn.trainer import Trainer
from dpfast.ops import entropy
from dpfast.practice.learners import load_learner

RESULTS = Path(__file__).parent / "results" / "sampler.jsonl"
STEPS, EVERY, OMEGA, CFG = 20, 5, 0.03, 1.5
FEW = {"steps": 8, "every": 2, "omega": 0.028}  # the fewest of DPM-Solver++ that keep entropy and agreement: --search
CFG_UNTIL = 0.8
ALONE = 8  # samples a round of a row that makes them one by one
FIRST_ID = 1 << 41  # ids that no run uses
GEMM, PRODUCTS = 1024, 10
Make = Callable[[Tensor, Tensor], Tensor]
Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]
Record = dict[str, Any]


@dataclass(kw_only=True)
class Row:
    """One way to make guided samples. make: (labels, ids) to uint8 images; gradient: (x, t, labels) to its own."""

    name: str
    make: Make
    unguided: Make
    gradient: Gradient
    method: roofline.Method
    alone: bool = False
    eager: bool = True
    side: bool = False  # for comparison: the next row does not build on it
    seconds: list[float] = field(default_factory=list)  # of one guided sample, one entry a round
    seconds_unguided: list[float] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)


class Bench:
    """The generator, the learner that guides, and the rows over both."""

    def __init__(self, learner: str | None, folder: Path, *, compile: bool = True) -> None:
        self.pipeline = Pipeline.from_pretrained("fashion")
        self.learner = quick_learner() if learner is None else load_learner(learner, self.pipeline)
        self.models = Models.load(self.pipeline.folder, self.learner)
        self.judge = load_judge()
        self.folder, self.compile = folder, compile

    def naive(self) -> Row:
        guided, plain = (
            Predecessor(self.models, self.folder / name, steps=STEPS, every=EVERY, omega=omega, cfg_scale=CFG)
            for name, omega in (("guided", OMEGA), ("unguided", 0.0))
        )
        gradient = self._gradient(Batched(models=self.models, blend=True, decoder="full"))
        return Row(
            name="(a) the predecessor: batch 1, files",
            make=guided.generate,
            unguided=plain.generate,
            gradient=gradient,
            method=roofline.Method(steps=STEPS, guided=_guided(STEPS, EVERY), gradient="extra", tiny=False),
            alone=True,
        )

    def plain(self, name: str, *, side: bool = False, **options: Any) -> Row:
        """Plain diffusers code in a batch."""
        options = {"models": self.models, "steps": STEPS, "every": EVERY, "omega": OMEGA, "cfg_scale": CFG, **options}
        guided, plain = Batched(**options), Batched(**options | {"omega": 0.0})
        if options.get("compile"):  # one compilation serves both
            plain._predict, plain._decode = guided._predict, guided._decode
        return Row(
            name=name,
            make=guided.generate,
            unguided=plain.generate,
            gradient=self._gradient(guided),
            method=roofline.Method(
                steps=guided.steps,
                guided=_guided(guided.steps, guided.every),
                cfg_steps=round(guided.cfg_until * guided.steps),
                gradient="shared" if guided.share else "extra",
                tiny=guided.decoder == "tiny",
            ),
            eager=not guided.compile,
            side=side,
        )

    def _gradient(self, plain: Batched) -> Gradient:
        return lambda x, t, labels: plain.gradient(x, t, labels, *self.models.scales(t))[0]

    def sampler(self, *, compile: bool, steps: int = STEPS, every: int = EVERY, omega: float = OMEGA, **options: Any):
        guidance = GuidanceConfig(omega=omega, every=every)
        return GuidedSampler(
            self.pipeline, self.learner, guidance=guidance, steps=steps, cfg_scale=CFG, compile=compile, **options
        )

    def ours(self, name: str, *, compile: bool, **options: Any) -> Row:
        sampler = self.sampler(compile=compile, **options)
        path = sampler.execution.parts.path
        assert path is not None

        def gradient(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return path.gradient(x, t, labels, *self.models.scales(t))[0]

        return Row(
            name=name,
            make=lambda labels, ids: sampler.generate(labels, ids).images,
            unguided=lambda labels, ids: sampler.generate(labels, ids, omega=0.0).images,
            gradient=gradient,
            method=roofline.Method(steps=len(sampler.table), guided=len(sampler.guidance.steps(len(sampler.table)))),
            eager=not compile,
        )

    def rows(self) -> list[Row]:
        few = FEW | {"solver": "dpmpp2m"}
        rows = [
            self.naive(),
            self.plain("+ batching, no files", share=False, decoder="full", blend=True),
            self.plain("+ shared conditional forward", decoder="full", blend=True),
            self.plain("+ the entropy of x0 itself", decoder="full"),
            self.plain("(b) + tiny decoder"),
            self.plain("    the same, guided in every step", side=True, every=1, omega=OMEGA / EVERY),
            self.plain(f"    the same, CFG until {CFG_UNTIL:.0%}", side=True, cfg_until=CFG_UNTIL),
            self.plain(f"+ DPM-Solver++ 2M, {FEW['steps']} steps", **few),
            self.ours("+ fused operations (dpfast)", compile=False, **few),
            self.ours(f"dpfast, {STEPS} DDIM steps, eager", compile=False),
        ]
        if self.compile:
            rows[9:9] = [self.ours("+ compile (dpfast)", compile=True, **few)]
            rows += [
                self.plain(f"(c) torch.compile of (b), {STEPS} DDIM steps", compile=True),
                self.ours(f"dpfast, {STEPS} DDIM steps, compiled", compile=True),
            ]
        return rows

    def states(self, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(x, t) of the guided steps of a trajectory with the exact gradient."""
        exact = Batched(models=self.models, steps=STEPS, every=EVERY, omega=OMEGA, cfg_scale=CFG, decoder="full")
        seen, gradient = [], exact.gradient

        def recorded(x: Tensor, t: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            seen.append((x, t))
            return gradient(x, t, *rest)

        exact.gradient = recorded  # type: ignore[method-assign]
        exact.latents(labels, FIRST_ID + torch.arange(len(labels)))
        return seen

    def cosines(self, rows: list[Row], samples: int = 64) -> list[float]:
        """The mean over samples and guided steps of each row's cosine to the exact full-decoder gradient."""
        labels = torch.arange(samples) % 10
        exact = self._gradient(Batched(models=self.models, decoder="full"))
        totals = [0.0] * len(rows)
        states = self.states(labels)
        with torch.no_grad():
            for x, t in states:
                truth = exact(x, t, labels).flatten(1)
                for i, row in enumerate(rows):
                    cosine = torch.cosine_similarity(row.gradient(x, t, labels).flatten(1), truth)
                    totals[i] += float(cosine.mean()) / len(states)
        return totals

    def work(self) -> roofline.Work:
        """FLOPs of the parts of a sample."""
        models, x, t = self.models, torch.randn(1, 4, 8, 8), torch.tensor(500)
        return roofline.Work(
            name="fashion",
            denoiser=roofline.count(lambda x: models.predict(x, t, torch.zeros(1, dtype=torch.int64)), x),
            decoder=roofline.count(models.decode, x),
            tiny=roofline.count(lambda x: models.tiny.decode(x).sample, x),
            learner=roofline.count(self.learner, torch.zeros(1, 1, 32, 32)),
        )

    def quality(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Entropy under the learner and agreement of the judge with the label, of each image."""
        hits = predict(self.judge, images).argmax(1) == labels
        return entropy(predict(self.learner, images)), hits.float()


def quick_learner(iterations: int = 250) -> torch.nn.Module:
    """A learner in the middle of its training: 250 steps on real validation images, about 15 s on two cores."""
    torch.manual_seed(0)
    options = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1], "groups_width": 128}
    model = build_learner(Learner().model, classes=10, channels=1, layer_type="x", **options)
    trainer = Trainer(model, Learner(lr=2e-3), iterations=iterations)
    real = load_real("fashion").validation
    for step in range(iterations):
        chosen = torch.arange(step * 64, (step + 1) * 64) % len(real)
        trainer.step(real.images[chosen].float().div(127.5).sub(1), real.labels[chosen])
    return trainer.ema.module.eval().requires_grad_(False)


def _guided(steps: int, every: int) -> int:
    return -(-steps // every)


def _timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    out = call()
    return time.perf_counter() - start, out


def _batch(number: int, size: int) -> tuple[Tensor, Tensor]:
    ids = torch.arange(number * size, (number + 1) * size)
    return ids % 10, FIRST_ID + ids


def measure(bench: Bench, rows: list[Row], rounds: int, batch: int) -> list[float]:
    """Fills in the rows' seconds and images; returns the FLOP/s of the matrix product, one entry a round."""
    a, b = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)
    rates = []
    for number in range(rounds):
        labels, ids = _batch(number, batch)
        start = time.perf_counter()
        for _ in range(PRODUCTS):
            a @ b
        rates.append(PRODUCTS * 2 * GEMM**3 / (time.perf_counter() - start))
        for row in rows:
            size = ALONE if row.alone else batch
            seconds, images = _timed(lambda: row.make(labels[:size], ids[:size]))  # noqa: B023  called at once
            row.seconds.append(seconds / size)
            row.images.append(images)
            seconds, _ = _timed(lambda: row.unguided(labels[:size], ids[:size]))  # noqa: B023
            row.seconds_unguided.append(seconds / size)
    return rates


def host_share(bench: Bench, batch: int) -> float:
    """The share of a compiled trajectory that passes outside the compiled code. The profiler itself adds to it."""
    sampler = bench.sampler(compile=True)
    labels, ids = _batch(0, batch)
    sampler.generate(labels, ids)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        seconds, _ = _timed(lambda: sampler.generate(labels, ids).images)
    inside = sum(event.cpu_time_total for event in trace.key_averages() if "CompiledFxGraph" in event.key)
    return 1 - inside / 1e6 / seconds


def _mean(values: Tensor) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def records(bench: Bench, rows: list[Row], rates: list[float], batch: int) -> list[Record]:
    gemm = statistics.median(rates)
    reference = next(row for row in rows if row.name.startswith("(b)"))
    base = bench.quality(torch.cat(reference.images), torch.cat([_batch(n, batch)[0] for n in range(len(rates))]))
    first, previous = rows[0], None
    made = []
    for row, cosine in zip(rows, bench.cosines(rows), strict=True):
        size = ALONE if row.alone else batch
        kept = torch.cat([n * batch + torch.arange(size) for n in range(len(rates))])
        labels = kept % 10
        values, hits = bench.quality(torch.cat(row.images), labels)
        change = _mean(values - base[0][kept])
        mean = float(base[0][kept].mean())
        made.append(
            {
                "row": row.name,
                "side": row.side,
                "batch": 1 if row.alone else batch,
                "samples_per_second": {"median": 1 / statistics.median(row.seconds), "best": 1 / min(row.seconds)},
                "unguided_samples_per_second": 1 / statistics.median(row.seconds_unguided),
                # Ratios are medians over rounds of the ratio within a round.
                "cost": _ratio(row.seconds, row.seconds_unguided),
                "over_predecessor": _ratio(first.seconds, row.seconds),
                "over_previous": None if previous is None else _ratio(previous.seconds, row.seconds),
                "over_b": _ratio(reference.seconds, row.seconds),
                "samples": len(values),
                "entropy": _mean(values),
                "entropy_change": (change[0] / mean, change[1] / mean),  # against (b), sample by sample
                "agreement": _mean(hits),
                "agreement_change": _mean(hits - base[1][kept]),
                "cosine": cosine,
                "gemm": gemm,
            }
        )
        previous = previous if row.side else row
    return made


def _ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def work(bench: Bench, rows: list[Row], made: list[Record], batch: int) -> None:
    """Adds the peak memory of eager rows, and of all the share of the matrix product's rate, by its parts' FLOPs."""
    labels, ids = _batch(0, batch)
    parts = bench.work()
    for row, record in zip(rows, made, strict=True):
        if row.eager:
            size = 1 if row.alone else batch
            record["peak_bytes"] = peak_bytes(functools.partial(row.make, labels[:size], ids[:size]))
        record["flops"], record["flops_unguided"] = row.method.total(parts), row.method.unguided(parts)
        rates = record["samples_per_second"]["median"], record["unguided_samples_per_second"]
        record["share_of_gemm"] = record["flops"] * rates[0] / record["gemm"]
        record["share_of_gemm_unguided"] = record["flops_unguided"] * rates[1] / record["gemm"]


def table(made: list[Record]) -> str:
    header = (
        "", "samples/s median (best)", "guided / unguided", "over (a)", "entropy, nats", "label agreement",
        "cosine to exact", "share of GEMM", "peak memory",
    )  # fmt: skip
    lines = [header, ("---",) * len(header)]
    for record in made:
        rate, peak = record["samples_per_second"], record.get("peak_bytes")
        points = 100 * record["agreement_change"][0]
        share = record.get("share_of_gemm")
        lines.append(
            (
                record["row"].replace("    ", "&nbsp;&nbsp;"),
                f"{rate['median']:.1f} ({rate['best']:.1f})",
                f"{record['cost']:.2f}",
                f"{record['over_predecessor']:.1f}x",
                f"{record['entropy'][0]:.3f} ± {record['entropy'][1]:.3f} ({record['entropy_change'][0]:+.1%})",
                f"{record['agreement'][0]:.1%} ± {record['agreement'][1]:.1%} ({points:+.1f})",
                f"{record['cosine']:.3f}",
                "" if share is None else f"{share:.0%}",
                "" if peak is None else f"{peak / 1e6:.0f} MB",
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def search(bench: Bench, samples: int) -> str:
    """Fewer steps of both solvers against the reference: does entropy stay within 5 %, agreement within a point?"""
    tried: list[Record] = [{"solver": "ddim", "steps": STEPS, "every": EVERY, "omega": OMEGA}]
    tried += [
        {"solver": "dpmpp2m", "steps": steps, "every": every, "omega": omega}
        for steps, every, omega in ((12, 3, 0.029), (10, 3, 0.027), (8, 2, 0.028), (7, 2, 0.03), (6, 2, 0.036))
    ]
    tried += [
        {"solver": "ddim", "steps": steps, "every": 2, "omega": omega} for steps, omega in ((8, 0.033), (7, 0.03))
    ]
    labels, ids = torch.arange(samples) % 10, FIRST_ID + torch.arange(samples)
    lines = ["| solver | steps | guided every | omega | entropy, nats | agreement |", "|---|---|---|---|---|---|"]
    base: tuple[Tensor, Tensor] | None = None
    for options in tried:
        sampler = bench.sampler(compile=False, **options)
        batches = sampler.stream(labels, sample_ids=ids, batch_size=128)
        values, hits = bench.quality(torch.cat([batch.images for batch in batches]), labels)
        base = base or (values, hits)
        (change, error), mean = _mean(values - base[0]), float(base[0].mean())
        points, points_error = _mean(hits - base[1])
        lines.append(
            f"| {options['solver']} | {options['steps']} | {options['every']} | {options['omega']:g} "
            f"| {values.mean():.3f} ({change / mean:+.1%} ± {error / mean:.1%}) "
            f"| {hits.mean():.1%} ({100 * points:+.1f} ± {100 * points_error:.1f}) |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dpfast bench sampler", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="batches of each row, in turns (default 5)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learner", help="the run folder whose learner guides; default: one trained for 15 s")
    parser.add_argument("--only", default="", metavar="TEXT", help="the rows (a), (b) and those that contain TEXT")
    parser.add_argument("--no-compile", action="store_true", help="leave out the rows that compile")
    parser.add_argument("--search", type=int, metavar="SAMPLES", help="look for the fewest steps instead")
    parser.add_argument(
        "--record", type=Path, nargs="?", const=RESULTS.parent, metavar="FOLDER",
        help="append to sampler.jsonl in FOLDER (default benchmarks/results)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    for name, least in (("rounds", 1), ("batch", ALONE), ("search", 100)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = _arguments(arguments)
    described = {
        "suite": "sampler",
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **timing.machine(torch.device("cpu")),
        "learner": options.learner or "quick",
    }
    print(", ".join(f"{key} {value}" for key, value in described.items()), file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.learner, Path(folder), compile=not options.no_compile)
        if options.search is not None:
            print(search(bench, options.search))
            return 0
        rows = [row for row in bench.rows() if options.only in row.name or row.name.startswith(("(a)", "(b)"))]
        labels, ids = _batch(0, options.batch)
        for row in rows:  # the first call compiles, loads and maps memory
            size = 1 if row.alone else options.batch
            for make in (row.make, row.unguided):
                if not row.eager or row.alone:
                    make(labels[:size], ids[:size])
        rates = measure(bench, rows, options.rounds, options.batch)
        made = records(bench, rows, rates, options.batch)
        if not options.only:
            work(bench, rows, made, options.batch)
        host = None if options.no_compile or options.only else host_share(bench, options.batch)
    print(table(made))
    print(f"\nGEMM {GEMM}: {statistics.median(rates) / 1e9:.0f} GFLOP/s (median of {len(rates)} rounds)")
    if host is not None:
        print(f"outside the compiled code, under the profiler: {host:.2%} of a guided batch of {options.batch}")
    if options.record is not None:
        options.record.mkdir(parents=True, exist_ok=True)
        with (options.record / RESULTS.name).open("a") as file:
            file.writelines(json.dumps(described | {"host_share": host} | record) + "\n" for record in made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
