"""The section ``[learner]`` of a recipe: what is trained, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dpfast.config.kinds import ImportPath
from dpfast.config.option import option
from dpfast.config.section import Section, require


@dataclass(frozen=True, kw_only=True)
class Learner(Section, name="learner"):
    """The classifier, and how it is trained."""

    model: str = option(
        "transformers:RegNetForImageClassification",
        common=True,
        help="architecture of the learner: transformers:Class, timm:name or package.module:factory",
    )
    options: dict[str, Any] = option(
        {},
        unset="none",
        common=True,
        help="keyword arguments of the model's configuration, on a command line in TOML: "
        "'depths = [1, 1], groups_width = 8'; "
        "--model with another one than the recipe's begins without them, and so does --pretrained "
        "with one of transformers",
    )
    pretrained: str = option(
        "",
        unit="folder",
        unset="random weights",
        common=True,
        help="weights that the learner begins with, its head anew for other classes; a folder of "
        "transformers' save_pretrained, or OWNER/NAME of one on the Hugging Face Hub, which says "
        "the options as well; of timm and of a factory of yours a .safetensors file",
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
        common=True,
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
    lr: float = option(3e-3, above=0, common=True, help="largest learning rate")
    weight_decay: float = option(
        0.05, low=0, common=True, help="weight decay of AdamW, decoupled from the gradient"
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
        common=True,
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
        common=True,
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
        require(bool(library and name), "model", self.model, kinds)
        wanted = f"a divisor of learner.batch_size ({self.batch_size})"
        require(self.batch_size % self.aug_repeats == 0, "aug_repeats", self.aug_repeats, wanted)
        most = 1 - self.warmup
        left = f"at most {most:g}, which warmup leaves"
        require(self.cooldown <= most, "cooldown", self.cooldown, left)

    def cooling_at(self, step: int, iterations: int) -> bool:
        """Returns True if the last phase has begun after ``step`` steps, in which no samples are
        added.
        """
        return iterations - step <= self.cooldown * iterations
