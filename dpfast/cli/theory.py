"""``dpfast theory``: what random-matrix theory predicts for training on selected samples."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpfast.cli import Next, vacant
from dpfast.cli.parser import Commands, add_command
from dpfast.errors import InputError
from dpfast.extras import require
from dpfast.terminal import say

# |d / kept - 1| below it: the interpolation peak, as `dpfast bench theory` parts its cells
PEAK = 0.25


def add(commands: Commands) -> None:
    about = "predicted accuracy of training on selected samples"
    parser = commands.add_parser("theory", help=about)
    parts = parser.add_subparsers(title="commands", dest="part", required=True, metavar="COMMAND")
    about = "draw the paper's Figs. 3, 5c and 7 with simulation"
    page = "background/theory.md"
    example = "dpfast theory figures --out theory"
    drawing = add_command(parts, "figures", figures, about, example=example, page=page)
    drawing.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder for the PNG files"
    )
    drawing.add_argument(
        "--draws",
        type=int,
        default=20,
        metavar="N",
        help="draws of each simulated point (default: 20)",
    )
    drawing.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the simulation (default: 0)"
    )
    drawing.add_argument(
        "--study",
        type=Path,
        metavar="FILE",
        help="JSON lines of a study, to set beside the theory",
    )
    drawing.add_argument(
        "--guidance",
        type=Path,
        metavar="FILE",
        help="JSON lines of dpfast bench guidance, to set beside the theory's label noise",
    )
    drawing.add_argument(
        "--anchored",
        type=Path,
        metavar="FILE",
        help="JSON lines of dpfast bench anchored: the accuracies beside those of --guidance",
    )
    about = "samples that an accuracy takes, by kept fraction"
    example = "dpfast theory samples --accuracy 0.9 --d 100"
    sizes = add_command(parts, "samples", samples, about, example=example, page=page)
    sizes.add_argument(
        "--accuracy",
        type=float,
        required=True,
        metavar="X",
        help="accuracy to reach, between 0.5 and 1",
    )
    sizes.add_argument(
        "--d", type=int, required=True, metavar="N", help="dimensions of the features"
    )
    sizes.add_argument(
        "--keep",
        metavar="FRACTION,...",
        help="fractions that are kept (default: 1,0.9,0.8,0.5,0.3,0.2,0.1)",
    )
    sizes.add_argument(
        "--ridge",
        type=float,
        metavar="X",
        help="penalty, normalised by the pool (default: the best for each pool)",
    )
    sizes.add_argument(
        "--rho",
        type=float,
        default=1.0,
        metavar="X",
        help="cosine of the selecting vector and the truth (default: 1)",
    )
    sizes.add_argument(
        "--rho-g",
        type=float,
        metavar="X",
        help="cosine of the selecting vector and an imperfect generator of labels",
    )
    sizes.add_argument(
        "--rho-s",
        type=float,
        metavar="X",
        help="cosine of the selecting vector and the truth; --rho is then that of labels and truth",
    )
    sizes.add_argument(
        "--strategy",
        default="hard",
        choices=("hard", "easy", "soft"),
        help="which samples are kept (default: hard)",
    )
    sizes.add_argument(
        "--power", type=float, default=1.0, metavar="X", help="power of the soft rule (default: 1)"
    )


def figures(arguments: argparse.Namespace) -> Next:
    require("matplotlib")
    if arguments.draws < 2:
        raise InputError(f"draws = {arguments.draws}: expected at least 2, for a standard error")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise InputError(f"out = {str(arguments.out)!r}: is not a folder")

    from dpfast.report.points import points_of_study
    from dpfast.report.sweeps import measured_cells, measured_pruning, measured_sweeps
    from dpfast.theory.figures import study, write
    from dpfast.theory.guided import GuidedCell, beside_theory, label_noise
    from dpfast.theory.label_noise import Shares

    beside = noise = None
    if arguments.study is not None:
        beside = study(measured_sweeps(points_of_study(arguments.study)))
    if arguments.guidance is not None:
        measured = measured_cells(arguments.guidance, arguments.anchored)
        noise = beside_theory([GuidedCell(o, k, Shares(*s), g) for o, k, s, g in measured])
        pruned = measured_pruning(arguments.guidance)
    elif arguments.anchored is not None:
        raise InputError("anchored: needs --guidance, whose cells it is set beside")
    for made in write(arguments.out, draws=arguments.draws, seed=arguments.seed):
        print(
            f"{made.path}: {made.points} points, off by {made.mean:.4f} on average and "
            f"{made.largest:.4f} at most"
            f" (standard error {made.stderr:.4f})"
        )
    if beside is not None:
        path = arguments.out / "study.png"
        beside.savefig(path, dpi=110)
        print(path)
    if noise is not None:
        path = arguments.out / "label_noise.png"
        label_noise(noise, pruned).savefig(path, dpi=110)
        print(f"{path}: of guided samples, labels that are wrong, and the accuracy predicted")
        for row in noise:
            cell = row.cell
            print(
                f"omega {cell.omega:g}, kappa {cell.kappa:g}: learner wrong "
                f"{cell.found.selector_wrong:.1%}, label wrong {cell.found.label_wrong:.1%} "
                f"(selection alone {row.label_wrong:.1%}), accuracy {row.accuracy:.2%} "
                f"(selection alone {row.accuracy_of_selection:.2%})"
            )
    return Next(("these figures beside the paper's", ["dpfast", "paper", "figure3"]))


def samples(arguments: argparse.Namespace) -> Next:
    from dpfast.theory.pool_sizes import KEEPS, pool_sizes, table

    try:
        keeps = (
            [float(k) for k in arguments.keep.split(",")] if arguments.keep is not None else KEEPS
        )
    except ValueError:
        raise InputError(
            f"keep = {arguments.keep!r}: comma-separated fractions, as in 1,0.5,0.2"
        ) from None
    names = ("d", "ridge", "rho", "rho_g", "rho_s", "strategy", "power")
    made = pool_sizes(
        arguments.accuracy, keeps=keeps, **{name: getattr(arguments, name) for name in names}
    )
    say(table(made))
    peak = [row for row in made if row.kept is not None and abs(arguments.d / row.kept - 1) < PEAK]
    if peak:
        near = ", ".join(f"{row.keep:g}" for row in peak)
        say(
            f"\nkeep {near}: about as many kept samples as dimensions, where the theory is least "
            "exact"
        )
    figures = ["dpfast", "theory", "figures", "--out", str(vacant(Path("theory")))]
    return Next(("the paper's figures of it, with simulation", figures))
