"""What bf16 changes in a learner that is evaluated and that guides: `dpfast bench precision`.

The embedded generator, guided by a learner in the middle of its training and by the embedded judge,
each in fp32 and under bf16 autocast, which a CPU is made to run as a GPU does by default. Accuracy
is that on the real test images; gradients are those of the entropy with respect to the latents, at
the guided steps of trajectories that fp32 guides.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import RESULTS
from benchmarks.harness import timing
from benchmarks.harness.arguments import add_record, new_parser
from benchmarks.systems.ablation import quick_learner
from dpfast.cli.parser import at_least
from dpfast.data.real import load_real
from dpfast.evaluate.measures import predict
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from dpfast.learn.models import load_judge
from dpfast.learn.precision import Autocast
from dpfast.ops import entropy

RECORDS = RESULTS / "precision.jsonl"
STEPS, EVERY, OMEGA, CFG = 8, 2, 0.05, 1.5  # of the recipe "fashion", guided as the paper does
CPU = torch.device("cpu")


def accuracies(learner: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracy in both precisions, the share of images whose class differs, and how far entropies
    are apart.
    """
    exact, rounded = (predict(model, images) for model in (learner, Autocast(learner)))
    guesses = [logits.argmax(1) for logits in (exact, rounded)]
    return {
        "images": len(images),
        "accuracy": [float((guess == labels).double().mean()) for guess in guesses],
        "other_class": float((guesses[0] != guesses[1]).double().mean()),
        "entropy_difference": float((entropy(exact) - entropy(rounded)).abs().mean()),
        "entropy": float(entropy(exact).mean()),
    }


def cosines(learner: nn.Module, samples: int) -> Tensor:
    """(guided steps, samples): the cosine of a sample's gradient in bf16 with that in fp32, at the
    same latents.
    """
    pipeline = Pipeline.from_pretrained("fashion")
    guidance = GuidanceConfig(omega=OMEGA, every=EVERY)
    exact, rounded = (
        GuidedSampler(
            pipeline,
            model,
            guidance=guidance,
            steps=STEPS,
            cfg_scale=CFG,
            compile=False,
            cuda_graphs=False,
        )
        for model in (learner, Autocast(learner))
    )
    labels, found = torch.arange(samples) % 10, []
    trajectory = exact.begin(labels, torch.arange(samples))
    for step in sorted(guidance.steps(len(exact.table))):
        trajectory = exact.advance(trajectory, step)
        alpha, sigma = exact.table.rows[step, :2]
        at = (trajectory.x, exact.table.timesteps[step], labels, alpha, sigma)
        gradients = [_gradient(sampler, at).flatten(1) for sampler in (exact, rounded)]
        found.append(F.cosine_similarity(*gradients, dim=1))
    return torch.stack(found)


def _gradient(sampler: GuidedSampler, at: tuple[Tensor, ...]) -> Tensor:
    path = sampler.runner.parts.path
    assert path is not None
    return path.gradient(*at)[0].double()


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser("precision", __doc__)
    parser.add_argument(
        "--samples", type=at_least(1), default=250, help="trajectories (default 250)"
    )
    parser.add_argument(
        "--images", type=at_least(1), default=5000, help="real test images (default 5000)"
    )
    add_record(parser, "precision")
    options = parser.parse_args(arguments)
    real = load_real("fashion").test
    images, labels = real.images[: options.images], real.labels[: options.images]
    print(
        "| learner | accuracy fp32, bf16 | other class | entropy, apart by | cosine of gradients: "
        "median, 1 %, least |"
    )
    print("|---|---|---|---|---|")
    for name, learner in {
        "250 steps of training": quick_learner(CPU),
        "judge": load_judge(),
    }.items():
        record = {"learner": name, **accuracies(learner, images, labels)}
        values = cosines(learner, options.samples)
        record["cosine"] = {
            "samples": options.samples,
            "median": float(values.median()),
            "one_percent": float(values.flatten().quantile(0.01)),
            "minimum": float(values.min()),
            "median_of_steps": values.median(1).values.tolist(),
        }
        accuracy, cosine = record["accuracy"], record["cosine"]
        print(
            f"| {name} | {accuracy[0]:.2%}, {accuracy[1]:.2%} | {record['other_class']:.2%} | "
            f"{record['entropy']:.3f}, "
            f"{record['entropy_difference']:.4f} nats | {cosine['median']:.4f}, "
            f"{cosine['one_percent']:.3f}, "
            f"{cosine['minimum']:.3f} |"
        )
        print(json.dumps(record), file=sys.stderr)
        if options.record is not None:
            timing.append(options.record / RECORDS.name, "precision", [record])
    return 0
