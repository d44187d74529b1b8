#!/usr/bin/env python3
"""What guidance does: entropy and label agreement against omega, and a picture of the same samples
under each omega.

    python tools/measure_guidance.py RUN --out docs/guidance.png [--omega 0 0.05 0.15] [--count 500]

RUN is the folder of a finished run; its learner guides. Labels and sample ids are the same for
every omega, so every column of the picture is one sample that guidance makes harder from top to
bottom.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from dpfast.cli.parser import Parser, at_least, in_one_line
from dpfast.config import Recipe
from dpfast.evaluate.measures import predict
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from dpfast.learn.models import load_judge, load_learner
from dpfast.report.sheets import contact_sheet

FIRST_ID = 1 << 41  # ids that no run uses


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run, whose learner guides")
    parser.add_argument("--out", type=Path, required=True, help="file of the picture")
    parser.add_argument(
        "--omega",
        type=float,
        nargs="+",
        default=[0.0, 0.03, 0.05, 0.08, 0.15],
        help="strengths of guidance",
    )
    parser.add_argument(
        "--every",
        type=at_least(1),
        default=Recipe.load("fashion").guidance.every,
        help="one step in so many is guided",
    )
    parser.add_argument(
        "--count", type=at_least(1), default=500, help="samples of each strength (default 500)"
    )
    arguments = parser.parse_args()

    recipe = Recipe.load("fashion")
    pipeline, judge = Pipeline.from_pretrained(recipe.generator.pipeline), load_judge()
    learner = load_learner(arguments.run, pipeline)
    labels = torch.arange(arguments.count) % len(pipeline.class_names)
    print(
        "omega  entropy of the learner, nats  "
        "label agreement of the judge  seconds per 1,000 samples"
    )
    rows = []
    for omega in arguments.omega:
        guidance = GuidanceConfig(omega=omega, every=arguments.every)
        sampler = GuidedSampler(
            pipeline,
            learner,
            guidance=guidance,
            steps=recipe.generator.steps,
            cfg_scale=recipe.generator.cfg_scale,
        )
        started = time.perf_counter()
        batches = list(sampler.stream(labels, first_id=FIRST_ID))
        seconds = (time.perf_counter() - started) / arguments.count * 1000
        images = torch.cat([batch.images for batch in batches])
        entropy = float(torch.cat([batch.entropy for batch in batches]).mean())
        agreement = float((predict(judge, images).argmax(1) == labels).float().mean())
        print(f"{omega:5.3f}  {entropy:28.3f}  {agreement:28.1%}  {seconds:25.1f}")
        rows.append(images[:20])
    names = tuple("unguided" if omega == 0 else f"omega {omega:g}" for omega in arguments.omega)
    contact_sheet(rows, names, "The same labels and noise under rising guidance", arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(in_one_line("measure_guidance", main))
