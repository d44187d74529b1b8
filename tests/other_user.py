"""Runs Python as a user without rights, home or entry in passwd, where root runs the tests."""

import os
import shutil
import subprocess
import sys

import pytest

USER = 12345
COMMAND = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", sys.executable]


def run_as_other_user(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The finished process of ``code``; skips the test where no other user can run this Python."""
    if os.getuid() or shutil.which("setpriv") is None:
        pytest.skip("only root can become another user, by setpriv")
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(sys.path)}
    options = {"env": environment, "capture_output": True, "encoding": "utf-8"}
    if subprocess.run([*COMMAND, "-c", "import torch"], **options).returncode:
        pytest.skip("another user may not read this Python")
    return subprocess.run([*COMMAND, "-c", code, *arguments], **options)
