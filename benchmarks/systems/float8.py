"""What float8 changes in the images, and in what they are to a learner: `dpfast bench float8`.

The embedded generator in fp32, in bf16 and in float8, guided and not, makes the same samples
(labels, ids and noise). On a CPU torch computes the product of float8 numbers with exact sums, so
that this shows the rounding of weights and activations, and not the shorter sums of tensor cores.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.harness import timing
from benchmarks.harness.arguments import add_record, new_parser
from benchmarks.systems import fewer_steps
from benchmarks.systems.ablation import CFG, EVERY, FEW, FIRST_ID, OMEGA, STEPS, quick_learner
from dpfast.cli.parser import at_least
from dpfast.evaluate.measures import predict
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.models.fused import quantise
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from dpfast.learn.models import load_judge, load_learner
from dpfast.ops import entropy
from dpfast.terminal import say

RECORDS = RESULTS / "float8.jsonl"
CPU = torch.device("cpu")
DDIM: dict[str, Any] = {"solver": "ddim", "steps": STEPS, "every": EVERY, "omega": OMEGA}
SETTINGS = (DDIM, FEW | {"solver": "dpmpp2m"}, DDIM | {"omega": 0.0})
Record = dict[str, Any]


def pipelines() -> dict[str, Pipeline]:
    """The embedded generator in each dtype, the last two as on a GPU."""
    made = {"float32": Pipeline.from_pretrained("fashion")}
    for name in ("bfloat16", "float8"):
        made[name] = Pipeline.from_pretrained("fashion", dtype="bfloat16", fused=True)
    denoiser: Any = made["float8"].denoiser
    quantise(denoiser.model)
    return made


def images(pipeline: Pipeline, learner: Any, setting: Record, samples: int) -> Tensor:
    """(samples, 1, 32, 32) uint8."""
    sampler = GuidedSampler(
        pipeline,
        learner,
        guidance=GuidanceConfig(omega=setting["omega"], every=setting["every"]),
        steps=setting["steps"],
        solver=setting["solver"],
        cfg_scale=CFG,
        compile=False,
    )
    ids = torch.arange(samples)
    batches = sampler.stream(ids % 10, sample_ids=FIRST_ID + ids, batch_size=128)
    return torch.cat([batch.images for batch in batches])


def difference(left: Tensor, right: Tensor) -> tuple[float, float]:
    """The mean absolute difference of the pixels of images, of 255, and its standard error."""
    return fewer_steps.mean((left.float() - right.float()).abs().flatten(1).mean(1))


def table(records: list[Record]) -> str:
    """Markdown; changes are against the first row of a setting."""
    lines = [
        "| solver | steps | omega | dtype | entropy, nats | agreement | pixels apart from fp32 | "
        "from bf16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        (change, error), (points, points_error) = (
            record["entropy_change"],
            record["agreement_change"],
        )
        cells = [record[key] for key in ("solver", "steps", "omega", "dtype")]
        cells.append(f"{record['entropy'][0]:.3f} ({change:+.1%} ± {error:.1%})")
        cells.append(
            f"{record['agreement'][0]:.1%} ({100 * points:+.1f} ± {100 * points_error:.1f})"
        )
        cells += [
            f"{record[f'from_{name}'][0]:.2f} ± {record[f'from_{name}'][1]:.2f}"
            for name in ("float32", "bfloat16")
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser("float8", __doc__)
    parser.add_argument(
        "--learner", help="the run folder whose learner guides; default: one trained for 15 s"
    )
    parser.add_argument(
        "--samples", type=at_least(2), default=512, help="of each setting (default 512)"
    )
    add_record(parser, "float8")
    options = parser.parse_args(arguments)
    made = pipelines()
    plain = made["float32"]
    learner = (
        quick_learner(CPU) if options.learner is None else load_learner(options.learner, plain)
    )
    judge, records = load_judge(), []
    labels = torch.arange(options.samples) % 10
    for setting in SETTINGS:
        by_dtype, qualities = {}, {}
        for name, pipeline in made.items():
            by_dtype[name] = images(pipeline, learner, setting, options.samples)
            hits = predict(judge, by_dtype[name]).argmax(1) == labels
            qualities[name] = (entropy(predict(learner, by_dtype[name])), hits.float())
            record = setting | {"dtype": name, "learner": options.learner or "quick"}
            print(record, file=sys.stderr, flush=True)
            records.append(record)
        for record in records[-len(made) :]:
            name = record["dtype"]
            record |= fewer_steps.beside(qualities[name], qualities["float32"])
            for other in ("float32", "bfloat16"):
                record[f"from_{other}"] = difference(by_dtype[name], by_dtype[other])
        say(table(records[-len(made) :]))
    if options.record is not None:
        timing.append(options.record / RECORDS.name, "float8", records)
    return 0
