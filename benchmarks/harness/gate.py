"""No speed-up without correctness: an operation's own tests run before it is timed."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

from benchmarks import CHECKOUT, ROOT
from dpfast.textfiles import lines


@functools.cache
def failure(tests: str) -> str | None:
    """None where the tests in the file `tests` pass, else the last lines of their report.

    The tests run in a process of their own without the marked slow ones and without the
    interpreter. A wheel has no tests: there the result is None, and that is said once.
    """
    if not CHECKOUT:
        _untested()
        return None
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        tests,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8"
    )
    return None if result.returncode == 0 else "\n".join(lines(result.stdout + result.stderr)[-12:])


@functools.cache
def _untested() -> None:
    print(
        "the tests are part of a checkout and do not run: what is timed was only compared with its "
        "rivals, where it has any",
        file=sys.stderr,
    )
