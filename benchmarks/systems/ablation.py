"""From the published way of guiding to dpfast, one change at a time: `dpfast bench sampler`.

All rows make the same samples (labels, ids and noise) of the embedded generator, guided by one
learner, and take turns in one process with a matrix product among them. Rows that differ from the
one above in execution alone make the same images; for the others the table says what the change
does to entropy, label agreement and gradient.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import RESULTS
from benchmarks.harness import timing
from benchmarks.harness.arguments import add_device, add_record, add_rows, is_wanted, new_parser
from benchmarks.systems import fewer_steps
from benchmarks.systems.naive import Batched, Models, Predecessor
from dpfast.cli.parser import at_least
from dpfast.config import Learner
from dpfast.data.real import load_real
from dpfast.evaluate.measures import predict
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from dpfast.hardware.flops import count_passes
from dpfast.learn.models import build_learner, load_judge, load_learner
from dpfast.learn.trainer import Trainer
from dpfast.ops import entropy
from dpfast.planning.methods import Method, PartFlops
from dpfast.terminal import say

RECORDS = RESULTS / "sampler.jsonl"
STEPS = 20
EVERY = 5
OMEGA = 0.03
CFG = 1.5
FEW = {
    "steps": 8,
    "every": 2,
    "omega": 0.028,
}  # the fewest of DPM-Solver++ that keep entropy and agreement: --search
CFG_UNTIL = 0.8
ALONE = 8  # samples a round of a row that makes them one by one
FIRST_ID = 1 << 41  # ids that no run uses
GEMM, PRODUCTS = 1024, 10
Make = Callable[[Tensor, Tensor], Any]
Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]
Record = dict[str, Any]


@dataclass(kw_only=True)
class Row:
    """One way to make guided samples. make: (labels, ids) to uint8 images, or to what ``read``
    makes them of, untimed; gradient: (x, t, labels) to its own.
    """

    name: str
    make: Make
    unguided: Make
    gradient: Gradient
    method: Method
    alone: bool = False
    eager: bool = True
    ours: bool = False
    read: Callable[[Any], Tensor] = lambda made: made
    side: bool = False  # for comparison: the next row does not build on it


class Bench:
    """The generator, the learner that guides, and the rows over both."""

    def __init__(
        self, learner: str | None, folder: Path, device: torch.device, *, compile: bool = True
    ) -> None:
        self.device = device
        self.pipeline = Pipeline.from_pretrained("fashion", device=device)
        self.named = learner or "quick"
        self.learner = (
            quick_learner(device) if learner is None else load_learner(learner, self.pipeline)
        )
        self.models = Models.load(self.pipeline.folder, self.learner, device)
        self.judge = load_judge().to(device)
        self.folder, self.compile = folder, compile

    def naive(self) -> Row:
        guided, plain = (
            Predecessor(
                self.models,
                self.folder / name,
                steps=STEPS,
                every=EVERY,
                omega=omega,
                cfg_scale=CFG,
            )
            for name, omega in (("guided", OMEGA), ("unguided", 0.0))
        )
        gradient = self._gradient(Batched(models=self.models, blend=True, decoder="full"))
        return Row(
            name="(a) the predecessor: batch 1, files",
            make=guided.write,
            unguided=plain.write,
            read=guided.read,
            gradient=gradient,
            method=Method(steps=STEPS, guided=_guided(STEPS, EVERY), gradient="extra", tiny=False),
            alone=True,
        )

    def plain(self, name: str, *, side: bool = False, **options: Any) -> Row:
        """Plain diffusers code in a batch."""
        options = {
            "models": self.models,
            "steps": STEPS,
            "every": EVERY,
            "omega": OMEGA,
            "cfg_scale": CFG,
            **options,
        }
        guided, plain = Batched(**options), Batched(**options | {"omega": 0.0})
        if options.get("compile"):  # one compilation serves both
            plain._predict, plain._decode = guided._predict, guided._decode
        return Row(
            name=name,
            make=guided.generate,
            unguided=plain.generate,
            gradient=self._gradient(guided),
            method=Method(
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

    def sampler(
        self,
        *,
        compile: bool,
        steps: int = STEPS,
        every: int = EVERY,
        omega: float = OMEGA,
        **options: Any,
    ):
        guidance = GuidanceConfig(omega=omega, every=every)
        return GuidedSampler(
            self.pipeline,
            self.learner,
            guidance=guidance,
            steps=steps,
            cfg_scale=CFG,
            compile=compile,
            **options,
        )

    def ours(self, name: str, *, compile: bool, **options: Any) -> Row:
        sampler = self.sampler(compile=compile, **options)
        path = sampler.runner.parts.path
        assert path is not None

        def gradient(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            scales = (scale.to(self.device) for scale in self.models.scales(t))
            return path.gradient(x, t.to(self.device), labels, *scales)[0]

        return Row(
            name=name,
            make=lambda labels, ids: sampler.generate(labels, ids).images,
            unguided=lambda labels, ids: sampler.generate(labels, ids, omega=0.0).images,
            gradient=gradient,
            method=Method(
                steps=len(sampler.table), guided=len(sampler.guidance.steps(len(sampler.table)))
            ),
            eager=not compile,
            ours=True,
        )

    def rows(self) -> list[Row]:
        """All rows, in the table's order."""
        few = FEW | {"solver": "dpmpp2m"}
        rows = [
            self.naive(),
            self.plain("+ batching, no files", share=False, decoder="full", blend=True),
            self.plain("+ shared conditional forward", decoder="full", blend=True),
            self.plain("+ the entropy of x0 itself", decoder="full"),
            self.plain("(b) + tiny decoder"),
            self.plain(
                "    the same, guided in every step", side=True, every=1, omega=OMEGA / EVERY
            ),
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
        exact = Batched(
            models=self.models, steps=STEPS, every=EVERY, omega=OMEGA, cfg_scale=CFG, decoder="full"
        )
        seen, gradient = [], exact.gradient

        def recorded(x: Tensor, t: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            seen.append((x, t))
            return gradient(x, t, *rest)

        exact.gradient = recorded  # type: ignore[method-assign]
        exact.latents(labels, FIRST_ID + torch.arange(len(labels), device=self.device))
        return seen

    def cosine(self, row: Row) -> float:
        """The mean over 64 samples and the guided steps of the cosine of a row's gradient to the
        exact one.
        """
        labels = torch.arange(64, device=self.device) % 10
        exact = self._gradient(Batched(models=self.models, decoder="full"))
        with torch.no_grad():
            pairs = [
                (row.gradient(x, t, labels).flatten(1), exact(x, t, labels).flatten(1))
                for x, t in self.states(labels)
            ]
            return float(
                torch.stack([torch.cosine_similarity(*pair).mean() for pair in pairs]).mean()
            )

    def work(self, *, ours: bool) -> PartFlops:
        """FLOPs of the parts of a sample; the denoiser's are fewer in dpfast's form of it."""
        models = self.models
        with self.device:
            x = torch.randn(1, 4, 8, 8)
            t = torch.tensor(500)
            label = torch.zeros(1, dtype=torch.int64)
            image = torch.zeros(1, 1, 32, 32)
        predict = self.pipeline.denoiser if ours else models.predict
        return PartFlops(
            name="fashion",
            denoiser=count_passes(lambda x: predict(x, t, label), x),
            decoder=count_passes(models.decode, x),
            tiny=count_passes(lambda x: models.tiny.decode(x).sample, x),
            learner=count_passes(self.learner, image),
        )

    def quality(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Entropy under the learner and agreement of the judge with the label, of each image."""
        hits = predict(self.judge, images).argmax(1) == labels.to(images.device)
        return entropy(predict(self.learner, images)).cpu(), hits.float().cpu()


def quick_learner(device: torch.device, iterations: int = 250) -> torch.nn.Module:
    """A learner in the middle of its training: 250 steps on real validation images, about 15 s on
    two cores.
    """
    torch.manual_seed(0)
    options = {
        "embedding_size": 32,
        "hidden_sizes": [32, 64, 128],
        "depths": [1, 1, 1],
        "groups_width": 128,
    }
    model = build_learner(Learner().model, classes=10, channels=1, layer_type="x", **options).to(
        device
    )
    trainer = Trainer(model, Learner(lr=2e-3), iterations=iterations)
    real = load_real("fashion").validation
    for step in range(iterations):
        chosen = torch.arange(step * 64, (step + 1) * 64) % len(real)
        images, labels = real.images[chosen].to(device), real.labels[chosen].to(device)
        trainer.step(images.float().div(127.5).sub(1), labels)
    return trainer.ema.module.eval().requires_grad_(False)


def _guided(steps: int, every: int) -> int:
    return -(-steps // every)


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    timing.synchronise(device)
    start = time.perf_counter()
    out = call()
    timing.synchronise(device)
    return time.perf_counter() - start, out


def _batch(number: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    ids = torch.arange(number * size, (number + 1) * size, device=device)
    return ids % 10, FIRST_ID + ids


def measure(bench: Bench, row: Row, reference: Row, rounds: int, batch: int) -> Record:
    """A row beside the reference: seconds in turns with it and with a matrix product, images,
    gradient, memory.
    """
    size, device = ALONE if row.alone else batch, bench.device
    for one, make in ((row, row.make), (row, row.unguided), (reference, reference.make)):
        # the first call compiles, captures, maps memory
        if device.type == "cuda" or not one.eager or one.alone:
            make(*_batch(0, 1 if one.alone else batch, device))
    a, b = (torch.randn(GEMM, GEMM, device=device) for _ in range(2))
    a @ b
    products = []
    guided = []
    unguided = []
    beside = []
    images = []
    base = []
    for number in range(rounds):
        labels, ids = _batch(number, batch, device)
        seconds, _ = _timed(lambda: [a @ b for _ in range(PRODUCTS)][-1], device)
        products.append(PRODUCTS * 2 * GEMM**3 / seconds)
        calls = [
            functools.partial(reference.make, labels, ids),
            functools.partial(row.make, labels[:size], ids[:size]),
            functools.partial(row.unguided, labels[:size], ids[:size]),
        ]
        # what comes first finds the machine as the product left it
        order = (0, 1, 2) if number % 2 == 0 else (2, 1, 0)
        made = {which: _timed(calls[which], device) for which in order}
        beside.append(made[0][0] / batch)
        guided.append(made[1][0] / size)
        unguided.append(made[2][0] / size)
        base.append(made[0][1][:size])
        images.append(row.read(made[1][1]).to(device))
    labels = torch.cat([_batch(number, batch, device)[0][:size] for number in range(rounds)])
    quality = (bench.quality(torch.cat(made), labels) for made in (images, base))
    record = {
        "batch": 1 if row.alone else batch,
        "steps": row.method.steps,
        "samples_per_second": {"median": 1 / statistics.median(guided), "best": 1 / min(guided)},
        "unguided_samples_per_second": 1 / statistics.median(unguided),
        # Ratios are medians over rounds of the ratio within a round.
        "cost": _ratio(guided, unguided),
        "over_b": _ratio(beside, guided),
        **fewer_steps.beside(*quality),
        "cosine": bench.cosine(row),
        "gemm": statistics.median(products),
    }
    parts = bench.work(ours=row.ours)
    record["flops"], record["flops_unguided"] = row.method.total(parts), row.method.unguided(parts)
    record["share_of_gemm"] = (
        record["flops"] * record["samples_per_second"]["median"] / record["gemm"]
    )
    record["share_of_gemm_unguided"] = (
        record["flops_unguided"] * record["unguided_samples_per_second"] / record["gemm"]
    )
    labels, ids = _batch(0, 1 if row.alone else batch, device)
    record["peak_bytes"] = timing.peak_bytes(functools.partial(row.make, labels, ids), device)
    if row.ours and not row.eager and device.type == "cpu":
        record["host_share"] = host_share(functools.partial(row.make, labels, ids))
    return record


def host_share(make: Callable[[], Tensor]) -> float:
    """The share of a compiled trajectory that passes outside the compiled code. The profiler itself
    adds to it.
    """
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        seconds, _ = _timed(make, torch.device("cpu"))
    inside = sum(
        event.cpu_time_total for event in trace.key_averages() if "CompiledFxGraph" in event.key
    )
    return 1 - inside / 1e6 / seconds


def _ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def table(made: list[Record]) -> str:
    """Markdown. Rows meet (a) through (b), which was timed beside each of them."""
    header = (
        "",
        "samples/s median (best)",
        "guided / unguided",
        "over (a)",
        "over (b)",
        "entropy, nats",
        "label agreement",
        "cosine to exact",
        "share of GEMM",
        "peak memory",
    )
    first = next((record["over_b"] for record in made if record["row"].startswith("(a)")), None)
    lines = [header, ("---",) * len(header)]
    for record in made:
        rate, peak = record["samples_per_second"], record["peak_bytes"]
        points = 100 * record["agreement_change"][0]
        lines.append(
            (
                record["row"].replace("    ", "&nbsp;&nbsp;"),
                f"{rate['median']:.1f} ({rate['best']:.1f})",
                f"{record['cost']:.2f}",
                "" if first is None else f"{record['over_b'] / first:.1f}x",
                f"{record['over_b']:.2f}x",
                f"{record['entropy'][0]:.3f} ± {record['entropy'][1]:.3f} "
                f"({record['entropy_change'][0]:+.1%})",
                f"{record['agreement'][0]:.1%} ± {record['agreement'][1]:.1%} ({points:+.1f})",
                f"{record['cosine']:.3f}",
                f"{record['share_of_gemm']:.0%}",
                f"{peak / 1e6:.0f} MB",
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def qualities(
    bench: Bench, samples: int, first: int, folder: Path | None
) -> Callable[[Record], fewer_steps.Quality]:
    """The quality of a setting's samples, those from `first` on, kept in the folder."""
    ids = torch.arange(first, first + samples)

    def quality(option: Record) -> fewer_steps.Quality:
        def sampled() -> Record:
            sampler = bench.sampler(compile=False, **option)
            batches = sampler.stream(ids % 10, sample_ids=FIRST_ID + ids, batch_size=128)
            values, hits = bench.quality(torch.cat([batch.images for batch in batches]), ids % 10)
            return {"entropies": values.tolist(), "hits": hits.tolist()}

        settings = option | {"samples": samples, "first": first, "learner": bench.named}
        record = fewer_steps.kept(folder, settings, sampled)
        print(option, file=sys.stderr, flush=True)
        return torch.tensor(record["entropies"]), torch.tensor(record["hits"])

    return quality


def search(bench: Bench, samples: int, first: int, folder: Path | None) -> str:
    """`fewer_steps` over the settings."""
    reference = {"solver": "ddim", "steps": STEPS, "every": EVERY, "omega": OMEGA}
    tried = fewer_steps.search(
        qualities(bench, samples, first, folder), reference, fewer_steps.SETTINGS
    )
    return fewer_steps.table(tried)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser("sampler", __doc__)
    parser.add_argument(
        "--rounds", type=at_least(1), default=5, help="batches of each row, in turns (default 5)"
    )
    parser.add_argument(
        "--batch-size", type=at_least(ALONE), default=64, help="samples at once (default 64)"
    )
    add_device(parser)
    parser.add_argument(
        "--learner", help="the run folder whose learner guides; default: one trained for 15 s"
    )
    add_rows(parser)
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FOLDER",
        help="finished rows are left here, and not done again",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out the rows that compile")
    parser.add_argument(
        "--search", type=at_least(100), metavar="SAMPLES", help="look for the fewest steps instead"
    )
    parser.add_argument(
        "--first", type=at_least(0), default=0, help="of --search, the first sample (default 0)"
    )
    add_record(parser, "sampler")
    options = parser.parse_args(arguments)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = _arguments(arguments)
    described = timing.described("sampler", options.device) | {
        "learner": options.learner or "quick"
    }
    print(", ".join(f"{key} {value}" for key, value in described.items()), file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.learner, Path(folder), options.device, compile=not options.no_compile)
        if options.search is not None:
            print(search(bench, options.search, options.first, options.keep))
            return 0
        rows = bench.rows()
        reference = next(row for row in rows if row.name.startswith("(b)"))
        wanted = [row for row in rows if is_wanted(row.name, options.rows)]
        made = []
        for row in wanted:
            settings = {"row": row.name, "side": row.side, "learner": bench.named}
            settings |= {"rounds": options.rounds, "of": options.batch_size}
            made.append(
                fewer_steps.kept(
                    options.keep,
                    settings,
                    lambda: measure(bench, row, reference, options.rounds, options.batch_size),  # noqa: B023
                )
            )
            print(
                f"{row.name}: {made[-1]['samples_per_second']['median']:.1f}/s",
                file=sys.stderr,
                flush=True,
            )
    say(table(made))
    print(
        f"\nGEMM {GEMM}: {statistics.median(record['gemm'] for record in made) / 1e9:.0f} GFLOP/s "
        "(median of the rows)"
    )
    for record in made:
        if "host_share" in record:
            share, size = record["host_share"], record["batch"]
            print(
                f"{record['row']}: {share:.2%} of a guided batch of {size} outside the compiled "
                "code, profiled"
            )
    chosen = fewer_steps.fewest(made)
    if chosen is not None:
        print(f"fewest steps that keep entropy and agreement on these samples: {chosen['row']}")
    if options.record is not None:
        timing.append(options.record / RECORDS.name, "sampler", made, options.device)
    return 0
