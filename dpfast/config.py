"""Recipes: frozen keyword-only dataclasses, read from TOML, checked before any work starts.

A recipe is one ``Recipe`` of five sections. A field's full name has its section
(``guidance.omega``, on a command line ``--guidance.omega 0.03``); its last word alone is enough
where one section has it (``--omega 0.03``). Every check raises ``RecipeError`` with the field, its
value and what would be right.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpfast.errors import RecipeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SOURCES = ("dp", "static", "prune", "dynamic")  # in the order in which they run
RECIPES = Path(__file__).parent / "recipes"
RECIPE_FILE = "recipe.json"  # of a run's folder
ASSETS = Path(__file__).parent / "assets"
# field -> its option, and the names by which recipes call a folder that only their user has
USER_FOLDERS = {
    "pipeline": ("--pipeline DIR", ("stable-diffusion-1.5", "dit-xl-2")),
    "validation": ("--validation DIR", ("imagenet-val",)),
}


def _check(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise RecipeError(f"{name} = {value!r}: {wanted}")


@dataclass(frozen=True, kw_only=True)
class Generator:
    """How a sample is made, guided or not."""

    pipeline: str = "fashion"  # an embedded asset's name, or the folder of a diffusers pipeline
    class_names: tuple[
        str, ...
    ] = ()  # by id, what a text-conditioned pipeline is asked for; empty: the folder's own;
    # "imagenet1k" or "imagenet100" alone: the classes of that set, by all of their WordNet names
    image_size: int = (
        0  # side of the images that enter the pool and that the learner sees, pixels; 0: as decoded
    )
    prompt_template: str = "a photo of a {}"  # of a text-conditioned pipeline, {} is the class name
    dtype: str = (
        "float32"  # of the models: "float32", "bfloat16" or "float16"; latents stay in float32
    )
    solver: str = (
        "auto"  # "ddim", "dpmpp2m", for flow models "euler", for distilled ones "lcm" or "tcd";
        # "auto": ddim, or the one that the model was made for
    )
    steps: int = 15
    cfg_scale: float = (
        1.5  # diffusers' convention (1 = no classifier-free guidance), the paper's lambda + 1
    )
    # classifier-free guidance acts in this part of the trajectory, from and until a fraction of the
    # steps; outside of it a step costs half and the images differ
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    cache_interval: int = (
        1  # of a run of unguided steps every one so many runs the whole denoiser, the others reuse
    )
    # features of its inner blocks: cheaper, and other images; 1: every step is whole
    eta: float = 0.0  # 0: deterministic DDIM, 1: ancestral; TCD's gamma
    # torch.compile: pays for many samples; a resumed run needs the same choice for the same bits
    compile: bool = False
    compile_region: str = (
        "step"  # what is compiled: whole steps, or the transformer's "blocks" alone, once for all
    )
    batch_size: int = 250  # samples in one sampler batch; the images do not depend on it
    micro_batch: int | None = (
        None  # samples that are in memory at once; None: batch_size, or what fits of it
    )
    attention: str = "sdpa"  # torch's scaled_dot_product_attention, or "xformers" on a GPU
    channels_last: bool = (
        False  # memory format of UNets and full decoders, what their convolutions want on a GPU
    )

    def __post_init__(self) -> None:
        named = all(isinstance(name, str) and name.strip() for name in self.class_names)
        _check(named, "class_names", self.class_names, "a list of names, none of them empty")
        template, solvers = self.prompt_template, ("auto", "ddim", "dpmpp2m", "euler", "lcm", "tcd")
        _check(
            template.count("{}") == 1,
            "prompt_template",
            template,
            "text with one '{}' for the class name",
        )
        dtypes = ("float32", "bfloat16", "float16")
        _check(self.dtype in dtypes, "dtype", self.dtype, "'float32', 'bfloat16' or 'float16'")
        _check(
            self.solver in solvers,
            "solver",
            self.solver,
            "'auto', 'ddim', 'dpmpp2m', 'euler', 'lcm' or 'tcd'",
        )
        _check(1 <= self.steps <= 1000, "steps", self.steps, "between 1 and 1000")
        _check(
            self.cfg_scale >= 0,
            "cfg_scale",
            self.cfg_scale,
            "at least 0; 1 switches classifier-free guidance off",
        )
        interval = self.cfg_interval
        _check(
            len(interval) == 2 and 0 <= interval[0] < interval[1] <= 1,
            "cfg_interval",
            interval,
            "two fractions of the steps, 0 <= from < until <= 1",
        )
        _check(
            self.cache_interval >= 1,
            "cache_interval",
            self.cache_interval,
            "at least 1, which reuses nothing",
        )
        _check(0 <= self.eta <= 1, "eta", self.eta, "between 0 (DDIM) and 1 (ancestral)")
        free = self.solver in ("auto", "ddim", "tcd")
        _check(
            free or not self.eta,
            "eta",
            self.eta,
            f"0 with solver = {self.solver!r}: for 'ddim' and 'tcd' alone",
        )
        _check(self.batch_size >= 1, "generator.batch_size", self.batch_size, "at least 1")
        most = self.micro_batch
        _check(
            most is None or most >= 1,
            "generator.micro_batch",
            most,
            "at least 1, or left out for what fits",
        )
        regions = ("step", "blocks")
        _check(
            self.compile_region in regions,
            "compile_region",
            self.compile_region,
            "'step' or 'blocks'",
        )
        _check(
            self.image_size >= 0,
            "image_size",
            self.image_size,
            "pixels, or 0 for the size that is decoded",
        )
        _check(
            self.attention in ("sdpa", "xformers"),
            "attention",
            self.attention,
            "'sdpa' or 'xformers'",
        )

    @property
    def at_once(self) -> int:
        """Samples that a sampler has in memory at once, at most."""
        most = self.micro_batch
        return self.batch_size if most is None else min(most, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly and when the learner's entropy pulls on a sample
    (``dpfast.generate.guidance``).
    """

    omega: float = (
        0.05  # relative mode: the displacement of a latent as a fraction of its norm; 0: unguided
    )
    every: int = 3  # guided is every k-th step, from start on
    start: float = (
        0.0  # the first part of the trajectory stays unguided, up to this fraction of the steps
    )
    until: float = (
        1.0  # the last part of the trajectory stays unguided from this fraction of the steps on
    )
    mode: str = "relative"  # "relative" (paper's practice) or "score" (Algorithm 1)
    through: str = (
        "denoiser"  # "latent" leaves the denoiser's backward pass out: cheaper, approximate
    )
    # what guidance raises: "entropy", "loss" of the label, "margin" between two classes, or
    # "disagreement" of the EMA and the raw weights, which runs both in every guided step
    criterion: str = "entropy"
    guide_with: str = "ema"  # the learner's weights that guide: "ema" or "raw"

    def __post_init__(self) -> None:
        _check(self.every >= 1, "every", self.every, "at least 1 (every step)")
        _check(0 <= self.start < 1, "start", self.start, "in [0, 1)")
        _check(
            self.start < self.until <= 1,
            "until",
            self.until,
            f"in ({self.start:g}, 1]",
        )
        _check(self.mode in ("relative", "score"), "mode", self.mode, "'relative' or 'score'")
        _check(
            self.through in ("denoiser", "latent"),
            "through",
            self.through,
            "'denoiser' or 'latent'",
        )
        criteria, named = (
            ("entropy", "loss", "margin", "disagreement"),
            "'entropy', 'loss', 'margin' or 'disagreement'",
        )
        _check(self.criterion in criteria, "criterion", self.criterion, named)
        _check(self.guide_with in ("ema", "raw"), "guide_with", self.guide_with, "'ema' or 'raw'")


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The classifier and how it is trained."""

    # "transformers:Class", "timm:name", "package.module:factory"
    model: str = "transformers:RegNetForImageClassification"
    options: dict[str, Any] = field(
        default_factory=dict
    )  # keyword arguments of the model's configuration
    classes: int | None = None  # None: as many as the generator has
    batch_size: int = 64
    micro_batch: int | None = (
        None  # images of a rank in one forward and backward pass; None: as many as fit
    )
    activation_checkpointing: bool = (
        False  # blocks compute their activations twice: less memory, a quarter more work
    )
    lr: float = 3e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.0
    ema_decay: float = 0.99
    evaluate_with: str = (
        "ema"  # the weights whose accuracy counts: "ema" or "raw"; those that guide: ``guide_with``
    )
    clip_grad_norm: float = 0.0  # largest norm of the gradient of all weights; 0: not clipped
    # of the forward pass: "fp32", "bf16" by autocast, or "auto": bf16 on a GPU that has it
    precision: str = "auto"
    compile: bool | str = (
        "auto"  # torch.compile of the learner's step; "auto": on a GPU, where it pays
    )
    warmup: float = 0.1  # fraction of the iterations, linear
    cooldown: float = 0.2  # fraction of the iterations, cosine to zero; no samples are added in it
    flip: bool = True  # random horizontal flip
    shift: int = 2  # random translation, pixels
    crop: float = 1.0  # random resized crop: the smallest share of the area that is kept; 1: none
    mixup: float = 0.0  # alpha of the Beta distribution of the share; 0: none
    cutmix: float = 0.0  # the same; with both, a batch gets one of the two
    loader: str = "auto"  # "dali", "torch", or "auto": DALI for JPEG, torch for pixels and latents

    def __post_init__(self) -> None:
        _check(
            ":" in self.model,
            "model",
            self.model,
            "'transformers:Class', 'timm:name' or 'package.module:factory'",
        )
        _check(self.batch_size >= 2, "learner.batch_size", self.batch_size, "at least 2")
        micro = self.micro_batch
        _check(
            micro is None or micro >= 1,
            "learner.micro_batch",
            micro,
            "at least 1, or left out for as many as fit",
        )
        named = isinstance(self.compile, bool) or self.compile == "auto"
        _check(named, "learner.compile", self.compile, "true, false or 'auto'")
        _check(self.lr > 0, "lr", self.lr, "above 0")
        _check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        _check(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")
        _check(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1)")
        weights, precisions = ("ema", "raw"), ("auto", "fp32", "bf16")
        _check(self.evaluate_with in weights, "evaluate_with", self.evaluate_with, "'ema' or 'raw'")
        _check(
            self.clip_grad_norm >= 0,
            "clip_grad_norm",
            self.clip_grad_norm,
            "at least 0; 0 does not clip",
        )
        _check(
            self.precision in precisions, "precision", self.precision, "'auto', 'fp32' or 'bf16'"
        )
        _check(0 <= self.warmup < 1, "warmup", self.warmup, "in [0, 1)")
        _check(
            0 <= self.cooldown <= 1 - self.warmup,
            "cooldown",
            self.cooldown,
            f"in [0, {1 - self.warmup:g}]",
        )
        _check(self.shift >= 0, "shift", self.shift, "at least 0 pixels")
        _check(
            0 < self.crop <= 1,
            "crop",
            self.crop,
            "in (0, 1]; 1 switches the random resized crop off",
        )
        _check(self.mixup >= 0, "mixup", self.mixup, "at least 0")
        _check(self.cutmix >= 0, "cutmix", self.cutmix, "at least 0")
        _check(
            self.loader in ("auto", "dali", "torch"),
            "loader",
            self.loader,
            "'auto', 'dali' or 'torch'",
        )


@dataclass(frozen=True, kw_only=True)
class Practice:
    """Algorithm 1: how many samples, when more, and against which rivals."""

    initial_samples: int = 1500  # N
    round_samples: int = 750  # P
    maximum_samples: int = 6000
    maximum_rounds: int | None = None  # additions; None: as many as maximum_samples allows
    iterations: int = 1500  # optimiser steps
    evaluate_every: int = 25  # tau, in evaluate_unit
    # "steps" of the optimiser, or "passes" over the initial samples (the paper's tau: 1)
    evaluate_unit: str = "steps"
    patience: int = 2  # T_max at the start, in evaluations without a new best
    # T_max: max(patience, pool / 4 N); "pool": patience * pool / N; "round", "fixed"
    patience_growth: str = "coverage"
    omega_rounds: tuple[
        float, ...
    ] = ()  # omega of round 1, 2, ...; the last one for all later; empty: omega
    cfg_scale_rounds: tuple[float, ...] = ()  # cfg_scale of round 1, 2, ..., the same way
    fresh_weight: float = (
        1.0  # how much more often a sample of the newest round is drawn; 1: the paper
    )
    allot: str = (
        "equal"  # labels of new samples: "equal", or by the classes' validation error: "difficulty"
    )
    early_candidates: float = (
        1.0  # dp: trajectories begun for each sample, the easiest are stopped early; 1: none is
    )
    early_until: float = 0.4  # after the last guided step before this fraction of the steps
    # dp: the fraction of the steps at which new samples begin, from pool samples; 0: from noise
    restart: float = 0.0
    oversample: float = 4.0  # prune: candidates for each sample that is kept
    prune_within: str = "class"  # prune keeps the highest entropy within each "class", or "overall"
    sources: tuple[str, ...] = ("dp", "static")  # runs of one command, compared in its table
    checkpoint_share: float = (
        0.01  # of the run's seconds: what saving takes at most, though it is in the background
    )
    checkpoint_minutes: float = (
        10.0  # none is older than this while the learner trains; 0: one at every evaluation
    )
    checkpoints_kept: int = 2  # the newest ones of a source
    overlap: int = (
        0  # of several ranks so many only generate, while the others train; 0: all do both in turn
    )
    overlap_staleness: int = (
        1000  # with overlap: optimiser steps between a learner and the addition of what it guided
    )
    keep_rounds: bool = False  # also those at the end of every round, for --branch-at

    def __post_init__(self) -> None:
        _check(self.round_samples >= 1, "round_samples", self.round_samples, "at least 1")
        _check(
            self.maximum_samples >= self.initial_samples,
            "maximum_samples",
            self.maximum_samples,
            f"at least initial_samples ({self.initial_samples})",
        )
        rounds = self.maximum_rounds
        _check(
            rounds is None or rounds >= 0,
            "maximum_rounds",
            rounds,
            "at least 0, or left out for no limit",
        )
        _check(self.iterations >= 10, "iterations", self.iterations, "at least 10")
        units, growths = ("steps", "passes"), ("coverage", "pool", "round", "fixed")
        _check(
            self.evaluate_unit in units, "evaluate_unit", self.evaluate_unit, "'steps' or 'passes'"
        )
        most = (
            f"between 1 and iterations ({self.iterations})"
            if self.evaluate_unit == "steps"
            else "at least 1"
        )
        fits = self.evaluate_unit != "steps" or self.evaluate_every <= self.iterations
        _check(self.evaluate_every >= 1 and fits, "evaluate_every", self.evaluate_every, most)
        _check(self.patience >= 1, "patience", self.patience, "at least 1 evaluation")
        known = "'coverage', 'pool', 'round' or 'fixed'"
        _check(self.patience_growth in growths, "patience_growth", self.patience_growth, known)
        _check(
            min(self.cfg_scale_rounds, default=0.0) >= 0,
            "cfg_scale_rounds",
            self.cfg_scale_rounds,
            "each at least 0",
        )
        _check(
            self.fresh_weight > 0, "fresh_weight", self.fresh_weight, "above 0; 1 draws uniformly"
        )
        _check(
            self.allot in ("equal", "difficulty"), "allot", self.allot, "'equal' or 'difficulty'"
        )
        _check(
            self.early_candidates >= 1,
            "early_candidates",
            self.early_candidates,
            "at least 1, which stops none",
        )
        _check(0 < self.early_until < 1, "early_until", self.early_until, "in (0, 1)")
        _check(0 <= self.restart < 1, "restart", self.restart, "in [0, 1); 0 starts from noise")
        both = self.early_candidates > 1 and self.restart
        _check(
            not both,
            "restart",
            self.restart,
            f"0 with early_candidates = {self.early_candidates:g}: one of the two",
        )
        _check(
            self.oversample >= 1, "oversample", self.oversample, "at least 1, which prunes nothing"
        )
        _check(
            self.prune_within in ("class", "overall"),
            "prune_within",
            self.prune_within,
            "'class' or 'overall'",
        )
        _check(self.overlap >= 0, "overlap", self.overlap, "at least 0 ranks")
        stale = self.overlap_staleness
        _check(stale >= 1, "overlap_staleness", stale, "at least 1 optimiser step")
        share, minutes = self.checkpoint_share, self.checkpoint_minutes
        _check(0 < share <= 1, "checkpoint_share", share, "in (0, 1]")
        _check(
            minutes >= 0,
            "checkpoint_minutes",
            minutes,
            "at least 0, which saves at every evaluation",
        )
        _check(self.checkpoints_kept >= 1, "checkpoints_kept", self.checkpoints_kept, "at least 1")
        _check(
            bool(self.sources)
            and set(self.sources) <= set(SOURCES)
            and len(set(self.sources)) == len(self.sources),
            "sources",
            ",".join(self.sources),
            f"a choice of {', '.join(SOURCES)}, each once",
        )

    def interval(self, batch_size: int) -> int:
        """Optimiser steps between two evaluations."""
        if self.evaluate_unit == "steps":
            return self.evaluate_every
        return -(-self.evaluate_every * self.initial_samples // batch_size)


@dataclass(frozen=True, kw_only=True)
class Pool:
    """As what the samples are kept, and how much of which memory they may take
    (``dpfast.pool``).
    """

    # uint8; "latents": fp16, decoded by the guidance's decoder when a batch is made; "jpeg"
    codec: str = "pixels"
    device_gib: float | None = (
        None  # GiB on the run's device, filled first; None: of a GPU half of what is free
    )
    host_gib: float | None = (
        None  # GiB of host memory, filled next; None: 70 % of what is free at the start
    )
    mapped: bool = (
        False  # memory-mapped files in the run's folder hold the rest, up to 90 % of its free disk
    )
    # pixels in the run's folder: "png" or "npy", exact; "jpeg"; "none": no resume, no export
    save_samples: str = "png"

    def __post_init__(self) -> None:
        codecs = ("pixels", "latents", "jpeg")
        _check(self.codec in codecs, "codec", self.codec, "'pixels', 'latents' or 'jpeg'")
        kept, named = self.save_samples, "'png', 'npy', 'jpeg' or 'none'"
        _check(kept in ("png", "npy", "jpeg", "none"), "save_samples", kept, named)
        _check(
            kept != "jpeg" or self.codec == "pixels",
            "save_samples",
            kept,
            "'png' unless codec = 'pixels'",
        )
        for name in ("device_gib", "host_gib"):
            value = getattr(self, name)
            _check(
                value is None or value >= 0,
                name,
                value,
                "at least 0 GiB, or left out for a share of what is free",
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run depends on. Two runs of one recipe on one machine give the same
    ``metrics.jsonl``.
    """

    name: str
    seed: int = 0
    device: str = (
        "auto"  # of models and batches: "cpu", "cuda", "cuda:1"; "auto": a GPU where there is one
    )
    # the real images: an embedded asset's name, or a folder with a sub-folder a class
    validation: str = "fashion"
    # a folder of real images for the final test; empty: every second one of the validation's
    held_out: str = ""
    evaluation: tuple[
        str, ...
    ] = ()  # further sets for the final table: "shifts", one shift, [NAME=]FOLDER of images
    generator: Generator = field(default_factory=Generator)
    guidance: Guidance = field(default_factory=Guidance)
    learner: Learner = field(default_factory=Learner)
    pool: Pool = field(default_factory=Pool)
    practice: Practice = field(default_factory=Practice)

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**31, "seed", self.seed, "between 0 and 2147483647")
        interval, iterations = (
            self.practice.interval(self.learner.batch_size),
            self.practice.iterations,
        )
        _check(
            interval <= iterations,
            "evaluate_every",
            self.practice.evaluate_every,
            f"{interval} steps until the first evaluation, at most iterations ({iterations})",
        )

        branches = self.practice.keep_rounds and self.pool.save_samples == "none"
        _check(
            not branches,
            "keep_rounds",
            True,
            "false with save_samples = 'none': a branch needs the samples",
        )
        early, omegas = (
            self.practice.early_candidates,
            self.practice.omega_rounds or (self.guidance.omega,),
        )
        _check(
            early == 1 or min(omegas) > 0,
            "early_candidates",
            early,
            "1 unless omega and all of omega_rounds are above 0: guidance scores the candidates, "
            "and the highest stay",
        )
        apart = self.guidance.criterion != "disagreement" or self.learner.ema_decay > 0
        _check(
            apart,
            "criterion",
            self.guidance.criterion,
            "another with ema_decay = 0: both weights are the same",
        )

    def need_folders(self, *names: str) -> None:
        """Raises ``RecipeError`` with the options of all fields of ``names`` whose folder its user
        has yet to name.
        """
        given, missing = {"pipeline": self.generator.pipeline, "validation": self.validation}, []
        for name in names:
            option, placeholders = USER_FOLDERS[name]
            if given[name] in placeholders and not Path(given[name]).is_dir():
                missing.append(option)
        if missing:
            raise RecipeError(
                f"recipe = {self.name!r}: needs folders of yours, say {' '.join(missing)}"
            )

    def check_ranks(self, count: int) -> None:
        """Raises ``RecipeError`` where a run under torchrun with ``count`` ranks would be
        refused.
        """
        practice, size, batch = (
            self.practice,
            self.learner.batch_size,
            self.generator.batch_size,
        )
        if practice.overlap and practice.overlap >= count:
            raise RecipeError(
                f"overlap = {practice.overlap}: expected 0, or under torchrun fewer than its "
                f"{count} ranks"
            )
        if count <= 1:
            return
        ranks = count - practice.overlap  # the others only generate
        if size % (2 * ranks):
            raise RecipeError(
                f"learner.batch_size = {size}: expected a multiple of {2 * ranks}, twice the "
                f"{ranks} ranks"
            )
        if -(-practice.initial_samples // batch) < ranks:
            raise RecipeError(
                f"generator.batch_size = {batch}: initial_samples = {practice.initial_samples} are "
                "fewer batches than the "
                f"{ranks} ranks; expected at most {practice.initial_samples // ranks}"
            )
        if "prune" in practice.sources and ranks > 1:
            raise RecipeError(
                "sources: 'prune' chooses among all candidates of a round; run it on one rank"
            )
        if practice.restart:
            raise RecipeError(
                f"restart = {practice.restart:g}: a sample begins from any of the pool's, of which "
                "each rank holds a "
                "part; expected 0, or one rank"
            )

    @classmethod
    def load(cls, source: str | Path, **overrides: Any) -> Recipe:
        """Reads a recipe by name or path and replaces fields by ``overrides``: ``omega=0.03``, or
        by section, ``learner={"batch_size": 32}``.

        Raises ``RecipeError`` for an unknown recipe, section or field, a wrong type or a value out
        of range.
        """
        path = Path(source) if str(source).endswith(".toml") else RECIPES / f"{source}.toml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
            raise RecipeError(
                f"recipe = {str(source)!r}: no such recipe; known are {known}, or a path that ends "
                "in .toml"
            )
        try:
            table = tomllib.loads(path.read_text())
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"recipe = {str(source)!r}: not valid TOML: {error}") from None
        table.setdefault("name", path.stem)
        for key, value in overrides.items():
            if key in SECTIONS and isinstance(value, dict):
                table.setdefault(key, {}).update(value)
                continue
            section, _, name = full_name(key).rpartition(".")
            (table.setdefault(section, {}) if section else table)[name] = value
        return cls.from_dict(table)

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Recipe:
        """Builds a recipe from nested dictionaries, the inverse of ``dataclasses.asdict``."""
        values: dict[str, Any] = {}
        for key, value in table.items():
            if key in SECTIONS:
                _check(isinstance(value, dict), key, value, "a table of fields")
                values[key] = SECTIONS[key](
                    **{k: _typed(f"{key}.{k}", v) for k, v in value.items()}
                )
            else:
                values[key] = _typed(key, value)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


SECTIONS: dict[str, type] = {
    "generator": Generator,
    "guidance": Guidance,
    "learner": Learner,
    "pool": Pool,
    "practice": Practice,
}


@functools.cache
def fields() -> dict[str, dataclasses.Field[Any]]:
    """Full name -> field: of the recipe itself (``seed``) and of its sections
    (``guidance.omega``).
    """
    found = {f.name: f for f in dataclasses.fields(Recipe) if f.name not in SECTIONS}
    for key, section in SECTIONS.items():
        found |= {f"{key}.{f.name}": f for f in dataclasses.fields(section)}
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
            f"{name}: no such field of a recipe; known are {', '.join(map(short_name, fields()))}"
        )
    return found[0]


def short_name(name: str) -> str:
    """The last word of a field's full name where one section has it, else the full name."""
    last = name.rpartition(".")[2]
    return last if _full_names()[last] == [name] else name


def flat(table: dict[str, Any]) -> dict[str, Any]:
    """Short name -> value of a recipe as nested dictionaries (``Recipe.to_dict``)."""
    found = {}
    for key, value in table.items():
        for name, inner in value.items() if key in SECTIONS else ((None, value),):
            found[key if name is None else f"{key}.{name}"] = inner
    return {short_name(name) if name in fields() else name: v for name, v in found.items()}


def _typed(full: str, value: Any) -> Any:
    """Checks ``value`` against the field's type; takes the text of a command line as well."""
    section, _, name = full.rpartition(".")
    if full not in fields():
        known = dataclasses.fields(SECTIONS[section] if section else Recipe)
        raise RecipeError(
            f"{name} = {value!r}: no such field in {section or 'recipe'}; known are "
            f"{', '.join(sorted(f.name for f in known))}"
        )
    name = short_name(full)
    kind = str(fields()[full].type)
    if value is None and kind.endswith("| None"):
        return None
    if kind.startswith("tuple[float"):
        items = value.split(",") if isinstance(value, str) else value
        _check(isinstance(items, (list, tuple)), name, value, "a list of numbers")
        return tuple(_number(name, item) for item in items)
    if kind.startswith("tuple"):
        items = [item.strip() for item in value.split(",")] if isinstance(value, str) else value
        _check(
            isinstance(items, (list, tuple)) and all(isinstance(i, str) for i in items),
            name,
            value,
            "a list of names",
        )
        return tuple(items)
    if kind.startswith("dict"):
        _check(isinstance(value, dict), name, value, "a table of keyword arguments")
        return value
    if kind.startswith("bool"):
        texts = {"true": True, "false": False, "1": True, "0": False}
        value = texts.get(value.lower(), value) if isinstance(value, str) else value
        _check(isinstance(value, bool) or kind == "bool | str", name, value, "true or false")
        return value
    if kind == "str":
        _check(isinstance(value, str), name, value, "a text")
        return value
    number = _number(
        name,
        value,
        "expected a number, or leave it out" if kind.endswith("| None") else "a finite number",
    )
    if kind.startswith("int"):
        _check(number == int(number), name, value, "a whole number")
        return int(number)
    return number


def _number(name: str, value: Any, expected: str = "a finite number") -> float:
    try:
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError):
        number = None
    _check(number is not None and number - number == 0, name, value, expected)
    assert number is not None
    return number
