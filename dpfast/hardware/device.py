"""The place of models, batches and samples: one decision for a run, and one question to a
device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from dpfast.errors import InputError

GPUS = {
    "cuda"
    # torch's types of devices with streams and graphs; a rehearsal adds the one that stands for a
    # GPU
}


def is_gpu(device: torch.device) -> bool:
    """Returns True if work on ``device`` goes through streams, may be captured and must not be
    waited for.
    """
    return device.type in GPUS


def device_named(name: str, *, rank: int = 0, ranks: int = 1) -> torch.device:
    """Returns the device of a recipe's ``device``; "auto" is the current GPU, or the CPU where
    there is none.

    rank: this process's number on its machine; ranks: how many processes the run has. Of several
    each takes the GPU of its number on its machine; "cuda:N" is for one alone.

    Raises ``InputError`` for an unknown name and for a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if ranks > 1 and kind == "cuda":
        if index:
            raise InputError(f"device = {name!r}: {ranks} ranks need a GPU each; expected 'cuda'")
        index = str(rank)
        name = f"cuda:{index}"
    if name != "cpu" and (kind != "cuda" or name == "cuda:" or not (index or "0").isdecimal()):
        raise InputError(f"device = {name!r}: expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device = {name!r}: torch {torch.__version__} "
            f"finds {torch.cuda.device_count()} GPUs here"
        )
    return torch.device(name)


def device_of(device: torch.device | str) -> torch.device:
    """Returns an argument's device: itself, or the one that ``device_named`` knows by its name.

    Raises ``InputError`` for an unknown name and for a GPU that is not there.
    """
    if isinstance(device, torch.device) and device.type != "cuda":
        return device
    return device_named(str(device))


@contextlib.contextmanager
def searched_convolutions(device: torch.device, *, static: bool) -> Iterator[None]:
    """Lets cuDNN measure its algorithms for each new shape of a convolution, and keep the fastest.

    It pays where shapes repeat (``static``). torch keeps the choice by shape and thread, so this is
    on before the first convolution of a shape. Off where determinism is asked for: the fastest
    algorithm differs from process to process, and its bits.
    """
    exact = torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or (static and device.type == "cuda" and not exact)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
