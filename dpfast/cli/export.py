"""``dpfast export``: a run's samples for other libraries."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpfast.cli import Commands, add_device


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "export", help="write a run's samples for other libraries", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="folder of a run, or of a saved or exported pool")
    parser.add_argument("--format", required=True, choices=("webdataset", "imagefolder", "parquet"))
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the files; must be empty or new"
    )
    add_device(parser, "the decoder that makes images of latents for an image folder")
    parser.set_defaults(handler=export)


def export(arguments: argparse.Namespace) -> int:
    from dpfast.generate.from_recipe import decoder_of_run
    from dpfast.hardware.device import device_named
    from dpfast.pool.export import export_pool, import_pool

    decode = decoder_of_run(arguments.run, device_named(arguments.device))
    pool, classes = import_pool(arguments.run, decode=decode)
    export_pool(pool, arguments.out, arguments.format, classes)
    print(f"{len(pool)} samples in {arguments.out}")
    return 0
