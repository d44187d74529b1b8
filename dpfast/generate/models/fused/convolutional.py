"""Residual blocks, samplers and up blocks of UNets and decoders, in NHWC.

A residual block of diffusers is two norms, two activations, two convolutions with their biases, a
time row and a sum, each a pass through memory and some of them two. Here the norms take activation,
bias and time row along, the second convolution's bias is added with the residual, and a division by
1 is none. An up block hands hidden states and skip connection to the norm and to the shortcut as
they are: their concatenation never exists.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpfast import ops
from dpfast.generate.models.fused.projection import frozen, is_taped
from dpfast.generate.models.fused.refusal import expect, expect_3x3, need

Sources = Tensor | tuple[Tensor, Tensor]  # a tensor, or the two whose concatenation is meant


class FusedNorm(nn.Module):
    """A ``GroupNorm`` of images, with the SiLU behind it if ``silu``, and the shift before it."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, norm: Any, *, silu: bool) -> None:
        super().__init__()
        need(type(norm) is nn.GroupNorm, f"a {type(norm).__name__}")
        frozen(self, "weight", norm.weight)
        frozen(self, "bias", norm.bias)
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, silu

    def forward(self, x: Sources, shift: Tensor | None = None) -> Tensor:
        return self.and_x(x, shift)[0]

    def and_x(self, x: Sources, shift: Tensor | None = None) -> tuple[Tensor, Sources]:
        """Returns the norm, and x to go on with."""
        return ops.group_norm_and_x(
            x, self.weight, self.bias, self.groups, self.eps, shift=shift, silu=self.silu
        )


class FusedResnet(nn.Module):
    """A ``ResnetBlock2D`` without up- or downsampling: x (B, C, H, W), or two tensors of C1 and C2
    channels, and a time embedding (B, E), (1, E) or None, to (B, C', H, W).

    columns: where the block's row stands in time rows (B, sum of C') or (1, sum of C') that come in
    the embedding's place; None: nowhere.
    """

    weight1: Tensor
    weight2: Tensor
    row: Tensor  # bias of the first convolution, with that of the time projection
    bias: Tensor  # of the second convolution, with the shortcut's
    time: Tensor | None
    shortcut: Tensor | None
    shift: Tensor | None  # (C,) that x still lacks
    columns: slice | None

    def __init__(self, block: Any) -> None:
        super().__init__()
        expect(block, up=False, down=False, output_scale_factor=1.0, training=False)
        if block.time_emb_proj is not None:
            expect(block, skip_time_act=False, time_embedding_norm="default")
        need(type(block.nonlinearity) is nn.SiLU, f"a {type(block.nonlinearity).__name__}")
        self.norm1 = FusedNorm(block.norm1, silu=True)
        self.norm2 = FusedNorm(block.norm2, silu=True)
        for convolution in (block.conv1, block.conv2):
            expect_3x3(convolution)
        frozen(self, "weight1", block.conv1.weight)
        frozen(self, "weight2", block.conv2.weight)
        time = block.time_emb_proj
        need(time is None or type(time) is nn.Linear, f"a {type(time).__name__} for the time")
        frozen(self, "time", None if time is None else time.weight)
        rows = block.conv1.bias if time is None else block.conv1.bias + time.bias
        frozen(self, "row", rows)
        shortcut = block.conv_shortcut
        if shortcut is None:
            frozen(self, "bias", block.conv2.bias)
            frozen(self, "shortcut", None)
        else:
            need(type(shortcut) is nn.Conv2d, f"a {type(shortcut).__name__}")
            expect(shortcut, kernel_size=(1, 1), padding=(0, 0), stride=(1, 1), groups=1)
            shared = block.conv2.bias
            frozen(self, "bias", shared if shortcut.bias is None else shared + shortcut.bias)
            frozen(self, "shortcut", shortcut.weight.flatten(1))
        frozen(self, "shift", None)
        self.columns = None

    def lacks(self, bias: Tensor) -> None:
        """Lets the block add (C1,) to x, or to the first of two sources: what the convolution
        before it left out.
        """
        weight = self.norm1.weight
        assert weight is not None
        frozen(self, "shift", F.pad(bias, (0, len(weight) - len(bias))))
        if self.shortcut is None:
            frozen(self, "bias", self.bias + bias)
        else:
            late = torch.mv(self.shortcut[:, : len(bias)].float(), bias.float())
            frozen(self, "bias", self.bias + late)

    def take_time(self, width: int) -> tuple[Tensor, Tensor]:
        """Returns the layer (C', width), (C',) from an embedding behind its activation to the
        time's row, which the block does not make itself any more.
        """
        weight = self.row.new_zeros(len(self.row), width) if self.time is None else self.time
        frozen(self, "time", None)
        return weight, self.row

    def forward(self, x: Sources, temb: Tensor | None = None) -> Tensor:
        normed, x = self.norm1.and_x(x, self.shift)
        h = F.conv2d(normed, self.weight1, padding=1)
        h = F.conv2d(self.norm2(h, self._time_row(temb)), self.weight2, padding=1)
        if self.shortcut is None:
            assert isinstance(x, Tensor)
            return ops.bias_residual(h, self.bias, x)
        sources = x if isinstance(x, tuple) else (x,)
        weights = self.shortcut.split([source.shape[1] for source in sources], dim=1)
        if any(is_taped(source) for source in sources):
            rows = F.linear(as_rows(sources[0]), weights[0])
            for source, weight in zip(sources[1:], weights[1:], strict=True):
                rows = rows + F.linear(as_rows(source), weight)
            return ops.bias_residual(h, self.bias, as_images(rows, h))
        # the sums are the products' own: beta = 1
        rows = as_rows(h).flatten(0, 2)
        for source, weight in zip(sources, weights, strict=True):
            rows = rows.addmm_(as_rows(source).flatten(0, 2), weight.t())
        return as_images(rows.add_(self.bias), h)

    def _time_row(self, temb: Tensor | None) -> Tensor:
        """Returns the row (C',) or (B, C') before the second norm."""
        if temb is not None and self.columns is not None:
            return temb[0 if len(temb) == 1 else slice(None), self.columns]
        if temb is None or self.time is None:
            return self.row
        return F.linear(F.silu(temb), self.time, self.row)


def as_rows(x: Tensor) -> Tensor:
    """Returns images (B, C, H, W) as (B, H, W, C), a view; of NHWC memory a contiguous one."""
    return x.permute(0, 2, 3, 1)


def as_images(rows: Tensor, like: Tensor) -> Tensor:
    """Returns rows (..., C), one a pixel, as images (B, C, H, W) of the sizes of ``like``, a
    view.
    """
    b, _, height, width = like.shape
    return rows.reshape(b, height, width, rows.shape[-1]).permute(0, 3, 1, 2)


def doubled(x: Tensor) -> Tensor:
    """Returns images (B, C, H, W) as (B, C, 2 H, 2 W) in NHWC, by nearest neighbours."""
    b, c, h, w = x.shape
    rows = as_rows(x)[:, :, None, :, None].expand(b, h, 2, w, 2, c)
    return rows.reshape(b, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


class FusedUpsample(nn.Module):
    """An ``Upsample2D`` of nearest neighbours: a broadcast, whose backward pass is a sum."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        expect(block, use_conv=True, use_conv_transpose=False, norm=None)
        self.conv = block.conv if block.name == "conv" else block.Conv2d_0
        need(type(self.conv) is nn.Conv2d, f"a {type(self.conv).__name__}")

    def leave_out_bias(self) -> Tensor | None:
        """Returns the bias (C,), which the convolution does not add any more."""
        bias: Tensor | None = self.conv.bias
        self.conv.bias = None
        return bias

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        h, w = x.shape[2:]
        if output_size is not None and tuple(output_size) != (2 * h, 2 * w):
            return self.conv(F.interpolate(x, size=output_size, mode="nearest"))
        return self.conv(doubled(x))


class FusedUpBlock(nn.Module):
    """An ``UpBlock2D`` or ``CrossAttnUpBlock2D`` whose residual blocks read the skip connections
    where they lie.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        for name in ("s1", "s2", "b1", "b2"):
            expect(block, **{name: None})
        need(
            all(isinstance(r, FusedResnet) for r in block.resnets), "a residual block is not fused"
        )
        self.resnets, self.upsamplers = block.resnets, block.upsamplers
        attentions = getattr(block, "attentions", None)
        self.has_cross_attention = attentions is not None
        self.attentions = attentions

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        upsample_size: Any = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            hidden_states = resnet((hidden_states, res_hidden_states_tuple[-1 - index]), temb)
            if self.attentions is not None:
                hidden_states = self.attentions[index](
                    hidden_states,
                    encoder_hidden_states=encoder_hidden_states,
                    cross_attention_kwargs=cross_attention_kwargs,
                    attention_mask=attention_mask,
                    encoder_attention_mask=encoder_attention_mask,
                    return_dict=False,
                )[0]
        for upsampler in self.upsamplers or ():
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states
