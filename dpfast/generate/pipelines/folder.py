"""A diffusers pipeline folder on disk: its index, its parts, its class names. Only safetensors
weights are read.

A part's weights may be there in several variants ("fp16", "ema"), told by the names of their files:
model.safetensors, model.fp16.safetensors, model.fp16-00001-of-00002.safetensors.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from dpfast.config import ASSETS
from dpfast.errors import InputError, first_line
from dpfast.extras import installed
from dpfast.files import below, check_readable, is_folder, listed, there
from dpfast.generate.pipelines import hub
from dpfast.generate.pipelines.lora import NETWORKS, Lora, LoraFile
from dpfast.textfiles import read_json

TINY = "tiny_decoder"
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?(?:-\d{5}-of-\d{5})?"
    r"(?:\.(?P<former>[\w-]+))?\.safetensors"
)


class PipelineFolder:
    """A pipeline folder on the disk. Every error is an ``InputError`` that names the folder.

    Models are loaded by the classes that the caller names, never by what ``model_index.json`` asks
    for, and a model whose file lacks weights is refused: diffusers would fill them with random
    numbers.

    Args:
        source: a folder, the name of an embedded asset, or a model of the Hub that its cache has
            (``dpfast.generate.pipelines.hub.located``).
        revision: branch, tag or commit of a model of the Hub; "": its main branch.
        variant: of the weights, where a part has it; "": files without one.
        lora: files that are fused into the models, as ``dpfast.generate.pipelines.lora.LoraFile``
            reads them.
        tiny_decoder: folder of an ``AutoencoderTiny`` or a model of the Hub, in place of the part
            "tiny_decoder"; "": that part, where the folder has one.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        revision: str = "",
        variant: str = "",
        tiny_decoder: str | Path = "",
        lora: Sequence[str] = (),
    ) -> None:
        self.source = str(source)
        self.variant = variant
        self.path = hub.located(source, revision)
        self.elsewhere: dict[str, Path] = {}
        self.lora_files = [LoraFile.of(text) for text in lora]
        if not is_folder(self.path):
            names = ", ".join(sorted(p.parent.name for p in ASSETS.glob("*/model_index.json")))
            raise self.error(
                f"no such folder; expected a diffusers pipeline folder or one of: {names}; or "
                "OWNER/NAME of a model of the Hub"
            )
        index = self.path / "model_index.json"
        if not index.is_file():
            raise self.lacking("not a diffusers pipeline folder, it has no model_index.json")
        for file in below(self.path):  # diffusers calls what may not be read missing
            if there(file):
                check_readable(file)
        self.index = self._json(index)
        if not isinstance(self.index, dict):
            raise self.error("model_index.json is not a table")
        self.kind = str(self.index.get("_class_name"))
        if tiny_decoder:
            self._take(TINY, tiny_decoder, "AutoencoderTiny")

    def _take(self, part: str, source: str | Path, kind: str) -> None:
        """Has a part from a folder of its own, or from the Hub's cache."""
        path = hub.located(source, field=part)
        if not is_folder(path):
            raise InputError(
                f"{part} = {str(source)!r}: no such folder; expected one of an {kind}, as its "
                "save_pretrained writes it, or a model of the Hub"
            )
        self.elsewhere[part] = path
        named = self.config(part).get("_class_name")
        if named != kind:
            raise InputError(f"{part} = {str(source)!r}: {named}; expected {kind}")

    @property
    def name(self) -> str:
        """The name that its user knows: its path, or its name on the Hub."""
        return self.source if hub.is_model_id(self.source) else str(self.path)

    def error(self, what: str) -> InputError:
        return InputError(f"pipeline = {self.name!r}: {what}")

    def lacking(self, what: str, part: str = "") -> InputError:
        """Returns the error for something that is not there, with what completes a download."""
        hint = hub.hint(self.elsewhere.get(part, self.path))
        return hub.IncompleteError(f"{self.error(what)}{hint}") if hint else self.error(what)

    def place(self, part: str) -> Path:
        """Returns the folder of a part."""
        return self.elsewhere.get(part, self.path / part)

    def has(self, part: str) -> bool:
        """Returns True if the folder has a part of this name."""
        return self.place(part).is_dir()

    def _json(self, path: Path) -> Any:
        return read_json(path)

    def class_of(self, part: str) -> str | None:
        """Returns the class that the index gives for a part; None where the pipeline was saved
        without it.
        """
        entry = self.index.get(part)
        return entry[1] if isinstance(entry, list) and len(entry) == 2 and entry[1] else None

    def need(self, *parts: str) -> None:
        """Raises unless the folder has these parts."""
        for part in parts:
            if not self.has(part):
                raise self.lacking(f"the folder has no part {part!r}, which a {self.kind} needs")

    def config(self, part: str) -> dict[str, Any]:
        """Returns the configuration of a part as its file says it, without defaults. Raises where
        there is none.
        """
        self.need(part)
        path = self.place(part) / "config.json"
        if not path.is_file():
            raise self.lacking(f"{part!r} has no config.json", part)
        config = self._json(path)
        if not isinstance(config, dict):
            raise self.error(f"{part!r}: config.json is not a table")
        return config

    def check_weights(self, part: str) -> None:
        """Raises unless every file of the weights that are read of a part is there and as long as
        its header says.
        """
        self.config(part)
        variant, files = self._weights(part)
        place, suffix = self.place(part), f".{variant}" if variant else ""
        for pattern in (f"*.safetensors.index{suffix}.json", f"*.safetensors{suffix}.index.json"):
            for index in listed(place, pattern):
                named = {place / name for name in self._json(index)["weight_map"].values()}
                lacking = sorted(file.name for file in named - set(files))
                if lacking:
                    raise self.lacking(
                        f"{part!r} lacks {lacking[0]}, which {index.name} names", part
                    )
        for file in files:
            if not there(file):
                raise self.lacking(f"{part!r} lacks {file.name}, a link that leads nowhere", part)
            try:
                with safe_open(file, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                words = f"{part!r}: {file.name} is damaged or cut short: {first_line(error)}"
                raise self.lacking(words, part) from error

    def _weights(self, part: str) -> tuple[str, list[Path]]:
        """Returns the variant of a part's weights that is read, "" for none, and its files."""
        self.need(part)
        found: dict[str, list[Path]] = {}
        for file in listed(self.place(part), "*.safetensors"):
            name = WEIGHTS.fullmatch(file.name)
            variant = (name["variant"] or name["former"] or "") if name else ""
            found.setdefault(variant, []).append(file)
        variant = self.variant if self.variant in found else ""
        if variant in found:
            return variant, found[variant]
        if found:
            has = " and ".join(map(repr, found))
            raise self.error(
                f"{part!r} has weights of the variant {has} alone; "
                f"say --variant {next(iter(found))}"
            )
        if listed(self.place(part), "*.bin"):
            raise self.error(
                f"{part!r} has no .safetensors weights; pickled weights are refused, and "
                "diffusers' save_pretrained turns them into the other kind"
            )
        raise self.lacking(f"{part!r} has no .safetensors weights", part)

    def check_variant(self, parts: Sequence[str]) -> None:
        """Raises unless one of the parts has weights of the variant that was asked for."""
        if self.variant and all(self._weights(part)[0] != self.variant for part in parts):
            raise self.error(
                f"variant = {self.variant!r}: none of its weights are of it "
                f"({', '.join(parts)}); leave it out"
            )

    def model(self, kind: Any, part: str, *, device: torch.device | str, dtype: torch.dtype) -> Any:
        """Returns a model of diffusers or transformers, frozen, in eval mode; on the device meta of
        its configuration alone.
        """
        if torch.device(device).type == "meta":
            return self._described(kind, part, dtype).eval().requires_grad_(False)
        cast: dict[str, Any] = {"dtype": dtype}
        if issubclass(kind, diffusers.ModelMixin):
            cast = {**dtype_option(dtype), "low_cpu_mem_usage": installed("accelerate")}
        self.check_weights(part)
        try:
            model, found = kind.from_pretrained(
                self.place(part),
                use_safetensors=True,
                variant=self._weights(part)[0] or None,
                output_loading_info=True,
                **cast,
            )
        except Exception as error:  # diffusers, transformers and safetensors each raise their own
            why = first_line(error)
            if "ignore_mismatched_sizes" in why:  # of transformers, whose reasons are in its log
                why = "its weights are not of the shapes that its config.json says"
            raise self.error(f"{part!r} cannot be loaded as a {kind.__name__}: {why}") from error
        if found["missing_keys"]:
            missing = sorted(found["missing_keys"])
            raise self.error(
                f"{part!r} lacks {len(missing)} weights of a "
                f"{kind.__name__}, the first is {missing[0]}"
            )
        model.requires_grad_(False)
        for lora in self.loras:
            lora.fuse(part, model)
        return model.to(device).eval()

    @functools.cached_property
    def loras(self) -> list[Lora]:
        """The LoRA files that are fused into the models. Raises ``InputError`` for a file of
        another kind.
        """
        network = next((part for part in NETWORKS if self.class_of(part)), None)
        config = self.config(network) if self.lora_files and network else {}
        loras = [Lora.read(given, self.kind, config) for given in self.lora_files]
        for lora in loras:
            for part in lora.parts:
                if self.class_of(part) is None:
                    raise InputError(
                        f"{lora.given.error}: changes {part!r}, which pipeline = {self.name!r} "
                        "does not have"
                    )
        return loras

    def _described(self, kind: Any, part: str, dtype: torch.dtype) -> Any:
        """Returns a model of diffusers without weights."""
        self.config(part)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                return kind.from_config(kind.load_config(self.place(part)))
        except Exception as error:  # whatever diffusers meets in options that it does not check
            raise self.error(
                f"{part!r} cannot be loaded as a {kind.__name__}: {first_line(error)}"
            ) from error
        finally:
            torch.set_default_dtype(before)

    def class_names(self, given: Sequence[str] | None) -> tuple[str, ...] | None:
        """Returns ``given``, or what the folder says in class_names.json (a list) or in the index's
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
    """Returns the dtype of weights as an option of diffusers' ``from_pretrained``. From 0.42 on
    ``torch_dtype`` is deprecated; before it, ``dtype`` was ignored.
    """
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if version >= (0, 42) else "torch_dtype": dtype}
