"""The learner's training: AdamW, warm-up/stable/decay, label smoothing, clipping, bf16 and an EMA
of the weights.

Two sets of weights exist, and every reader says which it takes: ``guide_with`` those that guide the
sampler, ``evaluate_with`` those whose accuracy counts. Both are updated in place, so that a
captured sampler reads them live.

A step takes its batch in micro-batches and sums their gradients, so that a batch of any size fits
into memory. The mean is that over the whole batch: label smoothing and the probabilities of mixed
labels, which were mixed before, change nothing, and the gradients are those of one pass up to
rounding. Batch norms alone are of each micro-batch.

Several ranks train as one: each takes its part of a batch, gradients (``dpfast.learn.gradients``)
and batch norms are means over all, and every rank keeps the same weights, EMA and optimiser. Those
of ViT-B are 1.7 GB with gradients (86.6 M parameters, five copies): beside a generator they fit on
any GPU of 24 GB, so nothing is sharded (FSDP).

What is frozen (``dpfast.learn.parts``) has no gradient, no moments and no place in a message of
ranks. Its average is itself, bit for bit.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpfast.config import Learner
from dpfast.errors import InputError, first_line
from dpfast.hardware.device import is_gpu
from dpfast.hardware.out_of_memory import attempt, release
from dpfast.learn.batch_norm import alone, shared_norms, synchronised
from dpfast.learn.checkpointing import checkpoint_activations
from dpfast.learn.compiling import WhenItPays
from dpfast.learn.ema import Ema
from dpfast.learn.gradients import GradientBuckets, Gradients
from dpfast.learn.parts import freeze, layers
from dpfast.learn.precision import autocast, in_bf16, in_precision
from dpfast.parallel import ALONE, Ranks

log = logging.getLogger(__name__)


class Trainer:
    """Trains one model, on the device where its weights are, over ``iterations`` steps.

    A step waits for nothing on a GPU, so that the queue stays full: neither the loss nor a norm is
    read, and rate and decay go with the kernels. The rate is a closed form of the step, not the
    product of its past: a checkpoint can go on under another number of iterations.

    micro_batch: images of this rank in one forward and backward pass; None: its whole part of a
    batch. Running out of memory halves it for good.
    """

    def __init__(
        self, model: nn.Module, config: Learner, *, iterations: int, ranks: Ranks = ALONE
    ) -> None:
        self.config = config
        self.iterations = iterations
        self.ranks = ranks
        self.device = next(model.parameters()).device
        self.step_count = 0
        self._norm: Tensor | None = None  # of the newest step's gradient, where it was clipped
        self.micro_batch = config.micro_batch
        freeze(model, config.freeze)
        groups = parameter_groups(model, config)
        if not ranks.alone:
            for tensor in model.state_dict().values():
                ranks.learn.broadcast(tensor, ranks.process(0))
        self.ema = Ema(model)
        self.model = model = synchronised(model, ranks).train()
        if config.activation_checkpointing:
            checkpoint_activations(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        self.bf16 = in_bf16(config.precision, self.device)
        self._classifiers = {
            which: in_precision(self.weights(which), config.precision, self.device)
            for which in ("ema", "raw")
        }
        self.gradients = (
            Gradients(self.parameters) if ranks.alone else GradientBuckets(self.parameters, ranks)
        )
        self._norms = [] if ranks.alone else shared_norms(model)
        self._fits = not self._norms
        self._loss = torch.compile(self._forward) if config.compile is True else self._forward
        self._pays = (
            WhenItPays() if config.compile == "auto" and self.device.type == "cuda" else None
        )

    @property
    def cooling(self) -> bool:
        """True once the last phase has begun, in which no samples are added."""
        return self.cooling_at(self.step_count)

    def cooling_at(self, step: int) -> bool:
        """Returns ``cooling``, after ``step`` steps."""
        return self.config.cooling_at(step, self.iterations)

    @property
    def warming(self) -> bool:
        return self.step_count < self.config.warmup * self.iterations

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.rate_at(self.step_count)

    @property
    def newest_rate(self) -> float:
        """The learning rate of the newest step, or of the first one."""
        return self.rate_at(max(self.step_count - 1, 0))

    def rate_at(self, step: int) -> float:
        """Returns the learning rate of the step after ``step`` steps."""
        config = self.config
        return config.lr * wsd(
            step, total=self.iterations, warmup=config.warmup, cooldown=config.cooldown
        )

    def grad_norm(self) -> float | None:
        """Returns the norm of the newest step's gradient over all weights, before it was clipped;
        None where there was no step, or its gradients are given back. Waits for the device.
        """
        if self._norm is None:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            return float(nn.utils.get_total_norm(gradients)) if gradients else None
        return float(self._norm)

    @property
    def ema_decay(self) -> float:
        """The decay of the next step. It rises to its value, so that the average soon forgets the
        initial weights.
        """
        return min(self.config.ema_decay, (1 + self.step_count) / (10 + self.step_count))

    def weights(self, which: str) -> nn.Module:
        """Returns the module with the "ema" or the "raw" weights, live."""
        return self.ema.module if which == "ema" else self.model

    def classifier(self, which: str) -> nn.Module:
        """Returns ``weights`` in the precision of the training, for evaluation and guidance."""
        return self._classifiers[which]

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Returns one optimiser step on images (B, C, H, W) and labels (B,) or (B, K)
        probabilities; returns the 0-d loss.

        Of several ranks, all take a step together, each on its part of the batch, whose loss it
        returns.

        Raises ``torch.OutOfMemoryError`` where a single image does not fit.
        """
        if self._pays is not None and self._pays(self.iterations - self.step_count):
            self._loss = torch.compile(self._forward)
        loss = self._gradients(images, labels)
        self._norm = None
        if self.config.clip_grad_norm:
            self._norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * group["lr_scale"]
        self.optimizer.step()
        self.ema.update(self.ema_decay)
        self.step_count += 1
        return loss

    def _gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Leaves the mean gradients of the whole batch in the parameters; returns the loss of this
        rank's part.

        Where memory runs out, the same batch begins anew in micro-batches of half the size, from
        the same random state. The running statistics of batch norms have then seen some of it
        twice; nothing else has changed.
        """
        if not self._fits:
            self._try_alone(images, labels)
        self.gradients.begin()
        loss = self._until_it_fits(self.gradients, images, labels)
        self.gradients.finish()
        return loss

    def _until_it_fits(self, gradients: Gradients, images: Tensor, labels: Tensor) -> Tensor:
        random = self._random()
        while (loss := self._attempt(gradients, images, labels)) is None:
            self._set_random(random)
            gradients.again()
            release(self.device)
        return loss

    def _attempt(self, gradients: Gradients, images: Tensor, labels: Tensor) -> Tensor | None:
        """Returns ``_accumulate``; None where it has to begin anew: in smaller micro-batches, or
        not compiled.
        """
        try:
            loss, failure = attempt(partial(self._accumulate, gradients, images, labels))
        except torch._dynamo.exc.TorchDynamoException as error:
            if self.config.compile is True:
                raise
            log.warning(
                "the learner's step does not compile and goes on without: %s",
                first_line(error),
            )
            self._loss = self._forward
            return None
        if failure is not None:
            self._halve(len(images), failure)
        return loss

    def _accumulate(self, gradients: Gradients, images: Tensor, labels: Tensor) -> Tensor:
        """Adds up the gradients of all micro-batches; the last one's go to the other ranks as they
        come.
        """
        size = self._size(len(images))
        parts = list(zip(images.split(size), labels.split(size), strict=True))
        losses = []
        for number, (part, wanted) in enumerate(parts, 1):
            loss = self._loss(part, wanted) * (len(part) / len(images))
            with gradients.sending(number == len(parts)):
                (loss / self.ranks.size).backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _size(self, count: int) -> int:
        """Returns images of a micro-batch out of ``count``: even parts, none of them larger than
        ``micro_batch``.
        """
        return even_part(count, self.micro_batch)

    def _halve(self, count: int, failure: BaseException) -> None:
        size = self._size(count)
        if size == 1:
            raise failure
        if self._norms and self._fits:
            raise InputError(
                f"micro_batch = {size}: a step ran out of memory while other ranks waited "
                f"for its batch norms; expected at most {size // 2}, also with --resume"
            ) from failure
        self.micro_batch = size // 2
        log.warning(
            "out of memory in a training step: going on with micro-batches of %d", self.micro_batch
        )

    def _try_alone(self, images: Tensor, labels: Tensor) -> None:
        """Finds a micro-batch that fits all ranks, before one that fails leaves the others waiting
        in a batch norm.
        """
        random = self._random()
        with alone(self._norms):
            self._until_it_fits(Gradients(self.parameters), images, labels)
        self.micro_batch = -int(self.ranks.most(-self._size(len(images))))
        self._fits = True
        self._set_random(random)

    def _forward(self, images: Tensor, labels: Tensor) -> Tensor:
        with autocast(self.bf16, self.device):
            logits = self.model(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)

    def _random(self) -> list[Tensor]:
        """Returns the states of the generators that a forward pass draws from, which live on the
        host.
        """
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self.device)] if is_gpu(self.device) else states

    def _set_random(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if is_gpu(self.device) and len(states) > 1:
            torch.cuda.set_rng_state(states[1], self.device)

    def release(self) -> None:
        """Gives back the memory of what a step leaves behind and the next one makes again: the
        gradients.

        What fits beside others may differ afterwards: ranks that share batch norms try their
        micro-batches once more.
        """
        self.gradients.release()
        self._fits = not self._norms

    def state_dict(self) -> dict[str, Tensor]:
        """Returns everything that the next step depends on, as flat tensors."""
        tensors = {"step": torch.tensor(self.step_count), "rng": torch.get_rng_state()}
        if is_gpu(self.device):
            tensors["device_rng"] = torch.cuda.get_rng_state(self.device)
        tensors |= {f"model/{key}": value for key, value in self.model.state_dict().items()}
        tensors |= {f"ema/{key}": value for key, value in self.ema.module.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": value for key, value in slots.items()}
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Continues where ``state_dict`` was taken; weights are written in place."""
        self.step_count = int(tensors["step"])
        torch.set_rng_state(tensors["rng"])
        if is_gpu(self.device) and "device_rng" in tensors:
            torch.cuda.set_rng_state(tensors["device_rng"], self.device)
        for name, module in (("model", self.model), ("ema", self.ema.module)):
            module.load_state_dict(
                {
                    k.removeprefix(f"{name}/"): v
                    for k, v in tensors.items()
                    if k.startswith(f"{name}/")
                }
            )
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, slot = key.split("/")
                slots.setdefault(int(index), {})[slot] = _laid_out_as(parameters[int(index)], value)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})


def parameter_groups(model: nn.Module, config: Learner) -> list[dict[str, Any]]:
    """Returns the trained parameters of a model, in groups of one weight decay and one share of the
    learning rate.

    Weights with two dimensions or more decay; norms and biases do not. With ``layer_decay`` a layer
    below another one learns by that factor more slowly, and the last one at the full rate
    (``dpfast.learn.parts.layers``): as in BEiT and MAE. "lr_scale" is timm's name of the share.

    Raises ``InputError`` as ``layers`` does.
    """
    of = layers(model) if config.layer_decay < 1 else {}
    parameters = [p for p in model.parameters() if p.requires_grad]
    last = max(of.values(), default=0)
    groups = []
    for layer in range(last + 1):
        here = [p for p in parameters if of.get(p, 0) == layer]
        scale = config.layer_decay ** (last - layer)
        decayed = [p for p in here if p.ndim > 1]
        plain = [p for p in here if p.ndim <= 1]
        for members, decay in ((decayed, config.weight_decay), (plain, 0.0)):
            if members or not of:
                groups.append({"params": members, "weight_decay": decay, "lr_scale": scale})
    return groups


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """Returns a moment in the memory layout of its parameter: fused kernels walk through both in
    the order of the memory.
    """
    return (
        torch.empty_like(parameter).copy_(value)
        if value.shape == parameter.shape and value.dim()
        else value
    )


def even_part(count: int, most: int | None) -> int:
    """Returns the size of the fewest even parts of ``count``, none of them larger than ``most``;
    None: of one part. The last may be smaller.
    """
    return count if most is None else -(-count // -(-count // most))


def wsd(step: int, *, total: int, warmup: float, cooldown: float) -> float:
    """Returns the learning rate of optimiser step ``step`` (0-based) as a factor of its peak.

    Warm-up, stable, decay: the schedule of the paper (section C.5). Linear over the first
    ``warmup`` x total steps, then 1, then a half cosine to 0 over the last ``cooldown`` x total.
    """
    if step < warmup * total:
        return (step + 1) / (warmup * total + 1)
    left = total - step
    if left < cooldown * total:
        return 0.5 - 0.5 * math.cos(math.pi * left / (cooldown * total))
    return 1.0
