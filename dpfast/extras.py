"""Packages that only some uses need, and the command that installs each.

``pip install dpfast`` gives the operations and the sampler. What a run of the demo needs beside
them is the extra "run".
"""

from __future__ import annotations

import importlib.util

from dpfast.errors import InputError

# What is imported -> the extra of pyproject.toml that installs it.
EXTRAS = {
    "transformers": "run",
    "accelerate": "run",
    "matplotlib": "run",
    "tensorboard": "run",
    "nvidia.dali": "dali",
    "timm": "timm",
    "xformers": "xformers",
    "pyarrow": "export",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}


def install_command(package: str) -> str:
    """Returns the command that installs a package of ``EXTRAS``."""
    return f"pip install 'dpfast[{EXTRAS[package]}]'"


def installed(package: str) -> bool:
    """Returns True if ``package`` can be imported; it is not imported for that."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a package whose parent is missing
        return False


def require(*packages: str) -> None:
    """Raises ``InputError`` that names the packages that are missing and what installs them.

    packages: of ``EXTRAS``. None of them is imported.
    """
    missing = [package for package in packages if not installed(package)]
    if missing:
        commands = " and ".join(dict.fromkeys(map(install_command, missing)))
        verb = "is" if len(missing) == 1 else "are"
        raise InputError(f"{', '.join(missing)} {verb} not installed; {commands}")
