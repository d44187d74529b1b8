"""The layers of a frozen denoiser in fewer and larger products, with the same predictions.

fuse_projections    query, key and value of an attention in one product
share_conditioning  the conditioning of all blocks of a DiT in one batched product
freeze_linear       fp32 linear layers on a CPU in one call of oneDNN (``dpfast.ops.frozen_linear``)

Each changes a model of diffusers in place, which stays the model of its ``forward``. Only weights
that never change allow that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor, nn

from dpfast.ops.frozen_linear import frozen_linear


@torch.no_grad()
def fuse_projections(model: nn.Module) -> nn.Module:
    """Returns query, key and value of self-attention as one product, key and value of
    cross-attention as one; in place.

    It is for diffusers' ``Attention`` with its default processor. Others stay as they are:
    xformers' reads the parts, and the fused form of joint attention (Stable Diffusion 3) lacks the
    norms of query and key.
    """
    for module in model.modules():
        if not isinstance(module, Attention) or type(module.processor) is not AttnProcessor2_0:
            continue
        module.fuse_projections()
        module.set_processor(FusedAttnProcessor2_0())
        for name in ("to_k", "to_v") if module.is_cross_attention else ("to_q", "to_k", "to_v"):
            delattr(module, name)
    return model


class Conditioned(NamedTuple):
    """The input of a DiT's L blocks in place of a timestep: modulations (L, B, 6 D), and (B, D) for
    the output layer.
    """

    modulations: Tensor
    output: Tensor


class Conditioning(nn.Module):
    """The conditioning of all blocks: timesteps (B,) int64 of the trained grid and class ids (B,)
    to ``Conditioned``.

    Each block of a ``DiTTransformer2DModel`` embeds the timestep by a network of its own and
    projects it, with the class, to six modulations: three products and their pointwise operations a
    block. Neither depends on x. Here the embeddings of the trained timesteps are a table, filled
    once, and the projections of all blocks are one batched product. The blocks themselves stay
    diffusers'.
    """

    timesteps: Tensor
    classes: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, blocks: nn.ModuleList, steps: int) -> None:
        super().__init__()
        norms: list[Any] = [block.norm1 for block in blocks]
        embeddings = [norm.emb for norm in norms]
        like = norms[0].linear.weight
        grid = embeddings[0].time_proj(torch.arange(steps, device=like.device)).to(like.dtype)
        with torch.no_grad():
            held = {
                "timesteps": [each.timestep_embedder(grid) for each in embeddings],  # (L, steps, D)
                "classes": [
                    each.class_embedder.embedding_table.weight for each in embeddings
                ],  # (L, classes + 1, D)
                "weight": [norm.linear.weight.t() for norm in norms],  # (L, D, 6 D)
                "bias": [norm.linear.bias[None] for norm in norms],  # (L, 1, 6 D)
            }
            for name, rows in held.items():
                self.register_buffer(name, torch.stack(rows))

    def forward(self, timesteps: Tensor, labels: Tensor) -> Conditioned:
        embedded = self.timesteps.index_select(1, timesteps) + self.classes.index_select(1, labels)
        return Conditioned(torch.baddbmm(self.bias, F.silu(embedded), self.weight), embedded[0])


class Modulated(nn.Module):
    """A block's ``AdaLayerNormZero`` without its embeddings and projection."""

    def __init__(self, norm: nn.Module, block: int) -> None:
        super().__init__()
        self.norm, self.block = norm, block

    def forward(self, x: Tensor, timestep: Conditioned, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        shift, scale, *rest = timestep.modulations[self.block].chunk(6, dim=1)
        gate, shift_mlp, scale_mlp, gate_mlp = rest
        return (
            self.norm(x) * (1 + scale[:, None]) + shift[:, None],
            gate,
            shift_mlp,
            scale_mlp,
            gate_mlp,
        )

    def emb(self, timestep: Conditioned, *_: Any, **__: Any) -> Tensor:
        """Returns the embedding that the model asks of its first block for the output layer."""
        return timestep.output


def _condition(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {
        **kwargs,
        "timestep": model.conditioning(kwargs["timestep"], kwargs["class_labels"]),
    }


def share_conditioning(model: nn.Module, steps: int) -> nn.Module:
    """Replaces the conditioning of a frozen ``DiTTransformer2DModel`` in place, and returns the
    model.

    ``steps``: timesteps of its training. The model is called as before, by keywords; timesteps must
    be integers.
    """
    blocks: Any = model.transformer_blocks
    model.conditioning = Conditioning(blocks, steps)
    for index, block in enumerate(blocks):
        block.norm1 = Modulated(block.norm1.norm, index)
    model.register_forward_pre_hook(_condition, with_kwargs=True)
    return model


class FrozenLinear(nn.Module):
    """``nn.Linear`` with weights that never change, followed by the tanh form of GELU if ``gelu``.

    Weights are kept transposed, (in, out) in memory. x (..., in) to (..., out), fp32;
    differentiable once, in x only.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().t().contiguous().t())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias, gelu=self.gelu)


def freeze_linear(model: nn.Module) -> nn.Module:
    """Replaces the linear layers of ``model`` in place where they are fp32 on a CPU, and returns
    it.
    """
    if not torch.backends.mkldnn.is_available():
        return model
    for name, child in list(model.named_children()):
        gelu = type(child) is GELU and child.approximate == "tanh"
        linear = child.proj if gelu else child
        if (
            type(linear) is nn.Linear
            and linear.weight.dtype == torch.float32
            and linear.weight.device.type == "cpu"
        ):
            setattr(model, name, FrozenLinear(linear, gelu=gelu))
        else:
            freeze_linear(child)
    return model
