"""``dpfast export``: a run's samples, or a dataset's, in the files of other libraries."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpfast.cli import Next, add_device
from dpfast.cli.parser import Commands, add_command
from dpfast.config import RECIPE_FILE, RECIPES, read_recipe
from dpfast.errors import InputError


def add(commands: Commands) -> None:
    about = "write a run's samples for other libraries"
    example = "dpfast export runs/fashion --format imagefolder --out images"
    parser = add_command(
        commands, "export", export, about, example=example, page="guides/pool_and_loader.md"
    )
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="folder of a run, of a saved or exported pool, or of another's dataset",
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=("webdataset", "imagefolder", "parquet"),
        help="form of the files",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder for them, empty or new"
    )
    parser.add_argument(
        "--label-column",
        metavar="NAME",
        help="of another's dataset, where the labels are: a column, a key of .json or a suffix in "
        "a tar; by default label, the only ClassLabel, .cls, or class folders",
    )
    parser.add_argument(
        "--split",
        metavar="NAME",
        help="of another's dataset of several splits, train for one, train+test for both",
    )
    add_device(parser, "decoders that make images of latents for an image folder")


def export(arguments: argparse.Namespace) -> Next:
    from dpfast.generate.from_recipe import decoder_of_run
    from dpfast.hardware.device import device_named
    from dpfast.pool.export import export_pool
    from dpfast.pool.importing import import_pool
    from dpfast.terminal import Progress

    decode = decoder_of_run(arguments.run, device_named(arguments.device))
    with Progress(None, "sample", "read") as bar:
        pool, classes = import_pool(
            arguments.run,
            decode=decode,
            label_column=arguments.label_column,
            split=arguments.split,
            done=bar.update,
        )
    with Progress(len(pool), "sample", "written") as bar:
        export_pool(pool, arguments.out, arguments.format, classes, done=bar.update)
    print(f"{len(pool)} samples in {arguments.out}")
    words = ["dpfast", "run", _recipe(arguments.run), "--sources", "pool"]
    words += ["--pool-from", str(arguments.out)]
    return Next(("a learner of these samples alone", words))


def _recipe(run: Path) -> str:
    """Returns the recipe of a run by its name, where the package has it under this one."""
    try:
        name = str(read_recipe(run / RECIPE_FILE).get("name"))
    except InputError:  # another's dataset, or a saved pool
        name = ""
    return name if (RECIPES / f"{name}.toml").is_file() else "RECIPE"
