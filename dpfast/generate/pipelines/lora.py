"""LoRA weights (Hu et al. 2021, arXiv 2106.09685), fused into models when they are loaded:

    W <- W + weight alpha / r  B A      A: (r, in), B: (out, r), of a linear layer or convolution

Names of layers in the formats of diffusers, PEFT and kohya are read by diffusers' own conversions.
What is no such product (DoRA, LoHa, LoKr, biases) is refused. A fused model costs nothing more.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.state_dict_utils import (
    DIFFUSERS_OLD_TO_PEFT,
    DIFFUSERS_TO_PEFT,
    UNET_TO_DIFFUSERS,
    convert_state_dict,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dpfast.errors import LARGEST, InputError, first_line
from dpfast.files import is_folder, listed, there
from dpfast.generate.pipelines import hub

log = logging.getLogger(__name__)
NETWORKS = ("unet", "transformer")
TEXT = DIFFUSERS_OLD_TO_PEFT | DIFFUSERS_TO_PEFT  # names of layers of text encoders
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[\w-]+)?\.weight")


@dataclass(frozen=True)
class LoraFile:
    """A file of safetensors and its weight, as "PATH:WEIGHT" or "owner/name@REVISION:WEIGHT" names
    them.
    """

    text: str
    file: Path
    weight: float

    @classmethod
    def of(cls, text: str) -> LoraFile:
        """Raises ``InputError`` where there is no such file, or several in a folder, and for a
        weight that is no finite number.
        """
        place, weight = _parted(text)
        path, name = Path(place), ""
        if not there(path) and place.count("/") > 1 and place.endswith(".safetensors"):
            owner, model, name = place.split("/", 2)
            path = hub.located(f"{owner}/{model}", field="lora") / name
        elif not there(path) or is_folder(path):
            path = hub.located(place, field="lora")
        if is_folder(path):
            files = listed(path, "*.safetensors")
            if len(files) != 1:
                has = ", ".join(file.name for file in files) or "none"
                raise InputError(
                    f"lora = {text!r}: expected one file of safetensors in the folder, it has "
                    f"{has}; say which, as {place}/FILE"
                )
            (path,) = files
        if not there(path):
            raise InputError(
                f"lora = {text!r}: no such file; expected PATH[:WEIGHT], or OWNER/NAME[:WEIGHT] of "
                "a model on the Hub"
            )
        return cls(text, path, weight)

    @property
    def error(self) -> str:
        """The beginning of errors about this file."""
        return f"lora = {self.text!r}"


def model_id(text: str) -> str:
    """Returns the "owner/name" on the Hub of what a recipe's ``lora`` names, with its revision
    if it has one; empty for a path.
    """
    place, _ = _parted(text)
    if there(Path(place)):
        return ""
    model = "/".join(place.split("/")[:2])
    known = place == model or place.endswith(".safetensors")
    return model if known and hub.is_model_id(hub.parted(model)[0]) else ""


def _parted(text: str) -> tuple[str, float]:
    """Returns the place and the weight."""
    place, colon, number = text.rpartition(":")
    if not colon or there(Path(text)):
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not abs(weight) <= LARGEST or not place:
        raise InputError(
            f"lora = {text!r}: {number!r} is no weight; expected a finite number of float32"
        )
    return place, weight


class Layer(NamedTuple):
    """The two factors of a layer's change, and what their product is multiplied by."""

    down: Tensor  # (r, in, ...)
    up: Tensor  # (out, r, ...)
    scale: float

    def change(self) -> Tensor:
        """Returns the change of the weights, float32."""
        down, up = self.down.float(), self.up.float()
        if down.dim() <= 2 or up.dim() <= 2:
            return self.scale * (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])
        product = nn.functional.conv2d(down.transpose(0, 1), up, padding=up.shape[-1] - 1)
        return self.scale * product.transpose(0, 1)


@dataclass(frozen=True)
class Lora:
    """The layers of a file, by part of the folder and by module."""

    given: LoraFile
    parts: dict[str, dict[str, Layer]]

    @classmethod
    def read(cls, given: LoraFile, kind: str, config: dict[str, Any]) -> Lora:
        """Reads a file for a pipeline of a kind, whose network has this configuration.

        Raises ``InputError`` for a kind whose diffusers pipeline takes no LoRA, a file that is
        damaged or holds other things, and layers of parts that are not known.
        """
        pipeline: Any = getattr(diffusers, kind, None)
        if not hasattr(pipeline, "lora_state_dict"):
            raise InputError(f"{given.error}: a {kind} takes no LoRA; leave it out")
        try:
            with safe_open(given.file, "pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                noted = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{given.error}: {given.file.name} is no file of safetensors, or is damaged: "
                f"{first_line(error)}"
            ) from error
        strange = [name for name in weights if "lora" not in name and not name.endswith(".alpha")]
        if strange or not weights or any("dora" in name or "magnitude" in name for name in weights):
            what = strange[0] if strange else next(iter(sorted(weights, reverse=True)), "nothing")
            raise InputError(
                f"{given.error}: holds {what!r}; expected the factors of LoRA alone, in the format "
                "of diffusers, PEFT or kohya"
            )
        options: dict[str, Any] = {"unet_config": _Config(config)}
        if "return_alphas" in inspect.signature(pipeline.lora_state_dict).parameters:
            options["return_alphas"] = True
        try:
            found = pipeline.lora_state_dict(dict(weights), **options)
            state, alphas = found if isinstance(found, tuple) else (found, None)
            settings = json.loads(noted.get(LORA_ADAPTER_METADATA_KEY, "{}"))
            parts = _parts(state, alphas or {}, settings)
        except InputError as error:
            raise InputError(f"{given.error}: {error}") from None
        except Exception as error:  # of diffusers' conversions
            raise InputError(
                f"{given.error}: is in no format that diffusers reads for a {kind}: "
                f"{first_line(error)}"
            ) from error
        return cls(given, parts)

    @torch.no_grad()
    def fuse(self, part: str, model: nn.Module) -> None:
        """Adds the changes of a part's layers to its weights. Raises ``InputError`` for a layer
        that the model does not have, or of another shape.
        """
        layers = self.parts.get(part)
        if not layers:
            return
        modules = dict(model.named_modules())
        for name, layer in layers.items():
            # transformers has taken a level out of CLIP's text model
            module: Any = modules.get(name) or modules.get(name.removeprefix("text_model."))
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or not isinstance(module, nn.Linear | nn.Conv2d):
                raise InputError(
                    f"{self.given.error}: changes {part}.{name}, which this {part!r} does not "
                    "have; it is for another architecture"
                )
            change = self.given.weight * layer.change()
            if (
                change.squeeze().shape != weight.squeeze().shape
            ):  # or a layer as a 1 x 1 convolution
                raise InputError(
                    f"{self.given.error}: changes {part}.{name}, of shape {tuple(weight.shape)}, "
                    f"by {tuple(change.shape)}; it is for another architecture"
                )
            changed = weight.float() + change.view_as(weight).to(weight.device)
            weight.copy_(changed)  # rounded once
        log.info("%d layers of %s changed by %s", len(layers), part, self.given.text)


class _Config(dict[str, Any]):
    """A configuration whose values are attributes as well, as diffusers' conversions read it."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def _parts(
    state: dict[str, Tensor], alphas: dict[str, float], noted: dict[str, Any]
) -> dict[str, dict[str, Layer]]:
    """Returns the layers of a file whose names begin with their parts.

    alphas: of layers, by their names in the state; noted: of the adapter's configuration, by part.
    """
    found: dict[str, dict[str, Layer]] = {}
    for part in sorted({name.split(".")[0] for name in state}):
        if part not in NETWORKS and not part.startswith("text_encoder"):
            raise InputError(f"changes {part!r}, which is no part of a pipeline")
        named, scales = _of_part(part, state), _of_part(part, alphas)
        settings = {
            name.removeprefix(f"{part}."): value
            for name, value in noted.items()
            if name.startswith(f"{part}.")
        }
        if settings.get("use_dora") or settings.get("lora_bias"):
            raise InputError("is DoRA or has biases; expected the factors of LoRA alone")
        factors: dict[str, dict[str, Tensor]] = {}
        for name, value in named.items():
            match = FACTOR.fullmatch(name)
            if match is not None:
                factors.setdefault(match["module"], {})[match["side"]] = value
            elif name.endswith(".alpha"):
                scales[name] = float(value)
            else:
                raise InputError(f"holds {part}.{name}; expected the factors of LoRA alone")
        found[part] = {}
        for module, pair in factors.items():
            if pair.keys() != {"A", "B"}:
                raise InputError(f"has one factor alone of {part}.{module}")
            rank = len(pair["A"])
            scale = _scale(module, rank, scales.get(f"{module}.alpha"), settings)
            found[part][module] = Layer(pair["A"], pair["B"], scale)
    return found


def _of_part(part: str, entries: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of a part, by PEFT's names of its layers."""
    named = {
        name.removeprefix(f"{part}."): value
        for name, value in entries.items()
        if name.startswith(f"{part}.")
    }
    table = UNET_TO_DIFFUSERS if part in NETWORKS else TEXT
    found = {}
    for name, value in named.items():
        bare = name.removesuffix(".alpha")  # kohya's goes by the name of a factor
        (key,) = convert_state_dict({bare: value}, table)
        found[key if bare == name else f"{key.split('.lora_')[0]}.alpha"] = value
    return found


def _scale(module: str, rank: int, alpha: float | None, settings: dict[str, Any]) -> float:
    """Returns alpha / r of a layer: its own alpha, else that of the adapter's configuration, else
    1.
    """
    if alpha is None:
        alpha = settings.get("lora_alpha", rank)
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT matches it
                alpha = value
                break
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
