"""Batch normalisation over the batches of all ranks, so that a learner does not depend on how many share one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dpfast.parallel import Ranks


def synchronised(model: nn.Module, ranks: Ranks) -> nn.Module:
    """``model`` with every batch norm over all ranks; its weights and the names of its state stay.

    On GPUs that is torch's ``SyncBatchNorm``, which refuses a CPU: there it is ``RanksBatchNorm``.
    """
    if ranks.alone:
        return model
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model, ranks.learn)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                setattr(module, name, RanksBatchNorm.of(child, ranks))
    return model


class _Sum(torch.autograd.Function):
    """The sum over all ranks, of values and of gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group, value = group, value.clone()
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class RanksBatchNorm(_BatchNorm):
    """``BatchNorm`` of any dimension with mean and variance over all ranks' batches, which have one size."""

    ranks: Ranks

    @classmethod
    def of(cls, norm: _BatchNorm, ranks: Ranks) -> RanksBatchNorm:
        """The same norm over all ranks, its parameters and buffers taken over."""
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        for name, value in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
            setattr(new, name, value)
        new.ranks = ranks
        return new.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        others = [d for d in range(input.dim()) if d != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        size, count = self.ranks.size, input.numel() / input.shape[1]
        mean = _Sum.apply(input.float().mean(others), self.ranks.learn) / size
        centred = input.float() - mean.view(shape)
        variance = _Sum.apply(centred.square().mean(others), self.ranks.learn) / size
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked += 1
                rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                total = size * count
                self.running_mean.lerp_(mean, rate)
                self.running_var.lerp_(variance * (total / max(total - 1, 1)), rate)
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)
