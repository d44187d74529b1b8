"""What Inductor would launch on an H100 for the plain and the guided step of the sampler; needs no
GPU.

    python -m benchmarks.systems.inductor_steps --helper lower.py --model embedded --out
    benchmarks/results/inductor_steps.jsonl

`--helper` is that of `benchmarks.systems.inductor_comparison`. Attention is one library call.
Operations of dpfast are counted apart: each is one launch at these sizes. Linear layers stay
PyTorch's, as on a GPU. Counts are read from generated code, they are no times.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.systems.inductor_comparison import _helper
from dpfast.cli.parser import Parser, at_least, in_one_line
from dpfast.generate.guidance import GuidanceConfig, GuidancePath
from dpfast.generate.models import denoiser as denoisers
from dpfast.generate.models.decoder import TinyDecoder
from dpfast.generate.models.denoiser import Denoiser
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.pipelines.families.dit import DiTDenoiser
from dpfast.generate.pipelines.families.stable_diffusion import TextUNetDenoiser
from dpfast.generate.sampler import GuidedSampler
from dpfast.generate.solver_tables import SolverTable, ddim_table
from dpfast.generate.step import StepParts, Variant, step_function
from dpfast.learn.models import load_judge
from dpfast.ops import dispatch


def embedded() -> tuple[StepParts, SolverTable]:
    """The embedded generator in fp32, guided by the judge network."""
    sampler = GuidedSampler(
        Pipeline.from_pretrained("fashion"),
        load_judge(),
        guidance=GuidanceConfig(every=5),
        steps=20,
        compile=False,
    )
    return sampler.runner.parts, sampler.table


def dit_xl_2() -> tuple[StepParts, SolverTable]:
    """DiT-XL/2 at 256 px in bf16 with uninitialised weights."""
    import diffusers

    with torch.device("meta"):
        dit = diffusers.DiTTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=28,
            sample_size=32,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )
    return _large(DiTDenoiser(_bf16(dit), classes=1000, prediction="epsilon", timesteps=1000))


def sd_15() -> tuple[StepParts, SolverTable]:
    """The UNet of Stable Diffusion 1.5 at 512 px in bf16 with uninitialised weights."""
    import diffusers

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    prompts = torch.empty(1001, 77, 768, dtype=torch.bfloat16)
    return _large(TextUNetDenoiser(_bf16(unet), prompts, prediction="epsilon"))


def _large(denoiser: Denoiser) -> tuple[StepParts, SolverTable]:
    """The steps of a denoiser with a tiny decoder and ViT-B/16 at 224 px as the learner, in
    bf16.
    """
    import diffusers
    import transformers

    with torch.device("meta"):
        tiny = diffusers.AutoencoderTiny()
        vit = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))
    decoder, classifier = TinyDecoder(_bf16(tiny)), _bf16(vit)

    def learner(images: Tensor) -> Tensor:
        return classifier(images.to(torch.bfloat16)).logits

    path = GuidancePath(denoiser=denoiser, decoder=decoder, learner=learner, image_size=(224, 224))
    return StepParts(denoiser=denoiser, decoder=decoder, path=path), ddim_table(
        diffusers.DDIMScheduler(), 20
    )


def _bf16(model: torch.nn.Module) -> torch.nn.Module:
    return model.to(torch.bfloat16).to_empty(device="cpu").eval()


MODELS: dict[str, Callable[[], tuple[StepParts, SolverTable]]] = {
    "embedded": embedded,
    "dit-xl-2": dit_xl_2,
    "sd-1.5": sd_15,
}


def count(
    lower: Any, parts: StepParts, table: SolverTable, variant: Variant, batch: int
) -> dict[str, Any]:
    """Launches of one step, by what they are."""
    step = step_function(parts, variant)

    def call(
        x: Tensor, labels: Tensor, ids: Tensor, index: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(
            value for value in step(x, None, labels, ids, None, index, *rest) if value is not None
        )

    ids, index = torch.zeros(batch, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    x = torch.empty(batch, *parts.denoiser.sample_shape)
    omega = torch.empty(batch)
    scale = torch.empty(())
    report = lower(
        call, [x, ids, ids.clone(), index, table.rows, table.timesteps, omega, scale, index.clone()]
    )
    ours = {name: times for name, times in report.externs.items() if name.startswith("dpfast.")}
    library = {name: times for name, times in report.externs.items() if name not in ours}
    return {
        "step": str(variant),
        "batch": batch,
        "torch": torch.__version__,
        "gpu": "sm_90",
        "triton": len(report.kernels),
        "dpfast": ours,
        "library": library,
        "host_waits": report.waits,
    }


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--helper", type=Path, required=True, help="file with the function lower")
    parser.add_argument("--model", choices=MODELS, required=True, help="whose steps are counted")
    parser.add_argument(
        "--batch-size", type=at_least(1), default=64, help="samples at once (default 64)"
    )
    parser.add_argument("--out", type=Path, required=True, help="one JSON object a line, appended")
    arguments = parser.parse_args()
    lower = _helper(arguments.helper).lower
    denoisers.freeze_linear = lambda model: model  # the replacement is for a CPU
    # make_fx is no compilation to torch: the operations stay whole
    dispatch.traced = lambda *tensors: True
    parts, table = MODELS[arguments.model]()
    for guided in (False, True):
        record = {
            "model": arguments.model,
            **count(lower, parts, table, Variant(guided, True), arguments.batch_size),
        }
        print(json.dumps(record), flush=True)
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(in_one_line("inductor_steps", main))
