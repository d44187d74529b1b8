"""The conditioning of a frozen DiT, for all of its blocks at once.

Each block of a ``DiTTransformer2DModel`` embeds the timestep by a network of its own and projects
it, with the class,
to six modulations: three products and their pointwise operations a block. Neither depends on x.
Here the embeddings of the trained timesteps are a table, filled once, and the projections of all
blocks are one batched product. The blocks themselves stay diffusers'.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conditioned(NamedTuple):
    """What the blocks receive in place of a timestep: modulations (L, B, 6 D), and (B, D) for the
    output layer.
    """

    modulations: Tensor
    output: Tensor


class Conditioning(nn.Module):
    """timesteps (B,) int64 of the trained grid and class ids (B,) to ``Conditioned``."""

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
        """What the model asks its first block for when it comes to the output layer."""
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
