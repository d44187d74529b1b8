"""Processes of a suite's own."""

from __future__ import annotations

import sys

from benchmarks import ROOT


def command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of the benchmarks in a process of its own.

    It starts in the current folder, whose relative paths it so understands, and takes no module of
    that folder for one of the benchmarks.
    """
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); "
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", code, *arguments]
