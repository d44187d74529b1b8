"""The learner's training: AdamW, warm-up/stable/decay, label smoothing, clipping, bf16 and an EMA of the weights.

Two sets of weights exist, and every reader says which it takes: ``guide_with`` those that guide the sampler,
``evaluate_with`` those whose accuracy counts. Both are updated in place, so that a captured sampler reads them live.

Several ranks train as one under ``DistributedDataParallel``: each takes its part of a batch, gradients and batch norms
are means over all, and every rank keeps the same weights, EMA and optimiser. Those of ViT-B are 1.7 GB with gradients
(86.6 M parameters, five copies): beside a generator they fit on any GPU of 24 GB, so nothing is sharded (FSDP).
"""

from __future__ import annotations

import contextlib
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from dpfast.config import Learner
from dpfast.device import is_gpu
from dpfast.learn.batch_norm import synchronised
from dpfast.learn.schedule import wsd
from dpfast.parallel import ALONE, Ranks

Tensors = tuple[Tensor, ...] | list[Tensor]


class Trainer:
    """Trains one model, on the device where its weights are, over ``iterations`` steps.

    The rate is a closed form of the step (``LambdaLR``), not the product of its past (``SequentialLR``): a checkpoint
    can go on under another number of iterations.
    """

    def __init__(self, model: nn.Module, config: Learner, *, iterations: int, ranks: Ranks = ALONE) -> None:
        self.config, self.iterations = config, iterations
        self.device = next(model.parameters()).device
        self.step_count = 0
        self.ema = AveragedModel(model, multi_avg_fn=self._average, use_buffers=True).eval()
        self.ema.requires_grad_(False)
        self.model = model = synchronised(model, ranks).train()
        decayed = [p for p in model.parameters() if p.ndim > 1]
        plain = [p for p in model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.lr,
            fused=is_gpu(self.device),
        )
        factor = partial(wsd, total=iterations, warmup=config.warmup, cooldown=config.cooldown)
        self.schedule = LambdaLR(self.optimizer, factor)
        self.bf16 = config.precision == "bf16" or (
            config.precision == "auto" and is_gpu(self.device) and torch.cuda.is_bf16_supported()
        )
        self._replica: nn.Module = model
        if not ranks.alone:  # buffers are equal already: batch norms are the ranks'
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of a name that torch 2.9 lacks for broadcast_buffers
                self._replica = ranks.learn.replicate(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        self._loss = torch.compile(self._forward) if config.compile_learner else self._forward

    @property
    def cooling(self) -> bool:
        """Whether the last phase has begun, in which no samples are added."""
        return self.iterations - self.step_count <= self.config.cooldown * self.iterations

    @property
    def warming(self) -> bool:
        return self.step_count < self.config.warmup * self.iterations

    def weights(self, which: str) -> nn.Module:
        """The module with the "ema" or the "raw" weights, live."""
        return self.ema.module if which == "ema" else self.model

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One optimiser step on images (B, C, H, W) and labels (B,) or (B, K) probabilities; returns the 0-d loss.

        Of several ranks, all take a step together, each on its part of the batch, whose loss it returns.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(images, labels)
        loss.backward()
        if self.config.clip_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.ema.update_parameters(self.model)
        self.step_count += 1
        return loss.detach()

    def _forward(self, images: Tensor, labels: Tensor) -> Tensor:
        # bf16 has the exponents of fp32: no gradient scaler is needed
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            logits = self._replica(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)

    def _average(self, averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        # The decay rises to its value, so that the average forgets the initial weights within a few steps.
        decay = min(self.config.ema_decay, (1 + self.step_count) / (10 + self.step_count))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - decay)
        else:
            torch._foreach_copy_(averaged, current)

    def release(self) -> None:
        """Gives back the memory of what a step leaves behind and the next one makes again: the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, as flat tensors; ``restore`` takes it back."""
        tensors = {"step": torch.tensor(self.step_count), "rng": torch.get_rng_state()}
        if is_gpu(self.device):
            tensors["device_rng"] = torch.cuda.get_rng_state(self.device)
        tensors |= {f"model/{key}": value for key, value in self.model.state_dict().items()}
        tensors |= {f"ema/{key}": value for key, value in self.ema.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": value for key, value in slots.items()}
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continues where ``state`` was taken; weights are written in place."""
        self.step_count = int(tensors["step"])
        torch.set_rng_state(tensors["rng"])
        if is_gpu(self.device) and "device_rng" in tensors:
            torch.cuda.set_rng_state(tensors["device_rng"], self.device)
        for name, module in (("model", self.model), ("ema", self.ema)):
            module.load_state_dict(
                {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}
            )
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, slot = key.split("/")
                slots.setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.schedule.last_epoch = self.step_count
        for group, base, factor in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(self.step_count)
