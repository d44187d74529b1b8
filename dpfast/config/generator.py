"""The section ``[generator]`` of a recipe: how a sample is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpfast.config.option import option
from dpfast.config.section import Section, require, require_schedule

SolverName = Literal["auto", "ddim", "dpmpp2m", "euler", "euler_ancestral", "lcm", "tcd"]
STOCHASTIC: tuple[SolverName, ...] = ("ddim", "tcd")  # the solvers that eta is for


@dataclass(frozen=True, kw_only=True)
class Generator(Section, name="generator"):
    """The making of a sample, guided or not."""

    pipeline: str = option(
        "fashion",
        unit="folder",
        common=True,
        help="folder of a diffusers pipeline, the name of an embedded one, or OWNER/NAME of a "
        "model of the Hugging Face Hub, which is downloaded unless its cache has it or "
        "HF_HUB_OFFLINE is set",
    )
    revision: str = option(
        "",
        unit="revision",
        unset="main",
        help="branch, tag or commit of a pipeline of the Hub; a run keeps the commit that it began "
        "with",
    )
    variant: str = option(
        "",
        unit="name",
        unset="weights without one",
        help="variant of the pipeline's weights where it has several, such as fp16",
    )
    tiny_decoder: str = option(
        "",
        unit="folder",
        unset="the part tiny_decoder of the pipeline, where there is one",
        help="folder of an AutoencoderTiny, or OWNER/NAME[@REVISION] of one on the Hub "
        "(madebyollin/taesd), through which guidance looks; a run keeps the commit",
    )
    lora: tuple[str, ...] = option(
        (),
        unit="file[:weight]",
        unset="none",
        help="LoRA weights that are fused into the pipeline's models: files of safetensors or "
        "OWNER/NAME[@REVISION] of models on the Hub, each with its weight (1 where it has none); a "
        "run keeps the commits",
    )
    class_names: tuple[str, ...] = option(
        (),
        unit="name",
        unset="the folder's own",
        common=True,
        help="what a pipeline with text prompts is asked for, by class id; imagenet1k or "
        "imagenet100 alone stands for the classes of that set by all of their WordNet names",
    )
    image_size: int = option(
        0,
        unit="pixels",
        low=0,
        common=True,
        help="side of the images that enter the pool and that the learner sees; 0: as decoded",
    )
    prompt_template: str = option(
        "a photo of a {}",
        common=True,
        help="prompt of a pipeline with text prompts; {} is the class name",
    )
    prompts: str = option(
        "",
        unit="file",
        unset="prompt_template",
        help="JSON file from the names of classes to one prompt or a list of them; the id of a "
        "sample says which of its class's it is asked for",
    )
    negative_prompt: str = option(
        "",
        unset="empty",
        help="what classifier-free guidance leads away from, of a pipeline with text prompts",
    )
    height: int = option(
        0,
        unit="pixels",
        low=0,
        help="height of the images that the generator makes; 0: as it was trained",
    )
    width: int = option(
        0,
        unit="pixels",
        low=0,
        help="width of the images that the generator makes; 0: as it was trained",
    )
    dtype: Literal["float32", "bfloat16", "float16", "float8"] = option(
        "float32",
        common=True,
        help="data type of the generator's models; latents stay in float32, and so does a decoder "
        "whose config.json says force_upcast; float8: bfloat16, but the linear layers in the "
        "blocks of DiT and Stable Diffusion 3 in 8 bits where no gradient is taken, an "
        "approximation for GPUs from Hopper on",
    )
    solver: SolverName = option(
        "auto",
        common=True,
        help="solver of the reverse process: flow models take euler and dpmpp2m, distilled "
        "ones lcm, tcd, euler or euler_ancestral; auto: ddim, or the one that the model was made "
        "for",
    )
    steps: int = option(15, low=1, high=1000, common=True, help="solver steps of a sample")
    cfg_scale: float = option(
        1.5,
        low=0,
        common=True,
        help="scale of classifier-free guidance in the convention of diffusers, the paper's "
        "lambda + 1; 1: off",
    )
    cfg_interval: tuple[float, float] = option(
        (0.0, 1.0),
        unit="fraction",
        low=0,
        high=1,
        help="part of the trajectory with classifier-free guidance, from one fraction of the "
        "steps until another; outside of it a step costs half, and the images differ",
    )
    cache_interval: int = option(
        1,
        low=1,
        help="of unguided steps in a row one in so many runs the whole denoiser and the others "
        "reuse features of its inner blocks: cheaper, and other images; 1: every step is whole",
    )
    cfg_schedule: tuple[tuple[float, float], ...] = option(
        (),
        unit="fraction:factor",
        low=0,
        unset="1 in all steps",
        help="what cfg_scale - 1 is multiplied by, said as omega_schedule is; a step of factor 0 "
        "runs the conditional prediction alone",
    )
    eta: float = option(
        0.0,
        low=0,
        high=1,
        help="noise of ddim, 0: deterministic, 1: ancestral; gamma of tcd",
    )
    compile: bool = option(
        False,
        help="compile the sampler's steps with torch.compile: pays for many samples; a resumed "
        "run needs the same choice for the same bits",
    )
    compile_region: Literal["step", "blocks"] = option(
        "step",
        help="what is compiled: whole steps, "
        "or the blocks that repeat in denoiser, decoders and learner, once for all of a kind",
    )
    batch_size: int = option(
        250,
        unit="samples",
        low=1,
        common=True,
        help="samples in one batch, which one rank makes; the images do not depend on it",
    )
    micro_batch: int | None = option(
        None,
        unit="samples",
        low=1,
        unset="batch_size, or what fits of it",
        help="samples that are in memory at once",
    )
    attention: Literal["sdpa", "xformers"] = option(
        "sdpa",
        help="attention of the denoiser: torch's "
        "scaled_dot_product_attention, or xformers on a GPU",
    )
    channels_last: bool = option(
        False,
        help="memory format of UNets and full decoders; fused ones always have it",
    )
    fused: bool | Literal["auto"] = option(
        "auto",
        help="replace the blocks of denoiser and decoder by forms with fewer passes through "
        "memory, equal up to rounding; auto: on a GPU",
    )

    def check(self) -> None:
        named = all(name.strip() for name in self.class_names)
        require(named, "class_names", self.class_names, "a list of names, none of them empty")
        template = self.prompt_template
        one = "text with one '{}' for the class name"
        require(template.count("{}") == 1, "prompt_template", template, one)
        start, until = self.cfg_interval
        require(start < until, "cfg_interval", self.cfg_interval, "the first below the second")
        require_schedule("cfg_schedule", self.cfg_schedule)
        stochastic = self.solver in ("auto", *STOCHASTIC)
        takes = " and ".join(map(repr, STOCHASTIC))
        alone = f"0 with solver = {self.solver!r}: it is for {takes} alone"
        require(stochastic or not self.eta, "eta", self.eta, alone)

    @property
    def at_once(self) -> int:
        """Samples that a sampler has in memory at once, at most."""
        most = self.micro_batch
        return self.batch_size if most is None else min(most, self.batch_size)
