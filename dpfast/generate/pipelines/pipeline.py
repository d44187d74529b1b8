"""A diffusers pipeline folder, loaded into the parts that a sampler needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dpfast.config import SolverName
from dpfast.errors import InputError
from dpfast.generate import check
from dpfast.generate.models.decoder import Decoder
from dpfast.generate.models.denoiser import Denoiser
from dpfast.generate.pipelines import attention as kernels
from dpfast.generate.pipelines import families
from dpfast.generate.pipelines.folder import PipelineFolder
from dpfast.generate.pipelines.prompts import Prompts
from dpfast.generate.solver_tables import SolverTable
from dpfast.generate.solvers import solver_table
from dpfast.hardware.device import device_of
from dpfast.ops.quantise import HOPPER

FLOAT8 = "float8"
DTYPES = {  # and that of the weights; beside those in float8 all else is bf16
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    FLOAT8: torch.bfloat16,
}


@dataclass(frozen=True)
class Pipeline:
    """The parts of a pipeline folder that a sampler needs.

    ``dpfast.generate.pipelines.families`` lists the families. Labels are class ids, indices into
    ``class_names``, for every family. An unconditional generator has no classes: its images do not
    depend on their labels. It has the single class "unconditional", unless ``class_names`` are
    given; their number is then the number of classes, so that a learner of as many can guide it and
    the labels that the caller chose stay with the samples.

    Attributes:
        folder: Folder that was loaded.
        denoiser: Frozen model behind one call signature (``dpfast.generate.models.denoiser``).
        decoder: Decoder of the images that enter the pool.
        guidance_decoder: Decoder of the guidance path.
        scheduler: Scheduler of diffusers, whose configuration makes ``table``.
        class_names: Names of the classes by id.
        image_channels: Channels of the images.
        device: Device of all parts.

    Examples:
        >>> import dpfast
        >>> dpfast.Pipeline.from_pretrained("fashion").class_names[:3]
        ('T-shirt/top', 'Trouser', 'Pullover')
    """

    folder: Path
    denoiser: Denoiser
    decoder: Decoder  # of the final images
    guidance_decoder: Decoder  # of the guidance path: the tiny decoder where the folder has one
    scheduler: Any  # as ``load_scheduler`` gives it
    class_names: tuple[str, ...]
    image_channels: int
    device: torch.device

    @classmethod
    @torch.inference_mode(False)  # autograd could save no weights that were made there
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str = "",
        variant: str = "",
        tiny_decoder: str | Path = "",
        lora: Sequence[str] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        attention: str = "sdpa",
        channels_last: bool = False,
        fused: bool | Literal["auto"] = "auto",
        class_names: Sequence[str] | None = None,
        prompt_template: str = "a photo of a {}",
        prompts: str | Path = "",
        negative_prompt: str = "",
        height: int = 0,
        width: int = 0,
    ) -> Pipeline:
        """Loads a folder of a diffusers pipeline, or a model of the Hub, from safetensors only.

        Args:
            source: A folder that ``save_pretrained`` wrote, the name of an embedded asset
                ("fashion"), or "owner/name" of a model in the cache of the Hugging Face Hub.
                ``dpfast.generate.pipelines.hub.fetch`` or ``hf download owner/name`` brings it
                there. A safety checker is not loaded.
            revision: Branch, tag or commit of a model of the Hub; "": main.
            variant: Variant of the weights, such as "fp16", for the parts that have it.
            tiny_decoder: Folder of an ``AutoencoderTiny``, or "owner/name" on the Hub, that serves
                the guidance path; "": the part of that name, where the folder has one.
            lora: LoRA weights that are fused into the models, each a file of safetensors or
                "owner/name" on the Hub, with ":0.7" behind it for another weight than 1.
            device: Device of all parts and tables; a name is "auto", "cpu", "cuda" or "cuda:N".
            dtype: dtype of all models: "float32", "bfloat16" or "float16", or the torch dtypes.
                Latents, images and the solver stay in float32, and so does a decoder whose
                configuration says ``force_upcast``. "float8" is bfloat16 with the linear layers in
                the blocks of a DiT or Stable Diffusion 3 in float8 wherever no gradient is taken:
                an approximation, for a GPU of the Hopper generation or a later one.
            attention: "sdpa" or "xformers", which must match torch and needs a GPU.
            channels_last: True gives the convolutional models, UNets and full decoders that memory
                format; the tiny decoder and fused models always have it.
            fused: True replaces the blocks of denoiser and full decoder by forms with fewer passes
                through memory (``dpfast.generate.models.fused``), equal up to rounding; "auto": on
                a GPU.
            class_names: Names of the classes by id; None: those of the folder, in
                ``class_names.json`` (a list) or in the ``id2label`` of its ``model_index.json``.
            prompt_template: Prompt of a text-conditioned family, with "{}" for the class name.
            prompts: JSON file of one prompt or several for each class, in place of the template
                (``dpfast.generate.pipelines.prompts.Prompts``). A sample's id chooses among them.
            negative_prompt: Prompt that classifier-free guidance leads away from; "": the empty
                one.
            height: Height of the images in pixels, for the families whose diffusers pipeline takes
                it; 0: the size that the model was trained at.
            width: Width of the images in pixels, as ``height``.

        Raises:
            InputError: For a missing folder or part, weights that are missing, incomplete or
                pickled, a pipeline of another family, class names that are missing or do not fit
                the model, a scheduler option without a solver here, an unknown device, dtype or
                attention, and where xformers is missing, does not match or has no GPU.
        """
        placed = device_of(device)
        kind = kernels.checked(attention, placed)
        float8 = str(dtype).removeprefix("torch.") == FLOAT8
        if float8:
            _check_float8(placed, fused)
        options = families.LoadOptions(
            placed,
            _dtype(dtype),
            kind,
            channels_last,
            placed.type == "cuda" if fused == "auto" else fused,
            float8,
            class_names,
            Prompts(prompt_template, str(prompts), negative_prompt),
            check.pixels("height", height),
            check.pixels("width", width),
        )
        folder = PipelineFolder(
            source, revision=revision, variant=variant, tiny_decoder=tiny_decoder, lora=lora
        )
        parts = families.load(folder, options)
        return cls(
            folder=folder.path,
            denoiser=parts.denoiser,
            decoder=parts.decoder,
            guidance_decoder=families.tiny_decoder(folder, options, parts.denoiser)
            or parts.decoder,
            scheduler=parts.scheduler,
            class_names=parts.class_names,
            image_channels=parts.image_channels,
            device=options.device,
        )

    @property
    @torch.no_grad()
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the images, by decoding one of zeros."""
        latents = torch.zeros(1, *self.denoiser.sample_shape, device=self.device)
        _, channels, height, width = self.decoder(latents).shape
        return channels, height, width

    def table(self, steps: int, *, solver: SolverName = "auto", eta: float = 0.0) -> SolverTable:
        """Returns the solver's table on this pipeline's device, from the folder's scheduler.

        Args:
            steps: Steps between 1 and the scheduler's trained timesteps.
            solver: "ddim", "dpmpp2m" (DPM-Solver++ 2M), "euler", "euler_ancestral", for distilled
                models "lcm" and "tcd"; flow-matching models take "euler" and "dpmpp2m". "auto" is
                "ddim", or the one that the model was distilled or trained for.
            eta: Noise of DDIM, 0 deterministic to 1 ancestral; the gamma of TCD.

        Raises:
            InputError: For steps, a solver or an eta that the scheduler does not take, for an
                option of the scheduler that the solver has no table for, and for timesteps between
                those of the training, where the denoiser has tables of these.
        """
        table = solver_table(
            self.scheduler,
            steps,
            solver=solver,
            eta=eta,
            image_tokens=getattr(self.denoiser, "image_tokens", 0),
            even=getattr(self.denoiser, "even_grid", False),
        )
        if table.timesteps.is_floating_point() and getattr(self.denoiser, "whole_timesteps", False):
            raise InputError(
                f"solver = {solver!r}: in {steps} steps it stops between the timesteps that the "
                "model was trained on, of which this denoiser has tables; use 'ddim' or 'dpmpp2m', "
                "or fused = False for a UNet"
            )
        return table.to(self.device)


def _check_float8(device: torch.device, fused: bool | str) -> None:
    found = f"device = {str(device)!r}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        found += " has compute capability {}.{}".format(*capability)
    if device.type != "cuda" or capability < HOPPER:
        raise InputError(
            "dtype = 'float8' needs a GPU of compute capability 9.0 (Hopper) or later, and "
            f"{found}; use 'bfloat16'"
        )
    if not fused:
        raise InputError("dtype = 'float8' needs fused blocks, and fused = False; use 'bfloat16'")


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    chosen = DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise InputError(f"dtype = {str(dtype)!r}: expected one of {', '.join(DTYPES)}")
    return chosen
