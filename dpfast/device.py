"""Where models, batches and samples are: one decision for a run."""

from __future__ import annotations

import torch

from dpfast.config import RecipeError


def device_named(name: str) -> torch.device:
    """The device of a recipe's ``device``; "auto" is the current GPU, or the CPU where there is none.

    Raises ``RecipeError`` for an unknown name and for a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or name == "cuda:" or not (index or "0").isdecimal()):
        raise RecipeError(f"device = {name!r}: 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise RecipeError(f"device = {name!r}: torch {torch.__version__} finds {torch.cuda.device_count()} GPUs here")
    return torch.device(name)
