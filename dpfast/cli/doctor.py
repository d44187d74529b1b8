"""``dpfast doctor``: what is installed, which backend every operation uses, and what to install for
the rest.
"""

from __future__ import annotations

import argparse
import platform
import warnings
from importlib import metadata

from dpfast.cli import Next
from dpfast.cli.parser import Commands, add_command
from dpfast.extras import install_command
from dpfast.terminal import say

# A distribution -> what it is imported as, and what it is for.
OPTIONAL = {
    "transformers": ("transformers", "the embedded learner, Stable Diffusion's text encoder"),
    "accelerate": ("accelerate", "loads large weights without a second copy"),
    "matplotlib": ("matplotlib", "reports and figures"),
    "tensorboard": ("tensorboard", "a run's numbers for TensorBoard"),
    "nvidia-dali-cuda130": ("nvidia.dali", "the DALI loader, which decodes JPEG"),
    "timm": ("timm", "timm learners; needs torchvision"),
    "xformers": ("xformers", "attention by xformers; must match the torch build"),
    "pyarrow": ("pyarrow", "parquet files of dpfast export"),
    "wandb": ("wandb", "the tracker Weights & Biases"),
    "mlflow": ("mlflow", "the tracker MLflow"),
    "trackio": ("trackio", "the tracker Trackio"),
}
CORE = ("dpfast", "torch", "triton", "numpy", "diffusers", "safetensors")


def add(commands: Commands) -> None:
    about = "what is installed, what is missing, what runs where"
    page = "guides/troubleshoot.md"
    add_command(commands, "doctor", doctor, about, example="dpfast doctor", page=page)


def doctor(arguments: argparse.Namespace) -> Next:
    say(installation())
    return Next(("the loop on this machine, in minutes", ["dpfast", "run", "fashion"]))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def installation() -> str:
    """Returns the installation as text, one fact a line."""
    import torch

    from dpfast.hardware.cpus import cpu_counts
    from dpfast.hardware.memory import free_memory
    from dpfast.ops.dispatch import OPERATIONS
    from dpfast.pool.memory_tiers import readable

    lines = [
        f"Python {platform.python_version()} on {platform.machine()}, "
        f"{torch.get_num_threads()} torch threads"
    ]
    lines += [f"  {name:<20} {_version(name) or 'MISSING'}" for name in CORE]
    lines.append("Optional")
    for name, (package, purpose) in OPTIONAL.items():
        version = _version(name)
        lines.append(
            f"  {name:<20} {version or 'not installed'} - {purpose}"
            + ("" if version else f": {install_command(package)}")
        )
    lines.append("Host memory that is free to this job: the least counts, and local ranks share it")
    for free in free_memory():
        within = "" if free.limit is None else f" of {readable(free.limit)}"
        lines.append(f"  {readable(free.bytes)}{within}, by {free.source}")
    lines.append("CPUs of this job: the least counts, and local ranks share it")
    lines += [f"  {count.cpus}, by {count.source}" for count in cpu_counts()]
    gpu = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else "none; everything runs on the CPU"
    )
    lines += [f"GPU: {gpu}", "Backend of every operation"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
            lines += [
                f"  {operation:<20} {device}: {_backend(operation, device)}"
                for operation in OPERATIONS
            ]
    lines += [f"  note: {warning.message}" for warning in caught]
    return "\n".join(lines)


def _backend(operation: str, device: str) -> str:
    from dpfast.ops import backend_of

    try:
        return backend_of(operation, device)
    except RuntimeError as error:
        return f"unusable: {error}"
