"""``dpfast sample``: images of given classes, guided or not."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpfast.cli import Commands
from dpfast.config import Recipe, RecipeError


def add(commands: Commands) -> None:
    parser = commands.add_parser("sample", help="write images of given classes", allow_abbrev=False)
    parser.add_argument("--labels", required=True, help="class ids or names, comma-separated, or 'all'")
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNG files; must be empty or new")
    parser.add_argument("--count", type=int, default=8, help="images per label (default 8)")
    parser.add_argument(
        "--omega", type=float, default=0.0, help="strength of the entropy guidance (default 0, unguided)"
    )
    parser.add_argument("--learner", help="the run folder whose learner guides; default: the embedded judge network")
    parser.add_argument("--pipeline", default="fashion", help="an embedded generator or a diffusers pipeline folder")
    parser.add_argument("--class-names", help="names of the classes by id, comma-separated; default: the folder's")
    parser.add_argument("--prompt-template", default="a photo of a {}", help="of a text-conditioned pipeline")
    parser.add_argument("--dtype", default="float32", help="of the models: float32, bfloat16 or float16")
    parser.add_argument("--solver", default="auto", help="ddim, dpmpp2m, for flow models euler; default: ddim or euler")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--cfg-scale", type=float, default=1.5)
    parser.add_argument("--cfg-from", type=float, default=0.0, help="classifier-free guidance acts from this fraction")
    parser.add_argument("--cfg-until", type=float, default=1.0, help="of the steps until this one (default 0 and 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(handler=sample)


def sample(arguments: argparse.Namespace) -> int:
    if arguments.count < 1:
        raise RecipeError(f"count = {arguments.count}: at least 1")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise RecipeError(f"out = {str(arguments.out)!r}: exists and is not an empty folder")
    generator = Recipe.load(
        "fashion",
        steps=arguments.steps,
        cfg_scale=arguments.cfg_scale,
        cfg_from=arguments.cfg_from,
        cfg_until=arguments.cfg_until,
        seed=arguments.seed,
    ).generator

    from dpfast.generate.guidance import GuidanceConfig
    from dpfast.generate.pipelines import Pipeline
    from dpfast.generate.sampler import GuidedSampler
    from dpfast.practice.run_folder import load_learner
    from dpfast.report.samples import write_samples

    names = None if arguments.class_names is None else [name.strip() for name in arguments.class_names.split(",")]
    pipeline = Pipeline.from_pretrained(
        arguments.pipeline, dtype=arguments.dtype, class_names=names, prompt_template=arguments.prompt_template
    )
    labels = _labels(arguments.labels, pipeline.class_names)
    learner = load_learner(arguments.learner, pipeline) if arguments.omega else None
    ordered = [label for label in labels for _ in range(arguments.count)]
    try:
        sampler = GuidedSampler(
            pipeline,
            learner,
            guidance=GuidanceConfig(omega=arguments.omega),
            steps=generator.steps,
            solver=arguments.solver,
            cfg_scale=generator.cfg_scale,
            cfg_interval=(generator.cfg_from, generator.cfg_until),
            seed=arguments.seed,
        )
        batches = sampler.stream(ordered)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    sheet = write_samples(batches, pipeline.class_names, arguments.out)
    print(f"{len(ordered)} images in {arguments.out}, overview {sheet}")
    return 0


def _labels(text: str, names: tuple[str, ...]) -> list[int]:
    if text == "all":
        return list(range(len(names)))
    labels = []
    for part in (p.strip() for p in text.split(",")):
        if part in names:
            labels.append(names.index(part))
        elif part.isdecimal() and int(part) < len(names):
            labels.append(int(part))
        else:
            raise RecipeError(
                f"labels = {part!r}: expected 0 to {len(names) - 1}, 'all', or one of: {', '.join(names)}"
            )
    return labels
