"""Batch normalisation over the batches of all ranks, so that a learner does not depend on how many
share one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dpfast.errors import InputError
from dpfast.parallel import Ranks


def synchronised(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Returns ``model`` with every batch norm over all ranks; its weights and the names of its
    state stay.

    On GPUs that is torch's ``SyncBatchNorm``, which refuses a CPU: there it is ``RanksBatchNorm``.
    """
    if ranks.alone:
        return model
    again = list(_registered_again(model))
    if next(model.parameters()).is_cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model, ranks.learn.handle)
    else:
        for module in model.modules():
            for name, child in module.named_children():
                if isinstance(child, _BatchNorm):
                    setattr(module, name, RanksBatchNorm.of(child, ranks))
    for module, name, first in again:
        module.register_module(name, module.get_submodule(first))
    return model


def _registered_again(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Yields (module, name, the first name) of children that a module has under a further name:
    ``named_children`` gives them once.
    """
    for module in model.modules():
        names: dict[nn.Module, str] = {}
        for name, child in module._modules.items():
            if isinstance(child, _BatchNorm) and names.setdefault(child, name) != name:
                yield module, name, names[child]


def keep_statistics(model: nn.Module, frozen: Callable[[str], bool]) -> None:
    """Makes ``FrozenBatchNorm`` of the batch norms for whose names ``frozen`` returns True and of
    which nothing is trained; the names of the model's state stay.
    """
    kept = {
        norm: FrozenBatchNorm(norm)
        for name, norm in model.named_modules()
        if isinstance(norm, _BatchNorm)
        and frozen(name)
        and not any(weights.requires_grad for weights in norm.parameters())
    }
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, _BatchNorm) and child in kept:
                module._modules[name] = kept[child]


def shared_norms(model: nn.Module) -> list[_BatchNorm]:
    """Returns the batch norms of ``synchronised``, which wait for all ranks in training mode."""
    return [
        module
        for module in model.modules()
        if isinstance(module, (RanksBatchNorm, nn.SyncBatchNorm))
    ]


@contextlib.contextmanager
def alone(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Lets batch norms go by their running statistics within a ``with`` block: they hold the same
    memory and wait for nobody.
    """
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


class FrozenBatchNorm(nn.Module):
    """A batch norm that goes by its running statistics in training as well, and leaves them.

    It has the same parameters and buffers under the same names, and is no ``_BatchNorm``: what
    treats those in a way of its own passes over it.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))

    def forward(self, input: Tensor) -> Tensor:
        means, variances = self.running_mean, self.running_var
        return F.batch_norm(
            input,
            means,
            variances,
            self.weight,
            self.bias,
            training=means is None,
            eps=self.eps,
        )


class _Normalised(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the batches of all ranks: a message
    forward, one backward.

    The backward pass is that of ``BatchNorm`` with sums over all ranks, N values a channel:
    dx = weight / sqrt(variance + eps) * (dy - (sum dy + xhat sum (dy xhat)) / N).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor]:
        # var_mean takes up to 30 times as long
        here = torch.stack(torch.batch_norm_update_stats(x, None, None, 0.0))
        means, variances = torch.stack(ranks.learn.all_gather(here)).unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.ranks = eps, ranks
        ctx.mark_non_differentiable(mean, variance)
        return (
            F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps),
            mean,
            variance,
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        found = torch.ops.aten.native_batch_norm_backward(
            gradients[0], x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack(found[1:])
        ctx.ranks.learn.all_reduce(sums)
        scale = (variance + ctx.eps).rsqrt()
        of_xhat, of_one = sums * (weight * scale * x.shape[1] / (x.numel() * ctx.ranks.size))
        slope = of_xhat * scale
        shape = [1, -1] + [1] * (x.dim() - 2)
        dx = (
            found[0]
            .sub_((of_one - slope * mean).view(shape))
            .addcmul_(x, slope.view(shape), value=-1)
        )
        return dx, found[1], found[2], None, None


class RanksBatchNorm(_BatchNorm):
    """``BatchNorm`` of any dimension with mean and variance over all ranks' batches, which have one
    size.
    """

    ranks: Ranks

    @classmethod
    def of(cls, norm: _BatchNorm, ranks: Ranks) -> RanksBatchNorm:
        """Returns the same norm over all ranks, its parameters and buffers taken over."""
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        for name, value in (
            *norm.named_parameters(recurse=False),
            *norm.named_buffers(recurse=False),
        ):
            setattr(new, name, value)
        new.ranks = ranks
        return new.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise InputError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        weight = (
            input.new_ones(self.num_features, dtype=torch.float32)
            if self.weight is None
            else self.weight
        )
        bias = torch.zeros_like(weight) if self.bias is None else self.bias
        out, mean, variance = _Normalised.apply(input.float(), weight, bias, self.eps, self.ranks)
        if (
            self.track_running_stats
            and self.running_mean is not None
            and self.running_var is not None
        ):
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked += 1
                rate = (
                    1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                )
                total = self.ranks.size * input.numel() / input.shape[1]
                self.running_mean.lerp_(mean, rate)
                self.running_var.lerp_(variance * (total / max(total - 1, 1)), rate)
        return out.to(input.dtype)
