"""The arguments of a suite: errors as those of every command of dpfast."""

from __future__ import annotations

import argparse

from dpfast.cli.parser import Parser


def new_parser(suite: str, about: str | None) -> Parser:
    """The parser of ``dpfast bench SUITE``. about: the suite's docstring, whose first line
    is told.
    """
    return Parser(prog=f"dpfast bench {suite}", description=(about or "").strip().splitlines()[0])


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device`` as a ``torch.device``, as of ``dpfast run``: the GPU that is there by
    default.
    """
    from dpfast.hardware.device import device_named

    parser.add_argument(
        "--device",
        type=device_named,
        default="auto",
        help="cpu, cuda or cuda:N; default: a GPU if there is",
    )
