"""The learner's training: AdamW, WSD, label smoothing and an EMA of the weights."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dpfast.config import Learner
from dpfast.learn.schedule import wsd

Tensors = tuple[Tensor, ...] | list[Tensor]


class Trainer:
    """Trains one model. ``ema`` holds averaged weights; both are updated in place, so a sampler can read them live."""

    def __init__(self, model: nn.Module, config: Learner, *, iterations: int) -> None:
        self.model, self.config, self.iterations = model.train(), config, iterations
        self.step_count = 0
        self.ema = AveragedModel(model, multi_avg_fn=self._average, use_buffers=True).eval()
        self.ema.requires_grad_(False)
        decayed = [p for p in model.parameters() if p.ndim > 1]
        plain = [p for p in model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.lr,
        )
        factor = partial(wsd, total=iterations, warmup=config.warmup, cooldown=config.cooldown)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    @property
    def cooling(self) -> bool:
        """Whether the last phase has begun, in which no samples are added."""
        return self.iterations - self.step_count <= self.config.cooldown * self.iterations

    @property
    def warming(self) -> bool:
        return self.step_count < self.config.warmup * self.iterations

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, as flat tensors; ``restore`` takes it back."""
        tensors = {"step": torch.tensor(self.step_count), "rng": torch.get_rng_state()}
        tensors |= {f"model/{key}": value for key, value in self.model.state_dict().items()}
        tensors |= {f"ema/{key}": value for key, value in self.ema.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": value for key, value in slots.items()}
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continues where ``state`` was taken; weights are written in place."""
        self.step_count = int(tensors["step"])
        torch.set_rng_state(tensors["rng"])
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

    def _average(self, averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        # The decay rises to its value, so that the average forgets the initial weights within a few steps.
        decay = min(self.config.ema_decay, (1 + self.step_count) / (10 + self.step_count))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - decay)
        else:
            torch._foreach_copy_(averaged, current)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One optimiser step on images (B, C, H, W) and labels (B,) or (B, K) probabilities; returns the 0-d loss."""
        loss = F.cross_entropy(self.model(images), labels, label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.ema.update_parameters(self.model)
        self.step_count += 1
        return loss.detach()
