"""A diffusers pipeline folder on disk: its index, its parts, its class names. Only safetensors
weights are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from dpfast.config import ASSETS, pipeline_folder
from dpfast.errors import InputError, first_line
from dpfast.extras import installed
from dpfast.files import below, check_readable, is_folder, there
from dpfast.textfiles import read_json


class PipelineFolder:
    """``source`` is a folder, or names an embedded asset (``pipeline_folder``). Every error is an
    ``InputError`` that names the folder.

    Models are loaded by the classes that the caller names, never by what ``model_index.json`` asks
    for, and a model whose file lacks weights is refused: diffusers would fill them with random
    numbers.
    """

    def __init__(self, source: str | Path) -> None:
        self.path = pipeline_folder(source)
        if not is_folder(self.path):
            names = ", ".join(sorted(p.parent.name for p in ASSETS.glob("*/model_index.json")))
            raise self.error(
                f"no such folder; expected a diffusers pipeline folder or one of: {names}"
            )
        index = self.path / "model_index.json"
        if not index.is_file():
            raise self.error("not a diffusers pipeline folder, it has no model_index.json")
        for file in below(self.path):  # diffusers calls what may not be read missing
            if there(file):
                check_readable(file)
        self.index = self._json(index)
        if not isinstance(self.index, dict):
            raise self.error("model_index.json is not a table")
        self.kind = str(self.index.get("_class_name"))

    def error(self, what: str) -> InputError:
        return InputError(f"pipeline = {str(self.path)!r}: {what}")

    def _json(self, path: Path) -> Any:
        return read_json(path)

    def class_of(self, part: str) -> str | None:
        """The class that the index gives for a part; None where the pipeline was saved without
        it.
        """
        entry = self.index.get(part)
        return entry[1] if isinstance(entry, list) and len(entry) == 2 and entry[1] else None

    def need(self, *parts: str) -> None:
        """Raises unless the folder has these parts."""
        for part in parts:
            if not (self.path / part).is_dir():
                raise self.error(f"the folder has no part {part!r}, which a {self.kind} needs")

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of a part as its file says it, without defaults. Raises where there is
        none.
        """
        self.need(part)
        path = self.path / part / "config.json"
        if not path.is_file():
            raise self.error(f"{part!r} has no config.json")
        config = self._json(path)
        if not isinstance(config, dict):
            raise self.error(f"{part!r}: config.json is not a table")
        return config

    def check_weights(self, part: str) -> None:
        """Raises unless every file of a part's weights is there and as long as its header says."""
        self.need(part)
        files = list((self.path / part).glob("*.safetensors"))
        if not files:
            raise self.error(
                f"{part!r} has no .safetensors weights; pickled weights are refused, and "
                "diffusers' save_pretrained turns them into the other kind"
            )
        for index in (self.path / part).glob("*.safetensors.index.json"):
            named = {self.path / part / name for name in self._json(index)["weight_map"].values()}
            lacking = sorted(file.name for file in named - set(files))
            if lacking:
                raise self.error(f"{part!r} lacks {lacking[0]}, which {index.name} names")
        for file in files:
            try:
                with safe_open(file, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise self.error(
                    f"{part!r}: {file.name} is damaged or cut short: {first_line(error)}"
                ) from error

    def model(self, kind: Any, part: str, *, device: torch.device | str, dtype: torch.dtype) -> Any:
        """A model of diffusers or transformers, frozen, in eval mode."""
        cast: dict[str, Any] = {"dtype": dtype}
        if issubclass(kind, diffusers.ModelMixin):
            cast = {**dtype_option(dtype), "low_cpu_mem_usage": installed("accelerate")}
        self.check_weights(part)
        try:
            model, found = kind.from_pretrained(
                self.path / part, use_safetensors=True, output_loading_info=True, **cast
            )
        except Exception as error:  # diffusers, transformers and safetensors each raise their own
            raise self.error(
                f"{part!r} cannot be loaded as a {kind.__name__}: {first_line(error)}"
            ) from error
        if found["missing_keys"]:
            missing = sorted(found["missing_keys"])
            raise self.error(
                f"{part!r} lacks {len(missing)} weights of a "
                f"{kind.__name__}, the first is {missing[0]}"
            )
        return model.to(device).eval().requires_grad_(False)

    def class_names(self, given: Sequence[str] | None) -> tuple[str, ...] | None:
        """``given``, or what the folder says in class_names.json (a list) or in the index's
        id2label, or None.
        """
        if given is not None:
            return self._checked(given, "class_names")
        path = self.path / "class_names.json"
        if path.is_file():
            return self._checked(self._json(path), "class_names.json")
        if not self.index.get("id2label"):
            return None
        try:
            names = {int(key): value for key, value in self.index["id2label"].items()}
        except (AttributeError, ValueError) as error:
            raise self.error(
                "id2label in model_index.json is not a table with the ids 0, 1, 2, ..."
            ) from error
        if sorted(names) != list(range(len(self.index["id2label"]))):
            raise self.error("id2label in model_index.json needs the ids 0, 1, 2, ... without gaps")
        return self._checked([names[i] for i in range(len(names))], "id2label")

    def _checked(self, names: Any, where: str) -> tuple[str, ...]:
        if isinstance(names, str) or not isinstance(names, (list, tuple)) or not names:
            raise self.error(f"{where} = {names!r}: expected a list of at least one name")
        wrong = [name for name in names if not isinstance(name, str) or not name.strip()]
        if wrong:
            raise self.error(f"{where}: {wrong[0]!r} is no name; expected text")
        return tuple(names)


def dtype_option(dtype: torch.dtype) -> dict[str, Any]:
    """The dtype of weights as an option of diffusers' ``from_pretrained``. From 0.42 on
    ``torch_dtype`` is deprecated; before it, ``dtype`` was ignored.
    """
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if version >= (0, 42) else "torch_dtype": dtype}
