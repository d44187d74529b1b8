"""A class-conditional pipeline folder of diffusers, loaded into the parts that a sampler needs."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from dpfast.config import ASSETS, RecipeError
from dpfast.generate.decoder import Decoder, TinyDecoder, VaeDecoder
from dpfast.generate.denoiser import Denoiser, DiTDenoiser
from dpfast.ops.guided_step import Prediction


@dataclass(frozen=True)
class Pipeline:
    """The parts of a class-conditional pipeline folder that a sampler needs."""

    folder: Path
    denoiser: Denoiser
    decoder: Decoder  # of the final images
    guidance_decoder: Decoder  # of the guidance path: the tiny decoder where the folder has one
    scheduler: Any
    class_names: tuple[str, ...]
    image_channels: int
    device: torch.device

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: torch.device | str = "cpu", attention: str = "sdpa"
    ) -> Pipeline:
        """Loads a folder that ``diffusers.DiTPipeline.from_pretrained`` loads, in float32, from safetensors only.

        ``source`` is a folder or the name of an embedded asset ("fashion"). An optional ``tiny_decoder``
        (``AutoencoderTiny``) beside the pipeline's own parts serves the guidance path. ``attention`` is "sdpa" or
        "xformers"; the latter warns on import when its build does not match torch, so it is never the default.

        Raises ``RecipeError`` when the folder, its ``model_index.json`` or one of its parts is missing, or xformers.
        """
        if attention == "xformers" and importlib.util.find_spec("xformers") is None:
            raise RecipeError("attention = 'xformers': not installed; pip install 'dpfast[xformers]', or use 'sdpa'")
        embedded = ASSETS / str(source)
        folder = embedded if (embedded / "model_index.json").is_file() else Path(source)
        index = _index(folder)
        for part in ("transformer", "vae", "scheduler"):
            if not (folder / part).is_dir():
                raise RecipeError(
                    f"pipeline = {str(source)!r}: the folder has no part {part!r}, which its model_index.json names"
                )
        transformer = _model(diffusers.DiTTransformer2DModel, folder, "transformer", device)
        if attention == "xformers":
            transformer.enable_xformers_memory_efficient_attention()
        vae = _model(diffusers.AutoencoderKL, folder, "vae", device)
        scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
        names = _class_names(index)
        decoder = VaeDecoder(vae)
        guidance_decoder: Decoder = decoder
        if (folder / "tiny_decoder").is_dir():
            guidance_decoder = TinyDecoder(_model(diffusers.AutoencoderTiny, folder, "tiny_decoder", device))
        return cls(
            folder=folder,
            denoiser=DiTDenoiser(transformer, classes=len(names), prediction=_prediction(scheduler)),
            decoder=decoder,
            guidance_decoder=guidance_decoder,
            scheduler=scheduler,
            class_names=names,
            image_channels=vae.config.out_channels,
            device=torch.device(device),
        )


def _index(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        embedded = ", ".join(sorted(p.parent.name for p in ASSETS.glob("*/model_index.json")))
        raise RecipeError(
            f"pipeline = {str(folder)!r}: no such folder; expected a diffusers pipeline folder or one of: {embedded}"
        )
    path = folder / "model_index.json"
    if not path.is_file():
        raise RecipeError(f"pipeline = {str(folder)!r}: not a diffusers pipeline folder, it has no model_index.json")
    index: dict[str, Any] = json.loads(path.read_text())
    if index.get("_class_name") != "DiTPipeline":
        raise RecipeError(f"pipeline = {str(folder)!r}: a {index.get('_class_name')}; expected a DiTPipeline")
    return index


def _model(kind: Any, folder: Path, part: str, device: torch.device | str) -> Any:
    if not list((folder / part).glob("*.safetensors")):
        raise RecipeError(
            f"pipeline = {str(folder)!r}: {part!r} has no .safetensors weights; pickled weights are refused"
        )
    model = kind.from_pretrained(folder / part, use_safetensors=True, torch_dtype=torch.float32)
    return model.to(device).eval().requires_grad_(False)


def _class_names(index: dict[str, Any]) -> tuple[str, ...]:
    names = {int(key): value for key, value in index.get("id2label", {}).items()}
    if sorted(names) != list(range(len(names))) or not names:
        raise RecipeError("pipeline: model_index.json needs an id2label table with the ids 0, 1, 2, ...")
    return tuple(names[i] for i in range(len(names)))


def _prediction(scheduler: Any) -> Prediction:
    kinds: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
    return kinds[scheduler.config.prediction_type]
