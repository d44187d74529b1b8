"""Recipes: frozen keyword-only dataclasses, read from TOML, checked before any work starts.

A recipe is one ``Recipe`` of five sections. A field's full name has its section
(``guidance.omega``, on a command line ``--guidance.omega 0.03``); its last word alone is enough
where one section has it (``--omega 0.03``). What a field means and which values it takes
stands at the field (``dpfast.config.option``); a ``check`` says which values contradict each other.
Both raise ``RecipeError`` with the field, its value and what would be right.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from dpfast.config.imported import FORM, is_import_path
from dpfast.config.kinds import LEVELS, ImportPath
from dpfast.config.option import Option, option, options, shown
from dpfast.errors import InputError, RecipeError
from dpfast.files import is_folder, there
from dpfast.textfiles import read_json, read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SourceName = Literal["dp", "static", "prune", "dynamic", "mix", "real", "pool"]
SOURCES: tuple[SourceName, ...] = get_args(SourceName)  # in the order in which they run
AT_ONCE: tuple[SourceName, ...] = ("static", "real", "pool")  # those that add no round
READ: tuple[SourceName, ...] = ("real", "pool")  # those that make nothing
SolverName = Literal["auto", "ddim", "dpmpp2m", "euler", "euler_ancestral", "lcm", "tcd"]
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
STOCHASTIC: tuple[SolverName, ...] = ("ddim", "tcd")  # the solvers that eta is for
RECIPES = Path(__file__).parents[1] / "recipes"
RECIPE_FILE = "recipe.json"  # of a run's folder
ASSETS = Path(__file__).parents[1] / "assets"
# what may have another value in each round, in the field of [practice] with "_rounds" behind it
BY_ROUND = ("omega", "anchor", "cfg_scale", "every", "start", "until", "through", "criterion")
INDEX = "model_index.json"  # of the folder of a diffusers pipeline
# section -> the names that its fields have in the folders of older runs, which are reported,
# exported and sampled from, if not resumed
FORMER = {
    "generator": {"generation_batch": "batch_size", "sampling_batch": "micro_batch"},
    "guidance": {"guide_every": "every", "guide_from": "start", "guide_until": "until"},
    "learner": {"compile_learner": "compile"},
    "practice": {"cfg_rounds": "cfg_scale_rounds"},
}
# field -> the names by which recipes call a folder that only their user has
USER_FOLDERS = {
    "pipeline": (
        "stable-diffusion-1.5",
        "stable-diffusion-2.1",
        "stable-diffusion-xl",
        "dit-xl-2",
        "pixart-sigma",
        "sana-1.6b",
        "flux-dev",
        "flux-schnell",
    ),
    "validation": ("imagenet-val",),
}


def _check(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise RecipeError(f"{_word(name)} = {shown(value)}: expected {wanted}")


def _check_schedule(name: str, points: tuple[tuple[float, float], ...]) -> None:
    """Raises ``RecipeError`` unless the fractions of a schedule rise, from 0 to 1 at most."""
    at = [fraction for fraction, _ in points]
    rising = all(first < second for first, second in pairwise(at))
    wanted = "fractions of the steps that rise, from 0 to 1 at most"
    _check(rising and max(at, default=0) <= 1, name, points, wanted)


def _word(name: str) -> str:
    """A field's name as it was said, on one line whatever is in it."""
    return name if name.isprintable() and name else repr(name)


def _deeper(value: object, levels: int) -> bool:
    """Whether tables and lists lie within each other on more than so many levels."""
    if not isinstance(value, (dict, list, tuple)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return not levels or any(_deeper(each, levels - 1) for each in inner)


def _in_running_order(sources: Sequence[str]) -> tuple[str, ...]:
    """Sources as they run, however they were said: so that one recipe is written in one way.
    Those of the user's own run last.
    """
    own = (each for each in sources if each not in SOURCES)
    return (*(name for name in SOURCES if name in sources), *own)


class Section:
    """The fields of one section, or of the recipe itself: each as its type, and all in harmony.

    Raises ``RecipeError`` for a value that is not of its field's type and range.
    """

    def __post_init__(self) -> None:
        owner: Any = type(self)
        section = "" if owner is Recipe else f"{owner.__name__.lower()}."
        for name, each in options(owner).items():
            value = each.value(short_name(section + name), getattr(self, name))
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Raises ``RecipeError`` for values that are right alone and wrong together."""


@dataclass(frozen=True, kw_only=True)
class Generator(Section):
    """How a sample is made, guided or not."""

    pipeline: str = option(
        "fashion",
        unit="folder",
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
        help="folder of an AutoencoderTiny, or OWNER/NAME of one on the Hub (madebyollin/taesd), "
        "through which guidance looks",
    )
    lora: tuple[str, ...] = option(
        (),
        unit="file[:weight]",
        unset="none",
        help="LoRA weights that are fused into the pipeline's models: files of safetensors or "
        "OWNER/NAME of models on the Hub, each with its weight (1 where it has none)",
    )
    class_names: tuple[str, ...] = option(
        (),
        unit="name",
        unset="the folder's own",
        help="what a pipeline with text prompts is asked for, by class id; imagenet1k or "
        "imagenet100 alone stands for the classes of that set by all of their WordNet names",
    )
    image_size: int = option(
        0,
        unit="pixels",
        low=0,
        help="side of the images that enter the pool and that the learner sees; 0: as decoded",
    )
    prompt_template: str = option(
        "a photo of a {}",
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
        help="data type of the generator's models; latents stay in float32, and so does a decoder "
        "whose config.json says force_upcast; float8: bfloat16, but the linear layers in the "
        "blocks of DiT and Stable Diffusion 3 in 8 bits where no gradient is taken, an "
        "approximation for GPUs from Hopper on",
    )
    solver: SolverName = option(
        "auto",
        help="solver of the reverse process: flow models take euler and dpmpp2m, distilled "
        "ones lcm, tcd, euler or euler_ancestral; auto: ddim, or the one that the model was made "
        "for",
    )
    steps: int = option(15, low=1, high=1000, help="solver steps of a sample")
    cfg_scale: float = option(
        1.5,
        low=0,
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
        _check(named, "class_names", self.class_names, "a list of names, none of them empty")
        template = self.prompt_template
        one = "text with one '{}' for the class name"
        _check(template.count("{}") == 1, "prompt_template", template, one)
        start, until = self.cfg_interval
        _check(start < until, "cfg_interval", self.cfg_interval, "the first below the second")
        _check_schedule("cfg_schedule", self.cfg_schedule)
        stochastic = self.solver in ("auto", *STOCHASTIC)
        takes = " and ".join(map(repr, STOCHASTIC))
        alone = f"0 with solver = {self.solver!r}: it is for {takes} alone"
        _check(stochastic or not self.eta, "eta", self.eta, alone)

    @property
    def at_once(self) -> int:
        """Samples that a sampler has in memory at once, at most."""
        most = self.micro_batch
        return self.batch_size if most is None else min(most, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Guidance(Section):
    """How strongly, when and by what the learner pulls on a sample."""

    omega: float = option(
        0.05,
        help="strength of guidance: with mode relative the displacement of a latent as a fraction "
        "of its norm; 0: unguided",
    )
    every: int = option(3, unit="steps", low=1, help="one step in so many is guided, from start on")
    start: float = option(
        0.0,
        unit="fraction",
        low=0,
        below=1,
        help="up to this fraction of the steps the trajectory is unguided",
    )
    until: float = option(
        1.0,
        unit="fraction",
        above=0,
        high=1,
        help="from this fraction of the steps on the trajectory is unguided",
    )
    mode: Literal["relative", "score"] = option(
        "relative",
        help="relative: the gradient is rescaled to the latent's norm, the paper's practice; "
        "score: it is added to the score, the paper's Algorithm 1",
    )
    through: Literal["denoiser", "latent"] = option(
        "denoiser",
        help="what the gradient passes: latent leaves the denoiser's backward pass out, which is "
        "cheaper and approximate",
    )
    criterion: Literal["entropy", "loss", "margin", "disagreement"] | ImportPath = option(
        "entropy",
        help="what guidance raises: the entropy of the prediction, the loss of the label, the "
        "nearness of the border between two classes, the disagreement of the EMA and the raw "
        "weights, which runs both in every guided step, or a function of yours, of logits (B, K) "
        "and labels (B,) with values (B,)",
    )
    guide_with: Literal["ema", "raw"] = option(
        "ema", help="the learner's weights that guide; those whose accuracy counts: evaluate_with"
    )
    anchor: float = option(
        0.0,
        low=0,
        help="how strongly the generator's own label score, which classifier-free guidance has "
        "computed, joins the criterion's gradient, both of length 1; 0: the paper's guidance",
    )
    omega_schedule: tuple[tuple[float, float], ...] = option(
        (),
        unit="fraction:factor",
        low=0,
        unset="1 in all steps",
        help="what omega is multiplied by along a trajectory: pairs of a fraction of the steps, "
        "rising, and a factor, straight lines between them, the ends' factors before and behind; "
        "a step of factor 0 is unguided",
    )
    anchor_schedule: tuple[tuple[float, float], ...] = option(
        (),
        unit="fraction:factor",
        low=0,
        unset="1 in all steps",
        help="what anchor is multiplied by, the same way",
    )
    omega_classes: str = option(
        "",
        unit="file",
        unset="omega for all classes",
        help="omega of single classes in all rounds, in the place of omega and omega_rounds: a "
        "file with a class, by name or id, and its value a line",
    )
    anchor_classes: str = option(
        "",
        unit="file",
        unset="anchor for all classes",
        help="anchor of single classes, the same way",
    )

    def check(self) -> None:
        _check_schedule("omega_schedule", self.omega_schedule)
        _check_schedule("anchor_schedule", self.anchor_schedule)
        _check(self.start < self.until, "until", self.until, f"above start ({self.start:g})")
        wanted = f"0 with omega = {self.omega:g}, which lowers the criterion"
        _check(not self.anchor or self.omega >= 0, "anchor", self.anchor, wanted)


@dataclass(frozen=True, kw_only=True)
class Learner(Section):
    """The classifier, and how it is trained."""

    model: str = option(
        "transformers:RegNetForImageClassification",
        help="architecture of the learner: transformers:Class, timm:name or package.module:factory",
    )
    options: dict[str, Any] = option(
        {},
        unset="none",
        help="keyword arguments of the model's configuration, on a command line in TOML: "
        "'depths = [1, 1], groups_width = 8'; "
        "--model with another one than the recipe's begins without them, and so does --pretrained "
        "with one of transformers",
    )
    pretrained: str = option(
        "",
        unit="folder",
        unset="random weights",
        help="weights that the learner begins with, its head anew for other classes; a folder of "
        "transformers' save_pretrained, or its name on the Hugging Face Hub, which says the "
        "options as well; of timm and of a factory of yours a .safetensors file",
    )
    freeze: tuple[str, ...] = option(
        (),
        unit="name",
        unset="none",
        help="parameters that are not trained, by the beginning of their names: vit.embeddings; "
        "backbone: all but the head",
    )
    classes: int | None = option(
        None,
        low=1,
        unset="as many as the generator has",
        help="classes that the learner tells apart",
    )
    batch_size: int = option(
        64,
        unit="images",
        low=2,
        help="images of an optimiser step, over all ranks",
    )
    micro_batch: int | None = option(
        None,
        unit="images",
        low=1,
        unset="as many as fit",
        help="images of a rank in one forward and backward pass",
    )
    activation_checkpointing: bool = option(
        False,
        help="compute activations twice: less memory, a quarter more work",
    )
    lr: float = option(3e-3, above=0, help="largest learning rate")
    weight_decay: float = option(
        0.05, low=0, help="weight decay of AdamW, decoupled from the gradient"
    )
    betas: tuple[float, float] = option(
        (0.9, 0.999),
        low=0,
        below=1,
        help="decay of AdamW's averages of the gradient and of its square",
    )
    layer_decay: float = option(
        1.0,
        above=0,
        high=1,
        help="learning rate of each block of the learner as a fraction of the next one's, from the "
        "head down; 1: one rate for all",
    )
    label_smoothing: float = option(
        0.0,
        low=0,
        below=1,
        help="share of the target that all classes divide among them",
    )
    ema_decay: float = option(
        0.99,
        low=0,
        below=1,
        help="decay of the moving average of the weights, by optimiser step",
    )
    evaluate_with: Literal["ema", "raw"] = option(
        "ema",
        help="the learner's weights whose accuracy counts; those that guide: guide_with",
    )
    clip_grad_norm: float = option(
        0.0,
        low=0,
        help="largest norm of the gradient of all weights; 0: not clipped",
    )
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto",
        help="precision of the learner's forward pass; "
        "bf16: by autocast; auto: bf16 on a GPU that has it",
    )
    compile: bool | Literal["auto"] = option(
        "auto",
        help="compile the training step; auto: on a GPU, where it pays",
    )
    warmup: float = option(
        0.1,
        unit="fraction",
        low=0,
        below=1,
        help="fraction of the iterations in which the learning rate rises, linearly",
    )
    cooldown: float = option(
        0.2,
        unit="fraction",
        low=0,
        high=1,
        help="fraction of the iterations in which the learning rate falls to zero, as a cosine; "
        "no samples are added then",
    )
    flip: bool = option(True, help="whether images are flipped horizontally at random")
    shift: int = option(2, unit="pixels", low=0, help="largest random translation of an image")
    crop: float = option(
        1.0,
        unit="fraction",
        above=0,
        high=1,
        help="random resized crop: the smallest share of the area that is kept; 1: none",
    )
    rand_augment: int = option(
        0,
        unit="operations",
        low=0,
        help="RandAugment: operations that change an image, each drawn from fourteen; 0: none",
    )
    rand_magnitude: float = option(
        9.0,
        low=0,
        high=30,
        help="magnitude of RandAugment's operations",
    )
    augment: ImportPath | None = option(
        None,
        unset="none",
        help="an augmentation of yours: a function of images (B, C, H, W) in [-1, 1] and of a seed "
        "for each, (B,), that gives such images",
    )
    erase: float = option(
        0.0,
        unit="fraction",
        low=0,
        high=1,
        help="share of the images of which a random box is erased",
    )
    aug_repeats: int = option(
        1,
        low=1,
        help="repeated augmentation: how often an image is in a batch, each time augmented "
        "otherwise",
    )
    mixup: float = option(
        0.0,
        low=0,
        help="blend images in pairs: alpha of the Beta distribution of the shares; 0: none",
    )
    cutmix: float = option(
        0.0,
        low=0,
        help="paste a part of another image: alpha of the Beta distribution of its share; with "
        "mixup, a batch gets one of the two; 0: none",
    )
    loader: Literal["auto", "dali", "torch"] | ImportPath = option(
        "auto",
        help="what makes batches, and augments their images; auto: DALI for JPEG, torch for pixels "
        "and latents; one of yours: makes a dpfast.Loader",
    )
    seed: int | None = option(
        None,
        low=0,
        high=2**31 - 1,
        unset="the recipe's",
        help="seed of the learner's weights and batches alone, for several learners of the same "
        "samples",
    )

    def check(self) -> None:
        kinds = "'transformers:Class', 'timm:name' or 'package.module:factory'"
        library, _, name = self.model.partition(":")
        _check(bool(library and name), "model", self.model, kinds)
        wanted = f"a divisor of learner.batch_size ({self.batch_size})"
        _check(self.batch_size % self.aug_repeats == 0, "aug_repeats", self.aug_repeats, wanted)
        most = 1 - self.warmup
        left = f"at most {most:g}, which warmup leaves"
        _check(self.cooldown <= most, "cooldown", self.cooldown, left)

    def cooling_at(self, step: int, iterations: int) -> bool:
        """Whether the last phase has begun after ``step`` steps, in which no samples are added."""
        return iterations - step <= self.cooldown * iterations


@dataclass(frozen=True, kw_only=True)
class Practice(Section):
    """Algorithm 1: how many samples, when more, and beside which other sources."""

    initial_samples: int = option(
        1500,
        unit="samples",
        low=1,
        help="samples before training begins, the paper's N",
    )
    round_samples: int = option(
        750,
        unit="samples",
        low=1,
        help="samples of an addition, the paper's P",
    )
    maximum_samples: int = option(
        6000,
        unit="samples",
        low=1,
        help="samples after which none are added",
    )
    maximum_rounds: int | None = option(
        None,
        unit="rounds",
        low=0,
        unset="as many as maximum_samples allows",
        help="additions after which no more are made",
    )
    iterations: int = option(1500, unit="steps", low=10, help="optimiser steps of the run")
    evaluate_every: int = option(
        25,
        low=1,
        help="steps or passes (evaluate_unit) between two evaluations, the paper's tau",
    )
    evaluate_unit: Literal["steps", "passes"] = option(
        "steps",
        help="steps of the optimiser, or passes over the initial samples, as in the paper",
    )
    patience: int = option(
        2,
        unit="evaluations",
        low=1,
        help="evaluations without a new best after which "
        "samples are added, the paper's T_max at the start",
    )
    patience_growth: Literal["coverage", "pool", "round", "fixed"] = option(
        "coverage",
        help="how patience grows with the pool; coverage: "
        "at least a quarter of the pool over the initial samples; pool: "
        "in proportion to the pool; round: by one a round; fixed: not at all",
    )
    add_at: tuple[int, ...] = option(
        (),
        unit="steps",
        low=1,
        unset="when patience ends",
        help="optimiser steps after which samples are added, in place of patience, rising; the "
        "learner is evaluated after them too",
    )
    omega_rounds: tuple[float, ...] = option(
        (),
        unset="omega",
        help="omega of round 1, 2, ...; the last one holds for all later rounds",
    )
    anchor_rounds: tuple[float, ...] = option(
        (), low=0, unset="anchor", help="anchor of round 1, 2, ..., the same way"
    )
    cfg_scale_rounds: tuple[float, ...] = option(
        (),
        low=0,
        unset="cfg_scale",
        help="cfg_scale of round 1, 2, ..., the same way",
    )
    every_rounds: tuple[int, ...] = option(
        (), unit="steps", low=1, unset="every", help="every of round 1, 2, ..., the same way"
    )
    start_rounds: tuple[float, ...] = option(
        (),
        unit="fraction",
        low=0,
        below=1,
        unset="start",
        help="start of round 1, 2, ..., the same way",
    )
    until_rounds: tuple[float, ...] = option(
        (),
        unit="fraction",
        above=0,
        high=1,
        unset="until",
        help="until of round 1, 2, ..., the same way",
    )
    through_rounds: tuple[Literal["denoiser", "latent"], ...] = option(
        (), unset="through", help="through of round 1, 2, ..., the same way"
    )
    criterion_rounds: tuple[
        Literal["entropy", "loss", "margin", "disagreement"] | ImportPath, ...
    ] = option((), unset="criterion", help="criterion of round 1, 2, ..., the same way")
    fresh_weight: float = option(
        1.0,
        above=0,
        help="how much more often a sample of the newest round is drawn than others; 1: the paper",
    )
    allot: Literal["equal", "difficulty"] = option(
        "equal",
        help="labels of new samples: as many of each class, or by the classes' validation error",
    )
    class_counts: str = option(
        "",
        unit="file",
        unset="as many of each class",
        help="samples of each class that the pool fills towards, in proportion: a file with a "
        "class, by name or id, and its count a line, maximum_samples or more in all",
    )
    early_candidates: float = option(
        1.0,
        low=1,
        help="dp: trajectories that are begun for each sample, of which the easiest are stopped "
        "early; 1: none is",
    )
    early_until: float = option(
        0.4,
        unit="fraction",
        above=0,
        below=1,
        help="dp: the easiest candidates are stopped after the last guided step before this "
        "fraction of the steps",
    )
    restart: float = option(
        0.0,
        unit="fraction",
        low=0,
        below=1,
        help="dp: the fraction of the steps at which new "
        "samples begin, from samples of the pool; 0: from noise",
    )
    oversample: float = option(
        4.0,
        low=1,
        help="prune: candidates for each sample that is kept; 1 prunes nothing",
    )
    prune_within: Literal["class", "overall"] = option(
        "class",
        help="prune: whether the highest entropies are kept of each class, or of all samples",
    )
    sources: tuple[SourceName | ImportPath, ...] = option(
        ("dp", "static"),
        help="what makes samples, a run each, compared in one table; dp: Deliberate Practice, "
        "static: a pool that does not grow, prune: the best of many candidates, dynamic: "
        "additions without guidance, mix: real images beside those that are made (mix_with), real: "
        "real images alone, pool: the samples of another run (pool_from); one of yours: called "
        "with initial_samples, it gives a dpfast.Source",
    )
    real: str = option(
        "",
        unit="folder",
        unset="none",
        help="real and mix: images to train on, a folder with a sub-folder a class; the real "
        "images of validation and held_out are never trained on",
    )
    mix_with: Literal["dp", "static", "dynamic"] = option(
        "dp",
        help="mix: what makes the samples beside the real images, as the source of that name",
    )
    real_share: float = option(
        0.5,
        unit="fraction",
        above=0,
        high=1,
        help="mix: the share of the samples before training that are real images; 1: all, and the "
        "others come in rounds",
    )
    real_in_batch: tuple[float, ...] = option(
        (),
        unit="fraction",
        above=0,
        below=1,
        unset="as in the pool",
        help="mix: the share of a training batch that are real images, before round 1, 2, ...; the "
        "last one holds from then on",
    )
    pool_from: str = option(
        "",
        unit="folder",
        unset="none",
        help="pool: whose samples are trained on: of a run, a saved or exported pool, or another's "
        "dataset",
    )
    pool_rounds: tuple[int, ...] = option(
        (),
        unit="rounds",
        low=0,
        unset="all",
        help="pool: the rounds whose samples are taken, 0 for the initial ones",
    )
    reuse: str = option(
        "",
        unit="run",
        unset="none",
        help="folder of a run of the same generator and seed, whose unguided samples are taken in "
        "place of making them again",
    )
    yardstick_samples: int = option(
        250,
        unit="samples",
        low=1,
        help="unguided samples, in no pool, with whose entropy that of a round is compared",
    )
    checkpoint_share: float = option(
        0.01,
        unit="fraction",
        above=0,
        high=1,
        help="largest share of the run's time that saving checkpoints takes",
    )
    checkpoint_minutes: float = option(
        10.0,
        unit="minutes",
        low=0,
        help="largest age of the newest checkpoint while "
        "the learner trains; 0: one at every evaluation",
    )
    checkpoints_kept: int = option(
        2,
        low=1,
        help="how many of a source's newest checkpoints are kept",
    )
    keep_rounds: bool = option(
        False,
        help="keep the checkpoints at the ends of rounds as well, for --branch-at",
    )
    overlap: int = option(
        0,
        unit="ranks",
        low=0,
        help="so many of several ranks only generate, "
        "while the others train; 0: all do both in turn",
    )
    overlap_staleness: int = option(
        1000,
        unit="steps",
        low=1,
        help="with overlap: optimiser steps between a learner and the addition of what it guided",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sources", _in_running_order(self.sources))

    def check(self) -> None:
        initial, most = self.initial_samples, self.maximum_samples
        wanted = f"at least initial_samples ({initial})"
        _check(most >= initial, "maximum_samples", most, wanted)
        in_time = self.evaluate_unit != "steps" or self.evaluate_every <= self.iterations
        wanted = f"at most iterations ({self.iterations})"
        _check(in_time, "evaluate_every", self.evaluate_every, wanted)
        both = self.early_candidates > 1 and self.restart
        wanted = f"0 with early_candidates = {self.early_candidates:g}: one of the two"
        _check(not both, "restart", self.restart, wanted)
        rising = all(first < second for first, second in pairwise(self.add_at))
        _check(rising, "add_at", ",".join(map(str, self.add_at)), "rising steps, each once")
        targets, within = self.class_counts, self.prune_within
        wanted = "'equal' with class_counts, which say the labels"
        _check(not targets or self.allot == "equal", "allot", self.allot, wanted)
        alike = not targets or "prune" not in self.sources or within == "class"
        _check(alike, "prune_within", within, "'class' with class_counts")
        rounds = self.rounds_within(self.maximum_samples)
        wanted = (
            f"at most {rounds} steps, for the rounds that maximum_samples ({most}) and "
            "maximum_rounds allow"
        )
        _check(len(self.add_at) <= rounds, "add_at", ",".join(map(str, self.add_at)), wanted)
        for name, needs in (("real", ("real", "mix")), ("pool_from", ("pool",))):
            given, asking = getattr(self, name), [each for each in needs if each in self.sources]
            wanted = "a folder, which the source "
            wanted += " and the source ".join(map(repr, asking)) + " trains on"
            _check(bool(given) or not asking, name, given, wanted)
        rounds_once = len(set(self.pool_rounds)) == len(self.pool_rounds)
        text = ",".join(map(str, self.pool_rounds))
        _check(rounds_once, "pool_rounds", text, "rounds, each once")
        mixed = "mix" in self.sources
        alone = not mixed or not self.real_in_batch or self.fresh_weight == 1
        wanted = "1 with real_in_batch, which says how samples are drawn"
        _check(alone, "fresh_weight", self.fresh_weight, wanted)
        _check(not mixed or not self.overlap, "overlap", self.overlap, "0 with sources = 'mix'")
        real, first = self.mixed_real(self.before_training), self.before_training
        wanted = f"enough for one real image among {first} samples"
        _check(not mixed or real > 0, "real_share", self.real_share, wanted)
        with_others = real < first or self.mix_with != "static" or not mixed
        wanted = "below 1 with mix_with = 'static', which adds none later"
        _check(with_others, "real_share", self.real_share, wanted)
        once = self.sources and len(set(self.sources)) == len(self.sources)
        wanted = f"one or more of {', '.join((*SOURCES, FORM))}, each once"
        _check(bool(once), "sources", ",".join(self.sources), wanted)

    def interval(self, batch_size: int) -> int:
        """Optimiser steps between two evaluations."""
        if self.evaluate_unit == "steps":
            return self.evaluate_every
        return -(-self.evaluate_every * self.initial_samples // batch_size)

    def evaluations(self, batch_size: int) -> list[int]:
        """The optimiser steps after which the learner is evaluated, rising."""
        interval = self.interval(batch_size)
        return sorted({*range(interval, self.iterations + 1, interval), *self.add_at})

    def rounds_within(self, samples: int) -> int:
        """Additions that lead to ``samples``, as far as ``maximum_rounds`` allows."""
        rounds = max(0, -(-(samples - self.initial_samples) // self.round_samples))
        return rounds if self.maximum_rounds is None else min(rounds, self.maximum_rounds)

    @property
    def takes_all_at_once(self) -> bool:
        """Whether no round is added: by sources such as "static", which no other one has told its
        size.
        """
        still = (*AT_ONCE, "mix") if self.mix_with == "static" else AT_ONCE
        return all(name in still for name in self.sources)

    @property
    def before_training(self) -> int:
        """mix: the samples that it has before training, where no other source says its size."""
        return self.maximum_samples if self.mix_with == "static" else self.initial_samples

    def mixed_real(self, first: int) -> int:
        """mix: how many of ``first`` samples before training are real images."""
        return round(self.real_share * first)

    @property
    def guides(self) -> bool:
        """Whether some source makes guided samples."""
        return "dp" in self.sources or ("mix" in self.sources and self.mix_with == "dp")

    @property
    def generates(self) -> bool:
        """Whether some source makes samples, and does not only read them."""
        return any(name not in READ for name in self.sources)

    @property
    def most_samples(self) -> int:
        """Samples at the end of a run that adds as many rounds as it may."""
        if self.takes_all_at_once:
            return self.maximum_samples
        rounds = len(self.add_at) or self.rounds_within(self.maximum_samples)
        return min(self.initial_samples + rounds * self.round_samples, self.maximum_samples)


@dataclass(frozen=True, kw_only=True)
class Pool(Section):
    """As what the samples are kept, and how much of which memory they may take."""

    codec: Literal["pixels", "latents", "jpeg"] = option(
        "pixels",
        help="form of a sample in the pool: uint8 pixels, float16 latents that are decoded when a "
        "batch is made, or JPEG",
    )
    device_gib: float | None = option(
        None,
        unit="GiB",
        low=0,
        unset="half of what is free on a GPU",
        help="memory on the run's device, which is filled first",
    )
    host_gib: float | None = option(
        None,
        unit="GiB",
        low=0,
        unset="70 % of what is free at the start",
        help="memory of the host, which is filled next",
    )
    mapped: bool = option(
        False,
        help="hold the rest in memory-mapped files in "
        "the run's folder, up to 90 % of its free disk",
    )
    save_samples: Literal["png", "npy", "jpeg", "none"] = option(
        "png",
        help="form of samples of pixels in the run's folder; png and npy are exact; none: no "
        "resume, no export",
    )

    def check(self) -> None:
        fits = self.save_samples != "jpeg" or self.codec == "pixels"
        _check(fits, "save_samples", self.save_samples, "'png' unless codec = 'pixels'")


@dataclass(frozen=True, kw_only=True)
class Recipe(Section):
    """Everything a run depends on. Two runs of one recipe on one machine give the same
    ``metrics.jsonl``.
    """

    name: str = option("", unset="the file's", help="name of the recipe and of its runs' folders")
    seed: int = option(
        0,
        low=0,
        high=2**31 - 1,
        help="seed of all weights, noise, labels and batches",
    )
    device: str = option(
        "auto",
        unit="device",
        help="where models and batches are: cpu, cuda, cuda:1; auto: a GPU where there is one",
    )
    validation: str = option(
        "fashion",
        unit="folder",
        help="real images that drive the loop: a folder with a sub-folder a class, or the name of "
        "an embedded set",
    )
    held_out: str = option(
        "",
        unit="folder",
        unset="every second image of the validation",
        help="real images for the final test, a folder of the same form",
    )
    evaluation: tuple[str, ...] = option(
        (),
        unit="set",
        unset="none",
        help="further sets for the final table: shifts, the name of one shift, or [NAME=]FOLDER",
    )
    callbacks: tuple[ImportPath, ...] = option(
        (),
        unset="none",
        help="who hears of every event of a run: classes or functions of yours that give a "
        "dpfast.Callback, called without arguments on each rank",
    )
    trackers: tuple[TrackerName | ImportPath, ...] = option(
        ("tensorboard",),
        help="what tracks the numbers of a run beside the files in its folder; one of yours: a "
        "kind of accelerate.tracking.GeneralTracker, called as accelerate does",
    )
    generator: Generator = field(default_factory=Generator)
    guidance: Guidance = field(default_factory=Guidance)
    learner: Learner = field(default_factory=Learner)
    pool: Pool = field(default_factory=Pool)
    practice: Practice = field(default_factory=Practice)

    @property
    def learner_seed(self) -> int:
        """The seed of the learner's weights and batches."""
        return self.seed if self.learner.seed is None else self.learner.seed

    def check(self) -> None:
        practice = self.practice
        once = len(set(self.trackers)) == len(self.trackers)
        _check(once, "trackers", ",".join(self.trackers), "each once")
        first, last = practice.interval(self.learner.batch_size), practice.iterations
        wanted = f"the first evaluation, now after {first} steps, within iterations ({last})"
        _check(first <= last, "evaluate_every", practice.evaluate_every, wanted)
        late = [step for step in practice.add_at if self.learner.cooling_at(step, last)]
        wanted = (
            f"steps before the cool-down, the last {self.learner.cooldown:g} of iterations ({last})"
        )
        _check(not late, "add_at", ",".join(map(str, practice.add_at)), wanted)
        existing = [name for name in practice.sources if name in (*READ, "mix")]
        wanted = f"'pixels' or 'jpeg': the source {''.join(existing[:1])!r} has images, no latents"
        _check(not existing or self.pool.codec != "latents", "codec", "latents", wanted)
        branches = practice.keep_rounds and self.pool.save_samples == "none"
        wanted = "false with save_samples = 'none': a branch needs the samples"
        _check(not branches, "keep_rounds", True, wanted)
        for number in range(1, self.scheduled_rounds + 1):
            try:
                self.of_round(number)
            except RecipeError as error:
                raise RecipeError(f"round {number}: {error}") from None
        if not self.scheduled_rounds:
            self._check_guidance()
        compared = {each == "disagreement" for each in practice.criterion_rounds}
        compared |= {self.guidance.criterion == "disagreement"}
        wanted = "'disagreement', which compares two learners, of all rounds and as criterion"
        _check(len(compared) == 1, "criterion_rounds", practice.criterion_rounds, wanted)

    def _check_guidance(self) -> None:
        """Raises ``RecipeError`` for a guided round whose values do not go together."""
        guidance, early = self.guidance, self.practice.early_candidates
        wanted = (
            "1 unless omega, and with omega_rounds each of it, is above 0: guidance scores the "
            "candidates, and the highest stay"
        )
        _check(early == 1 or guidance.omega > 0, "early_candidates", early, wanted)
        wanted = (
            "0 where guided samples have cfg_scale = 1: it needs the two predictions of "
            "classifier-free guidance"
        )
        without = bool(guidance.anchor and guidance.omega) and self.generator.cfg_scale == 1
        _check(not without, "anchor", guidance.anchor, wanted)
        apart = guidance.criterion != "disagreement" or self.learner.ema_decay > 0
        wanted = "another with ema_decay = 0: both weights are the same"
        _check(apart, "criterion", guidance.criterion, wanted)

    @property
    def scheduled_rounds(self) -> int:
        """The rounds for which ``omega_rounds`` and its like have a value of their own."""
        return max(len(getattr(self.practice, f"{name}_rounds")) for name in BY_ROUND)

    def of_round(self, number: int) -> Recipe:
        """The recipe whose [guidance] and cfg_scale are those of round ``number``; 0: the initial
        samples, for which no round's hold.
        """
        schedules = {
            f"{name}_rounds": getattr(self.practice, f"{name}_rounds") for name in BY_ROUND
        }
        given = {
            name.removesuffix("_rounds"): values[min(number, len(values)) - 1]
            for name, values in schedules.items()
            if number and values
        }
        if not any(schedules.values()):
            return self
        scale = given.pop("cfg_scale", self.generator.cfg_scale)
        cleared: dict[str, Any] = dict.fromkeys(schedules, ())
        return dataclasses.replace(
            self,
            generator=dataclasses.replace(self.generator, cfg_scale=scale),
            guidance=dataclasses.replace(self.guidance, **given),
            practice=dataclasses.replace(self.practice, **cleared),
        )

    @property
    def tracker_packages(self) -> tuple[str, ...]:
        """What the trackers import, of the packages of ``dpfast.extras``."""
        named = (name for name in self.trackers if not is_import_path(name))
        alone = set(self.trackers) <= {"tensorboard"}
        return (*named, *([] if alone else ["accelerate"]))

    def need_folders(self, *names: str) -> None:
        """Raises ``RecipeError`` with the options of all fields of ``names`` whose folder its user
        has yet to name.
        """
        given = flat(self.to_dict())
        missing = [
            f"--{name} FOLDER"
            for name in names
            if given[name] in USER_FOLDERS[name] and not is_folder(Path(given[name]))
        ]
        if missing:
            raise RecipeError(
                f"recipe = {self.name!r}: needs folders of yours, say {' '.join(missing)}"
            )

    def check_ranks(self, count: int) -> None:
        """Raises ``RecipeError`` where a run under torchrun with ``count`` ranks would be
        refused.
        """
        practice, initial = self.practice, self.practice.initial_samples
        fewer = practice.overlap < max(count, 1)
        wanted = f"0, or under torchrun fewer than its {count} ranks"
        _check(fewer, "overlap", practice.overlap, wanted)
        if count <= 1:
            return
        ranks = count - practice.overlap  # the others only generate
        size = self.learner.batch_size
        wanted = f"a multiple of {2 * ranks}, twice the {ranks} ranks"
        _check(size % (2 * ranks) == 0, "learner.batch_size", size, wanted)
        batch = self.generator.batch_size
        wanted = (
            f"at most {initial // ranks}: initial_samples = {initial} "
            f"are fewer batches than the {ranks} ranks"
        )
        _check(-(-initial // batch) >= ranks, "generator.batch_size", batch, wanted)
        wanted = "0 with overlap: ranks that only generate hold no samples to begin from"
        _check(not (practice.restart and practice.overlap), "restart", practice.restart, wanted)

    @classmethod
    def load(cls, source: str | Path, **overrides: Any) -> Recipe:
        """Reads a recipe by name or path and replaces fields by ``overrides``: ``omega=0.03``, or
        by section, ``learner={"batch_size": 32}``. Another ``model`` than the recipe's begins
        without the recipe's ``options``, and so does a ``pretrained`` one of transformers.

        Raises ``RecipeError`` for an unknown recipe, section or field, a wrong type, a value out of
        range, and another patience than the recipe's beside ``add_at``, which leaves it no say.
        """
        text = str(source)
        named = not text.endswith(".toml") and os.sep not in text
        path = RECIPES / f"{text}.toml" if named else Path(source)
        try:
            table = tomllib.loads(read_text(path))
        except FileNotFoundError:
            known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
            raise RecipeError(
                f"recipe = {str(source)!r}: no such recipe; "
                f"known are {known}, or a path that ends in .toml"
            ) from None
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"recipe = {str(source)!r}: not valid TOML: {error}") from None
        table.setdefault("name", path.stem)
        learner = table.get("learner")
        if isinstance(learner, dict) and _another(learner, overrides):
            learner.pop("options", None)  # those of another architecture
        practice = table.get("practice")
        own = dict(practice) if isinstance(practice, dict) else {}
        for key, value in overrides.items():
            if key in SECTIONS and isinstance(value, dict):
                table.setdefault(key, {}).update(value)
                continue
            section, _, name = full_name(key).rpartition(".")
            (table.setdefault(section, {}) if section else table)[name] = value
        recipe = cls.from_dict(table)
        for name in ("patience", "patience_growth") if recipe.practice.add_at else ():
            said, kept = getattr(recipe.practice, name), own.get(name, getattr(Practice, name))
            wanted = f"{kept!r}, the recipe's, as no patience counts with add_at"
            _check(said == kept, name, said, wanted)
        return recipe

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Recipe:
        """Builds a recipe from nested dictionaries, the inverse of ``dataclasses.asdict``.

        Raises ``RecipeError`` as ``load`` does, and for tables within tables of more than LEVELS.
        """
        for key, value in table.items():
            if _deeper(value, LEVELS):
                raise RecipeError(f"{_word(key)}: tables or lists within each other, over {LEVELS}")
        values: dict[str, Any] = {}
        for key, value in table.items():
            if key in SECTIONS:
                _check(isinstance(value, dict), key, value, "a table of fields")
                for name, inner in value.items():
                    _check_known(SECTIONS[key], name, inner)
                values[key] = SECTIONS[key](**value)
            else:
                _check_known(cls, key, value)
                values[key] = value
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _another(learner: dict[str, Any], overrides: dict[str, Any]) -> bool:
    """Whether the overrides of a recipe with this learner name another model, or the folder of a
    pretrained one of transformers, which says the options.
    """
    own = learner.get("model", Learner.model)
    model = _said(overrides, "model")
    ready = str(model or own).startswith("transformers:") and _said(overrides, "pretrained")
    return model not in (None, own) or bool(ready)


def _said(overrides: dict[str, Any], name: str) -> Any:
    """A field of the learner in the overrides of a recipe, None where they leave it."""
    learner = overrides.get("learner")
    inner = learner.get(name) if isinstance(learner, dict) else None
    return overrides.get(name, overrides.get(f"learner.{name}", inner))


def pipeline_folder(source: str | Path) -> Path:
    """Where a pipeline lies: ``source`` where it is a folder of one, else the embedded one of that
    name, else ``source``. A text with a separator ("./fashion") is a path and no name.
    """
    path, embedded = Path(source), ASSETS / str(source)
    if os.sep in str(source) or there(path / INDEX) or not there(embedded / INDEX):
        return path
    return embedded


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe as nested dictionaries from a file in a run's folder (``recipe.json``), by the names
    that fields have today.

    Raises ``RecipeError`` with the path where there is none or where it is no such thing, and
    ``InputError`` as ``read_json`` does.
    """
    try:
        table: Any = read_json(path)
    except FileNotFoundError:
        raise RecipeError(f"recipe = {str(path)!r}: no such file") from None
    sections = [table.get(key, {}) for key in SECTIONS] if isinstance(table, dict) else [None]
    tables = all(isinstance(each, dict) for each in sections)
    _check(tables, "recipe", str(path), "a table of fields and sections")
    for section, names in FORMER.items():
        values = table.get(section, {})
        for former, name in names.items():
            if former in values:
                values[name] = values.pop(former)
    generator = table.get("generator", {})
    if {"cfg_from", "cfg_until"} <= generator.keys():
        generator["cfg_interval"] = [generator.pop("cfg_from"), generator.pop("cfg_until")]
    practice = table.get("practice", {})
    sources = practice.get("sources")
    if isinstance(sources, list) and all(isinstance(each, str) for each in sources):
        practice["sources"] = list(_in_running_order(sources))
    found: dict[str, Any] = table
    return found


SECTIONS: dict[str, Any] = {
    "generator": Generator,
    "guidance": Guidance,
    "learner": Learner,
    "pool": Pool,
    "practice": Practice,
}


@functools.cache
def fields() -> dict[str, Option]:
    """Full name -> option: of the recipe itself (``seed``) and of its sections
    (``guidance.omega``).
    """
    found = dict(options(Recipe))
    for key in SECTIONS:
        found |= {f"{key}.{name}": each for name, each in options(SECTIONS[key]).items()}
    return found


@functools.cache
def _full_names() -> dict[str, list[str]]:
    """The last word of a full name -> the full names that end in it."""
    found: dict[str, list[str]] = {}
    for name in fields():
        found.setdefault(name.rpartition(".")[2], []).append(name)
    return found


def full_name(name: str) -> str:
    """The full name of a field that is named by its full name or by its last word.

    Raises ``RecipeError`` for an unknown name, and for a last word that several sections have.
    """
    if name in fields():
        return name
    found = _full_names().get(name, [])
    if len(found) > 1:
        raise RecipeError(f"{name}: several sections have it; say {' or '.join(found)}")
    if not found:
        raise RecipeError(
            f"{_word(name)}: no such field of a recipe; "
            f"known are {', '.join(map(short_name, fields()))}"
        )
    return found[0]


def short_name(name: str) -> str:
    """The last word of a field's full name where no other section has it, else the full name."""
    last = name.rpartition(".")[2]
    return last if _full_names().get(last, [name]) == [name] else name


def flat(table: dict[str, Any]) -> dict[str, Any]:
    """Short name -> value of a recipe as nested dictionaries (``Recipe.to_dict``)."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key in SECTIONS:
            found |= {short_name(f"{key}.{name}"): inner for name, inner in value.items()}
        else:
            found[key] = value
    return found


def _check_known(owner: Any, name: str, value: object) -> None:
    known = options(owner)
    _check(
        name in known,
        name,
        value,
        f"a field of {owner.__name__.lower()}; known are {', '.join(sorted(known))}",
    )
