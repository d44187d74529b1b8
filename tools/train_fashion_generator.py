#!/usr/bin/env python3
"""Trains the embedded generator: a class-conditional latent diffusion model of Fashion-MNIST, and
its two judges.

    python tools/train_fashion_generator.py --data /usr/share/datasets/fashion-mnist --work FOLDER
    [--stage STAGE]

Stages, in order (``--stage all`` runs each that is not finished):

    autoencoder  AutoencoderKL, 32x32x1 -> 4x8x8
    judge        a classifier of the real training images: the yardstick for the samples, never
                 shown to a learner
    judge_2      another one of the same images, of another family, seed and order: what is said of
                 samples must not hang on one network
    denoiser     DiTTransformer2DModel on the latents, v-prediction, label dropout for
                 classifier-free guidance
    tiny         AutoencoderTiny, distilled from the autoencoder: the decoder of the guidance path
    export       float16 pipeline folder for ``DiTPipeline`` and the judges, into --out; a network
                 without a snapshot in --work is left as it is there
    report       label agreement, Fréchet distances, a contact sheet and the model card

Each stage writes a snapshot every few minutes and continues from it when started again. The random
numbers of a step are a function of (seed, step), so an interrupted run and an uninterrupted one
give the same weights on one machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from dpfast.cli.parser import Parser, in_one_line
from dpfast.data import fashion
from dpfast.evaluate.measures import evaluate, features, frechet_distance, predict
from dpfast.files import below
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from dpfast.learn.models import load_judge
from dpfast.practice.checkpoint import save_weights
from dpfast.report.sheets import contact_sheet
from dpfast.textfiles import read_json

NULL_CLASS = 1000  # the id that DiTPipeline uses for "no label"
SNAPSHOT_STEPS = 500

AUTOENCODER = {
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": 32,
}
TINY = {
    "in_channels": 1,
    "out_channels": 1,
    "encoder_block_out_channels": (16, 16, 16),
    "decoder_block_out_channels": (16, 16, 16),
    "num_encoder_blocks": (1, 1, 1),
    "num_decoder_blocks": (3, 2, 1),
    "latent_channels": 4,
}
DENOISER = {
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 6,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": NULL_CLASS,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
JUDGE = {
    "num_channels": 1,
    "num_labels": 10,
    "embedding_size": 32,
    "hidden_sizes": [64, 128, 256],
    "depths": [1, 2, 1],
    "groups_width": 256,
    "layer_type": "x",
}
SECOND_JUDGE = {
    "num_channels": 1,
    "num_labels": 10,
    "embedding_size": 32,
    "hidden_sizes": [64, 128],
    "depths": [2, 2],
    "layer_type": "basic",
}


def pixels(images: Tensor) -> Tensor:
    """uint8 (B, 1, 32, 32) to float in [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class Trainer:
    """AdamW with warm-up and cosine decay, an EMA of the weights, and resumable snapshots in
    safetensors.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        folder: Path,
        *,
        steps: int,
        lr: float,
        ema: float,
        weight_decay: float = 0.0,
    ):
        self.name = name
        self.model = model
        self.folder = folder
        self.steps = steps
        self.ema_decay = ema
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True
        )
        warmup = min(500, steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda s: min(
                (s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, s / steps)) + 1e-3
            ),
        )
        self.ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.step = 0
        self._restore()

    @property
    def snapshot(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    def _restore(self) -> None:
        if not self.snapshot.is_file():
            return
        tensors = load_file(self.snapshot)
        self.step = int(tensors["step"])
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model/")})
        self.ema = {k[4:]: v.clone() for k, v in tensors.items() if k.startswith("ema/")}
        state = self.optimizer.state_dict()
        state["state"] = {
            i: {k: tensors[f"adam/{i}/{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
            for i in range(len(state["param_groups"][0]["params"]))
        }
        self.optimizer.load_state_dict(state)
        self.schedule.last_epoch = self.step
        for group, base in zip(self.optimizer.param_groups, self.schedule.base_lrs, strict=True):
            group["lr"] = base * self.schedule.lr_lambdas[0](self.step)
        print(f"{self.name}: continues at step {self.step} of {self.steps}", flush=True)

    def save(self) -> None:
        tensors = {"step": torch.tensor(self.step)}
        tensors |= {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam/{i}/{k}": v for k, v in state.items()}
        save_weights(tensors, self.snapshot)

    def run(self, loss_of: Callable[[int], Tensor], *, report_every: int = 100) -> nn.Module:
        """Trains to ``steps`` and returns the model with its EMA weights."""
        started = time.time()
        first = self.step
        total = 0.0
        while self.step < self.steps:
            loss = loss_of(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.step += 1
            decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
            for key, value in self.model.state_dict().items():
                if value.is_floating_point():
                    self.ema[key].lerp_(value, 1 - decay)
                else:
                    self.ema[key].copy_(value)
            total += float(loss.detach())
            if self.step % report_every == 0:
                rate = (self.step - first) / (time.time() - started)
                left = (self.steps - self.step) / rate / 60
                loss_now = f"loss {total / report_every:.5f}"
                print(
                    f"{self.name} {self.step}/{self.steps} {loss_now} "
                    f"{rate:.2f} step/s {left:.1f} min left",
                    flush=True,
                )
                total = 0.0
            if self.step % SNAPSHOT_STEPS == 0 or self.step == self.steps:
                self.save()
        self.model.load_state_dict(self.ema)
        return self.model.eval()


def batches(n: int, batch: int, seed: int) -> Callable[[int], Tensor]:
    """Step -> indices of an epoch-wise shuffled pass; a function of (seed, step) alone."""
    per_epoch = n // batch
    cache: dict[int, Tensor] = {}

    def indices(step: int) -> Tensor:
        epoch, position = divmod(step, per_epoch)
        if epoch not in cache:
            cache.clear()
            cache[epoch] = torch.randperm(n, generator=step_generator(seed, epoch))
        return cache[epoch][position * batch : (position + 1) * batch]

    return indices


def load_ema(model: nn.Module, folder: Path, name: str) -> nn.Module:
    tensors = load_file(folder / f"{name}.safetensors")
    model.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("ema/")})
    return model.eval().requires_grad_(False)


def train_autoencoder(images: Tensor, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = AutoencoderKL(**AUTOENCODER).to(memory_format=torch.channels_last)
    trainer = Trainer(
        "autoencoder", model, args.work, steps=args.autoencoder_steps, lr=1e-3, ema=0.998
    )
    order = batches(len(images), 64, args.seed + 1)

    def loss_of(step: int) -> Tensor:
        x = pixels(images[order(step)])
        posterior = model.encode(x).latent_dist
        y = model.decode(posterior.sample(step_generator(args.seed + 2, step))).sample
        # At 0.005 two of the four channels collapse and prints and checks blur away.
        edges = sum(F.mse_loss(y.diff(dim=d), x.diff(dim=d)) for d in (-1, -2))
        return F.mse_loss(y, x) + 0.5 * edges + 1e-4 * posterior.kl().mean() / x[0].numel()

    trainer.run(loss_of)


def new_judge() -> nn.Module:
    return RegNetForImageClassification(RegNetConfig(**JUDGE))


def new_second_judge() -> nn.Module:
    return ResNetForImageClassification(ResNetConfig(**SECOND_JUDGE))


def train_judge(images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    train_classifier(
        "judge", new_judge, images, labels, args, steps=args.judge_steps, seed=10, bf16=False
    )


def train_second_judge(images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    train_classifier(
        "judge_2",
        new_second_judge,
        images,
        labels,
        args,
        steps=args.second_judge_steps,
        seed=40,
        bf16=args.bf16,
    )


def train_classifier(
    name: str,
    new: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    args: argparse.Namespace,
    *,
    steps: int,
    seed: int,
    bf16: bool,
) -> None:
    """seed: added to that of the command, for this classifier's weights, order and crops."""
    seed += args.seed
    torch.manual_seed(seed)
    model = new().to(memory_format=torch.channels_last).train()
    trainer = Trainer(name, model, args.work, steps=steps, lr=3e-3, ema=0.998, weight_decay=0.05)
    order = batches(len(images), 128, seed + 1)

    def loss_of(step: int) -> Tensor:
        generator = step_generator(seed + 2, step)
        index = order(step)
        x = F.pad(pixels(images[index]), (2, 2, 2, 2), value=-1.0)
        top, left = torch.randint(0, 5, (2,), generator=generator).tolist()
        x = x[..., top : top + 32, left : left + 32]
        flip = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(torch.where(flip, x.flip(-1), x)).logits
        return F.cross_entropy(logits.float(), labels[index], label_smoothing=0.05)

    trainer.run(loss_of)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    parts = [vae.encode(pixels(chunk)).latent_dist for chunk in images.split(500)]
    return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])


def latents_of(images: Tensor, args: argparse.Namespace) -> tuple[AutoencoderKL, Tensor, Tensor]:
    """The trained autoencoder with its scaling factor set, and mean and std of every image's scaled
    posterior.
    """
    vae = load_ema(AutoencoderKL(**AUTOENCODER), args.work, "autoencoder")
    mean, std = encode_all(vae, images)
    vae.register_to_config(scaling_factor=round(1.0 / float(mean.std()), 5))
    print(
        f"latents: std {float(mean.std()):.4f}, posterior noise {float(std.mean()):.4f}", flush=True
    )
    return vae, mean * vae.config.scaling_factor, std * vae.config.scaling_factor


def train_denoiser(images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    _, mean, std = latents_of(images, args)
    torch.manual_seed(args.seed + 20)
    # eval(): diffusers' own label dropout draws anew in every block; here it is drawn once per
    # sample
    model = DiTTransformer2DModel(**DENOISER).eval()
    trainer = Trainer("denoiser", model, args.work, steps=args.denoiser_steps, lr=1e-3, ema=0.9995)
    scheduler = DDIMScheduler(**SCHEDULER)
    alpha, sigma = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    order = batches(len(images), 256, args.seed + 21)
    forward = torch.compile(model) if args.compile else model

    def loss_of(step: int) -> Tensor:
        generator = step_generator(args.seed + 22, step)
        index = order(step)
        x0 = torch.addcmul(
            mean[index], std[index], torch.randn(mean[index].shape, generator=generator)
        )
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(0, 1000, (len(x0),), generator=generator)
        label = torch.where(
            torch.rand(len(x0), generator=generator) < 0.1, NULL_CLASS, labels[index]
        )
        a, s = alpha[t].view(-1, 1, 1, 1), sigma[t].view(-1, 1, 1, 1)
        # 16 tokens: the plain product is twice as fast as the flash kernel in bfloat16 on a CPU
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16), sdpa_kernel(SDPBackend.MATH):
            v = forward(a * x0 + s * noise, timestep=t, class_labels=label).sample
        return F.mse_loss(v.float(), a * noise - s * x0)

    trainer.run(loss_of)


def train_tiny(images: Tensor, args: argparse.Namespace) -> None:
    vae, mean, std = latents_of(images, args)
    torch.manual_seed(args.seed + 30)
    model = AutoencoderTiny(**TINY).to(memory_format=torch.channels_last)
    trainer = Trainer("tiny", model, args.work, steps=args.tiny_steps, lr=2e-3, ema=0.998)
    order = batches(len(images), 64, args.seed + 31)

    def loss_of(step: int) -> Tensor:
        generator = step_generator(args.seed + 32, step)
        index = order(step)
        # guidance decodes predictions of x0 made at every noise level, so half of the latents are
        # perturbed
        spread = torch.rand(len(index), 1, 1, 1, generator=generator).sub(0.5).clamp(min=0.0)
        z = mean[index] + (std[index] + spread) * torch.randn(
            mean[index].shape, generator=generator
        )
        with torch.no_grad():
            target = vae.decode(z / vae.config.scaling_factor).sample
        encoded = model.encode(pixels(images[index])).latents
        return F.mse_loss(model.decode(z).sample, target) + 0.1 * F.mse_loss(encoded, mean[index])

    trainer.run(loss_of)


def export(images: Tensor, args: argparse.Namespace) -> None:
    made = {file.stem for file in args.work.glob("*.safetensors")}
    if made >= {"autoencoder", "denoiser", "tiny"}:
        export_generator(images, args)
    for name, new in (("judge", new_judge), ("judge_2", new_second_judge)):
        if name in made:
            judge = load_ema(new(), args.work, name)
            judge.half().save_pretrained(args.out / f"fashion_{name}", safe_serialization=True)
    os.umask(umask := os.umask(0))
    size = 0
    for folder in ("fashion", "fashion_judge", "fashion_judge_2"):
        for file in below(args.out / folder):
            file.chmod(0o666 & ~umask)  # safetensors 0.8 writes for its user alone
            size += file.stat().st_size
    print(
        f"exported {', '.join(sorted(made))} to {args.out}, now {size / 2**20:.1f} MiB", flush=True
    )


def export_generator(images: Tensor, args: argparse.Namespace) -> None:
    vae, _, _ = latents_of(images[:5000], args)
    transformer = load_ema(DiTTransformer2DModel(**DENOISER), args.work, "denoiser")
    tiny = load_ema(AutoencoderTiny(**TINY), args.work, "tiny")
    id2label = {str(i): name for i, name in enumerate(fashion.CLASSES)}
    pipeline = DiTPipeline(
        transformer.half(), vae.half(), DDIMScheduler(**SCHEDULER), id2label=id2label
    )
    pipeline.register_to_config(id2label=id2label)
    pipeline.save_pretrained(args.out / "fashion", safe_serialization=True)
    tiny.half().save_pretrained(args.out / "fashion" / "tiny_decoder", safe_serialization=True)
    config = args.out / "fashion" / "tiny_decoder" / "config.json"
    known = {k: v for k, v in read_json(config).items() if k != "block_out_channels"}
    # a key that diffusers writes and then warns of
    config.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def report(images: Tensor, args: argparse.Namespace) -> None:
    """Measures the exported folders and prints the figures of the model card."""
    test, test_labels = fashion.read_split(args.data, "t10k")
    pipeline, judge = Pipeline.from_pretrained(args.out / "fashion"), load_judge()
    second = load_judge(2)
    for name, network in (("judge", judge), ("judge_2", second)):
        top1 = evaluate(network, test, test_labels).top1
        print(f"{name}: {top1:.2%} of the 10,000 real test images")
    alike = (predict(judge, test).argmax(1) == predict(second, test).argmax(1)).float()
    print(f"the judges agree on {float(alike.mean()):.2%} of the real test images")
    vae = pipeline.decoder.vae
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(pixels(part)).latent_dist.mean for part in test[:2000].split(500)]
        )
        decoded = torch.cat([vae.decode(part).sample for part in latents.split(500)])
        tiny = torch.cat(
            [
                pipeline.guidance_decoder(part)
                for part in (latents * vae.config.scaling_factor).split(500)
            ]
        )
    for name, got, wanted in (
        ("autoencoder on real test images", decoded, pixels(test[:2000])),
        ("tiny decoder against full", tiny, decoded),
    ):
        print(f"{name}: PSNR {10 * math.log10(4 / float(F.mse_loss(got, wanted))):.2f} dB")
    real = features(judge, test)
    kept = torch.randperm(len(images), generator=step_generator(args.seed, 99))[: len(test)]
    floor = frechet_distance(features(judge, images[kept]), real)
    print(f"Frechet distance to the real test images: of 10,000 real training images {floor:.3f}")
    labels = torch.arange(5000) % 10
    for cfg_scale in args.report_cfg:
        for steps in args.report_steps:
            sampler = GuidedSampler(pipeline, steps=steps, cfg_scale=cfg_scale, seed=args.seed)
            samples = torch.cat([batch.images for batch in sampler.stream(labels)])
            said = predict(judge, samples).argmax(1)
            said_second = predict(second, samples).argmax(1)
            agreement = (said == labels).float()
            by_class = " ".join(f"{float(agreement[labels == k].mean()):.2f}" for k in range(10))
            distance = frechet_distance(features(judge, samples), real)
            print(
                f"cfg {cfg_scale} steps {steps}: label agreement "
                f"{float(agreement.mean()):.2%} ({by_class})",
                end=", ",
            )
            print(
                f"of judge_2 {float((said_second == labels).float().mean()):.2%}, "
                f"judges alike {float((said == said_second).float().mean()):.2%}, "
                f"Frechet distance {distance:.3f}",
                flush=True,
            )
            rows = [samples[labels == k][:20] for k in range(10)]
            title = f"unguided samples, {steps} steps, CFG scale {cfg_scale}"
            contact_sheet(
                rows, fashion.CLASSES, title, args.work / f"sheet_{cfg_scale}_{steps}.png"
            )


def stages(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], None]]]:
    images, labels = fashion.read_split(args.data, "train")
    yield "autoencoder", lambda: train_autoencoder(images, args)
    yield "judge", lambda: train_judge(images, labels, args)
    yield "judge_2", lambda: train_second_judge(images, labels, args)
    yield "denoiser", lambda: train_denoiser(images, labels, args)
    yield "tiny", lambda: train_tiny(images, args)
    yield "export", lambda: export(images, args)
    yield "report", lambda: report(images, args)


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four IDX files")
    parser.add_argument("--work", type=Path, required=True, help="snapshots")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parents[1] / "dpfast" / "assets",
        help="folder of the assets",
    )
    parser.add_argument(
        "--stage",
        choices=("autoencoder", "judge", "judge_2", "denoiser", "tiny", "export", "report", "all"),
        default="all",
        help="one of them (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    parser.add_argument(
        "--autoencoder-steps", type=int, default=2600, help="optimiser steps (default 2600)"
    )
    parser.add_argument(
        "--judge-steps", type=int, default=3000, help="optimiser steps (default 3000)"
    )
    parser.add_argument(
        "--second-judge-steps", type=int, default=3500, help="optimiser steps (default 3500)"
    )
    parser.add_argument(
        "--denoiser-steps", type=int, default=6000, help="optimiser steps (default 6000)"
    )
    parser.add_argument(
        "--tiny-steps", type=int, default=1500, help="optimiser steps (default 1500)"
    )
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="needs AVX512-BF16 or AMX to be fast",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the training steps are compiled",
    )
    parser.add_argument(
        "--report-cfg",
        type=float,
        nargs="+",
        default=[1.0, 1.5, 2.0],
        help="scales of classifier-free guidance in the report",
    )
    parser.add_argument(
        "--report-steps", type=int, nargs="+", default=[15], help="numbers of steps in the report"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for name, stage in stages(args):
        if args.stage in ("all", name):
            stage()
    return 0


if __name__ == "__main__":
    sys.exit(in_one_line("train_fashion_generator", main))
