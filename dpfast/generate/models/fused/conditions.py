"""The part of a UNet that reads timestep and prompt alone, computed once for all of its blocks.

Every residual block projects the time's embedding, and every cross-attention projects the text:
22 and 16 small products in a step of Stable Diffusion 1.5, with the activations between them. None
depends on x. Here the time rows of all blocks are one table over the timesteps of the training,
from which a step takes a row, and the keys and values of all layers are one product. Where prompt
and sizes add to the time's embedding (Stable Diffusion XL), or a scale of guidance does, the time
rows are one product, too. diffusers' forward hands both on as the embedding and the text that it
takes them for; each block reads its own columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from dpfast.generate.models.fused.convolutional import FusedResnet
from dpfast.generate.models.fused.projection import frozen
from dpfast.generate.models.fused.transformer import FusedAttention

# options of a UNet that are not known here, and those that add to the embedding of the time
OPTIONS = (
    "class_embed_type",
    "num_class_embeds",
    "time_embedding_act_fn",
    "encoder_hid_dim_type",
)
ADDING = ("addition_embed_type", "time_cond_proj_dim")


def share_conditions(unet: Any, timesteps: int | None) -> nn.Module | None:
    """Prepares a fused ``UNet2DConditionModel`` in place.

    timesteps: of its training; those that it is called with are integers among them, one for all
    samples. None: they may be others, and more may add to their embedding; its rows are then made
    in each call. Returns what makes of text (B, S, E) that which the UNet takes in its place, or
    None where a block is not fused or something else has a say: nothing has changed then.
    """
    modules = list(unet.modules())
    plain = any(isinstance(module, (ResnetBlock2D, Transformer2DModel)) for module in modules)
    unknown = OPTIONS if timesteps is None else OPTIONS + ADDING
    if plain or any(unet.config.get(option) is not None for option in unknown):
        return None
    across = [m for m in modules if isinstance(m, FusedAttention) and m.across]
    layers = _time_layers([m for m in modules if isinstance(m, FusedResnet)], unet)
    if timesteps is None:
        unet.time_embed_act = _TimeProduct(layers)  # where diffusers has all of the embedding
    else:
        unet.time_proj, unet.time_embedding = _TimeRows(unet, layers, timesteps), _Passed()
    return _TextRows(across)


Layers = list[tuple[Tensor, Tensor]]  # (C', E) and (C',) of each residual block


def _time_layers(resnets: list[FusedResnet], unet: Any) -> Layers:
    """Returns those of the residual blocks, each of which reads its columns from here on."""
    layers = [resnet.take_time(len(unet.time_embedding.linear_2.weight)) for resnet in resnets]
    start = 0
    for resnet, (_, row) in zip(resnets, layers, strict=True):
        resnet.columns = slice(start, start + len(row))
        start += len(row)
    return layers


class _TimeProduct(nn.Module):
    """A map from embeddings of the time (B, E) to the time rows (B, sum of C') of all residual
    blocks.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        frozen(self, "weight", torch.cat([weight for weight, _ in layers]))
        frozen(self, "bias", torch.cat([bias for _, bias in layers]))

    def forward(self, embedding: Tensor) -> Tensor:
        return F.linear(F.silu(embedding), self.weight, self.bias)


class _TimeRows(nn.Module):
    """A map from timesteps (B,), all the same, to the time rows (1, sum of C') of all residual
    blocks.
    """

    table: Tensor

    def __init__(self, unet: Any, layers: Layers, timesteps: int) -> None:
        super().__init__()
        weight = unet.time_embedding.linear_1.weight
        grid = torch.arange(timesteps, device=weight.device)
        with torch.no_grad():
            hidden = F.silu(unet.time_embedding(unet.time_proj(grid).to(weight.dtype)))
            rows = [F.linear(hidden, *layer) for layer in layers]
        frozen(self, "table", torch.cat(rows, dim=1))

    def forward(self, timesteps: Tensor) -> Tensor:
        if timesteps.is_floating_point():
            raise TypeError(f"timesteps are {timesteps.dtype}; expected integers of the training")
        return self.table.index_select(0, timesteps[:1])


class _Passed(nn.Module):
    """The identity in the place of the network behind the time's sinusoids, which the table
    holds.
    """

    def forward(self, rows: Tensor, condition: None = None) -> Tensor:
        return rows


class _TextRows(nn.Module):
    """A map from text (B, S, E) to the keys and values (B, S, sum of 2 H d) of all
    cross-attentions.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, across: list[FusedAttention]) -> None:
        super().__init__()
        layers = [attention.inputs for attention in across]
        frozen(self, "weight", torch.cat([layer.weight for layer in layers]))
        given = [layer.bias for layer in layers]
        rows = [
            layer.weight.new_zeros(len(layer.weight)) if bias is None else bias
            for layer, bias in zip(layers, given, strict=True)
        ]
        frozen(self, "bias", torch.cat(rows) if any(b is not None for b in given) else None)
        start = 0
        for attention, layer in zip(across, layers, strict=True):
            attention.columns = slice(start, start + len(layer.weight))
            start += len(layer.weight)
            del attention.inputs

    def forward(self, text: Tensor) -> Tensor:
        return F.linear(text, self.weight, self.bias)
