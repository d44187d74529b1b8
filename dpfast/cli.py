"""The command ``dpfast``: run a recipe, make samples, look at the installation.

An input that cannot work ends with one line on stderr and exit code 2, before any work starts.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dpfast.config import Recipe, RecipeError, fields


class _Parser(argparse.ArgumentParser):
    """Reports an unusable argument in one line, with the nearest known option."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(message)

    def parse_all(self, arguments: Sequence[str]) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].lstrip("-").replace("-", "_").split("=")[0]
            near = difflib.get_close_matches(name, list(fields()), n=1)
            hint = f"; did you mean --{near[0].replace('_', '-')}?" if near else "; dpfast --help lists what is known"
            raise RecipeError(f"{unknown[0]}: no such option or field{hint}")
        return parsed


def _parser() -> _Parser:
    parser = _Parser(prog="dpfast", description="Deliberate Practice on synthetic images.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="train a classifier by Deliberate Practice, beside its rivals", allow_abbrev=False
    )
    run.add_argument("recipe", help="a recipe's name (fashion) or a path that ends in .toml")
    run.add_argument("--out", type=Path, help="folder of the run; default runs/RECIPE")
    kept = run.add_mutually_exclusive_group()
    kept.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    kept.add_argument(
        "--resume", action="store_true", help="continue the run that --out holds from its last evaluation"
    )
    run.add_argument("--quiet", action="store_true", help="no progress, only the final table")
    group = run.add_argument_group("fields of the recipe", "each replaces the recipe's value")
    for name, field in fields().items():
        if name not in ("options", "name"):
            group.add_argument(
                f"--{name.replace('_', '-')}", dest=f"field.{name}", metavar=str(field.type).split("[")[0].upper()
            )

    sample = commands.add_parser("sample", help="write images of given classes", allow_abbrev=False)
    sample.add_argument("--labels", required=True, help="class ids or names, comma-separated, or 'all'")
    sample.add_argument("--out", type=Path, required=True, help="folder for the PNG files; must be empty or new")
    sample.add_argument("--count", type=int, default=8, help="images per label (default 8)")
    sample.add_argument(
        "--omega", type=float, default=0.0, help="strength of the entropy guidance (default 0, unguided)"
    )
    sample.add_argument("--learner", help="the run folder whose learner guides; default: the embedded judge network")
    sample.add_argument("--pipeline", default="fashion", help="an embedded generator or a diffusers pipeline folder")
    sample.add_argument("--steps", type=int, default=15)
    sample.add_argument("--cfg-scale", type=float, default=1.5)
    sample.add_argument("--seed", type=int, default=0)

    audit = commands.add_parser(
        "audit",
        help="compile the Triton kernels for GPUs and check their machine code; needs no GPU",
        allow_abbrev=False,
    )
    audit.add_argument(
        "--capability", type=int, nargs="+", choices=(80, 90, 100), default=[80, 90, 100],
        help="A100, H100, B200; default all",
    )  # fmt: skip
    audit.add_argument("--json", type=Path, help="file for the reports, one JSON object a line")

    bench = commands.add_parser("bench", help="measure beside eager PyTorch and torch.compile", allow_abbrev=False)
    bench.add_argument("suite", help="ops, pool, ...; dpfast bench ops --help lists the options")
    bench.add_argument("options", nargs=argparse.REMAINDER, help="options of the suite")

    export = commands.add_parser("export", help="write a run's samples for other libraries", allow_abbrev=False)
    export.add_argument("run", type=Path, help="folder of a run, or of a saved or exported pool")
    export.add_argument("--format", required=True, choices=("webdataset", "imagefolder", "parquet"))
    export.add_argument("--out", type=Path, required=True, help="folder for the files; must be empty or new")

    commands.add_parser("doctor", help="what is installed, which backend each operation uses, what is missing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    try:
        parsed = _parser().parse_all(sys.argv[1:] if arguments is None else arguments)
        commands = {
            "run": _run,
            "sample": _sample,
            "bench": _bench,
            "audit": _audit,
            "export": _export,
            "doctor": _doctor,
        }
        return commands[parsed.command](parsed)
    except RecipeError as error:
        print(f"dpfast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dpfast: interrupted", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    given = {key.removeprefix("field."): value for key, value in vars(arguments).items() if key.startswith("field.")}
    recipe = Recipe.load(arguments.recipe, **{key: value for key, value in given.items() if value is not None})
    # torch, diffusers and transformers take seconds to import; a wrong argument is answered before
    from dpfast.practice.loop import DeliberatePractice
    from dpfast.practice.run_folder import RunFolder, check_vacant
    from dpfast.report.metrics import result_table
    from dpfast.report.plots import write_report

    out = arguments.out or Path("runs") / recipe.name
    check_vacant(out, recipe, overwrite=arguments.overwrite, resume=arguments.resume)
    practice = DeliberatePractice(recipe)
    with RunFolder(out, recipe, overwrite=arguments.overwrite, resume=arguments.resume) as folder:
        results = practice.run(folder, progress=not arguments.quiet)
    write_report(out, results, practice.real.classes)
    print(f"\n{result_table(results)}\n\nRun folder with metrics, plots, contact sheets and learners: {out}")
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    if arguments.count < 1:
        raise RecipeError(f"count = {arguments.count}: at least 1")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise RecipeError(f"out = {str(arguments.out)!r}: exists and is not an empty folder")
    generator = Recipe.load(
        "fashion", steps=arguments.steps, cfg_scale=arguments.cfg_scale, seed=arguments.seed
    ).generator

    from dpfast.generate.guidance import GuidanceConfig
    from dpfast.generate.pipeline import Pipeline
    from dpfast.generate.sampler import GuidedSampler
    from dpfast.practice.run_folder import load_learner
    from dpfast.report.samples import write_samples

    pipeline = Pipeline.from_pretrained(arguments.pipeline)
    labels = _labels(arguments.labels, pipeline.class_names)
    learner = load_learner(arguments.learner, pipeline) if arguments.omega else None
    sampler = GuidedSampler(
        pipeline,
        learner,
        guidance=GuidanceConfig(omega=arguments.omega),
        steps=generator.steps,
        cfg_scale=generator.cfg_scale,
        seed=arguments.seed,
    )
    ordered = [label for label in labels for _ in range(arguments.count)]
    sheet = write_samples(sampler.stream(ordered), pipeline.class_names, arguments.out)
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


def _audit(arguments: argparse.Namespace) -> int:
    from dpfast.ops.audit import audit, missing, problems, record, table

    if reason := missing():
        raise RecipeError(reason)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise RecipeError(f"json = {str(arguments.json)!r}: no folder {str(arguments.json.parent)!r}")
    reports = audit(capabilities=arguments.capability)
    if arguments.json is not None:
        arguments.json.write_text("".join(f"{json.dumps(record(report))}\n" for report in reports))
    broken = sum(bool(problems(report)) for report in reports)
    print(f"{table(reports)}\n\n{len(reports) - broken} of {len(reports)} kernels keep their promises")
    return 1 if broken else 0


def _bench(arguments: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "run.py").is_file():
        raise RecipeError("bench: the benchmarks are part of a checkout; clone the repository and pip install -e it")
    sys.path.insert(0, str(root))
    from benchmarks.run import main as measure

    return int(measure([arguments.suite, *arguments.options]))


def _export(arguments: argparse.Namespace) -> int:
    from dpfast.pool.export import export_pool, import_pool

    pool, classes = import_pool(arguments.run)
    export_pool(pool, arguments.out, arguments.format, classes)
    print(f"{len(pool)} samples in {arguments.out}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from dpfast.report.doctor import report

    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
