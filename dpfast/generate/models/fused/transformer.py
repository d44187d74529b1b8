"""Transformers between the convolutions of a UNet, and the attention in the middle of a decoder.

In NHWC an image is its own sequence of tokens: the 1x1 convolutions around the blocks are linear
layers, and nothing is transposed. A residual and the norm behind it are one pass
(``ops.gate_norm_modulate``). In a step without a tape the residual is the product's own sum
(beta = 1): its bias is deferred, as an offset of the norms that follow, into the layer at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
)
from torch import Tensor, nn

from dpfast import ops
from dpfast.generate.models.attention import attend
from dpfast.generate.models.fused.convolutional import FusedNorm, as_images, as_rows
from dpfast.generate.models.fused.projection import Projection, frozen, is_taped
from dpfast.generate.models.fused.refusal import expect, need


class FusedAttention(nn.Module):
    """An ``Attention`` with torch's kernels, up to its output layer: tokens (B, T, D) and, across,
    text (B, S, E) to (B, T, H d).

    columns: where the keys and values of this layer stand in those of all layers, which then come
    in the text's place; None: the layer makes its own.
    """

    columns: slice | None

    def __init__(self, attention: Any) -> None:
        super().__init__()
        kind = type(attention.processor)
        need(kind in (AttnProcessor2_0, FusedAttnProcessor2_0), f"a {kind.__name__}")
        expect(attention, spatial_norm=None, norm_q=None, norm_k=None, norm_cross=None)
        expect(attention, rescale_output_factor=1.0, upcast_attention=False, training=False)
        need(len(attention.to_out) == 2, "an output without a dropout behind it")
        self.heads, self.across = attention.heads, attention.is_cross_attention
        joined = kind is FusedAttnProcessor2_0
        if self.across:
            parts = [attention.to_kv] if joined else [attention.to_k, attention.to_v]
            self.query = Projection(attention.to_q)
        else:
            names = ("to_qkv",) if joined else ("to_q", "to_k", "to_v")
            parts = [getattr(attention, name) for name in names]
        self.inputs, self.out = Projection(*parts), Projection(attention.to_out[0])
        self.columns = None

    def forward(self, x: Tensor | ops.Quantised, text: Tensor | None = None) -> Tensor:
        if self.across:
            assert text is not None
            rows = self.inputs(text) if self.columns is None else text[..., self.columns]
            q, (k, v) = self.query(x), rows.chunk(2, dim=-1)
        else:
            q, k, v = self.inputs.parts(x, 3)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return attend(q, k, v).transpose(1, 2).flatten(2)


class FusedBlock(nn.Module):
    """A ``BasicTransformerBlock`` with plain norms: the stream (B, T, D) and text (B, S, E) to the
    stream.

    before: (D,) fp32, the biases that a step without a tape has not added when it comes here;
    ``after``: with those of this block.
    """

    def __init__(self, block: Any, before: Tensor) -> None:
        super().__init__()
        need(type(block) is BasicTransformerBlock, f"a {type(block).__name__}")
        expect(block, norm_type="layer_norm", pos_embed=None, only_cross_attention=False)
        expect(block, _chunk_size=None, training=False)
        need(not hasattr(block, "fuser"), "a gated attention")
        attentions = [block.attn1, *([] if block.attn2 is None else [block.attn2])]
        norms = [block.norm1, *([] if block.attn2 is None else [block.norm2]), block.norm3]
        for norm in norms:
            need(type(norm) is nn.LayerNorm, f"a {type(norm).__name__}")
        self.attentions = nn.ModuleList(FusedAttention(each) for each in attentions)
        self.norms = nn.ModuleList(norms)
        gated, _, out, *rest = block.ff.net
        need(type(gated) is GEGLU, f"a {type(gated).__name__} in the feed-forward layer")
        need(all(type(layer) is nn.Dropout for layer in rest), "a layer behind the feed-forward's")
        self.into, self.out = Projection(gated.proj), Projection(out)
        sums = [before]
        outputs: list[Any] = [*(each.out for each in self.attentions), self.out]
        for bias in (each.bias for each in outputs):
            sums.append(sums[-1] if bias is None else sums[-1] + bias.float())
        *offsets, self.after = sums
        for index, offset in enumerate(offsets):
            frozen(self, f"offset{index}", offset)

    def forward(self, x: Tensor, text: Tensor | None) -> Tensor:
        taped = is_taped(x)
        x, normed = self._norm(0, x, None, taped=taped)
        attention: Any
        for index, attention in enumerate(self.attentions, 1):
            branch = attention(normed, text)
            if taped:
                x, normed = self._norm(index, x, attention.out(branch), taped=True)
            else:
                x = attention.out.add_to(x, branch)
                _, normed = self._norm(index, x, None, taped=False)
        branch = ops.geglu(self.into(normed))
        return x + self.out(branch) if taped else self.out.add_to(x, branch)

    def _norm(
        self, index: int, x: Tensor, branch: Tensor | None, *, taped: bool
    ) -> tuple[Tensor, Tensor]:
        norm: Any = self.norms[index]
        offset = None if taped else getattr(self, f"offset{index}")
        return ops.gate_norm_modulate(
            x, branch, offset=offset, weight=norm.weight, bias=norm.bias, eps=norm.eps
        )


class FusedTransformer(nn.Module):
    """A ``Transformer2DModel`` of images: (B, C, H, W) and text (B, S, E) to a tuple of (B, C, H,
    W).
    """

    bias: Tensor
    late_bias: Tensor  # in a step without a tape

    def __init__(self, model: Any) -> None:
        super().__init__()
        expect(model, is_input_continuous=True, training=False)
        self.norm = FusedNorm(model.norm, silu=False)
        self.into, self.out = Projection(model.proj_in), Projection(model.proj_out)
        deferred = self.into.weight.new_zeros(len(self.into.weight), dtype=torch.float32)
        blocks = []
        for block in model.transformer_blocks:
            blocks.append(FusedBlock(block, deferred))
            deferred = blocks[-1].after
        self.blocks = nn.ModuleList(blocks)
        need(self.out.bias is not None, "a projection without a bias")
        # what the blocks have not added goes through the last layer
        late = torch.mv(self.out.weight.float(), deferred)
        frozen(self, "bias", self.out.bias)
        frozen(self, "late_bias", self.bias + late)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        given = (cross_attention_kwargs, attention_mask, encoder_attention_mask)
        if return_dict or any(each is not None for each in given):
            raise NotImplementedError("masks and options of attention reach no denoiser here")
        normed, kept = self.norm.and_x(hidden_states)
        assert isinstance(kept, Tensor)
        x = self.into(as_rows(normed).flatten(1, 2))
        bias = self.bias if is_taped(x) else self.late_bias
        for block in self.blocks:
            x = block(x, encoder_hidden_states)
        out = as_images(self.out.without_bias(x), hidden_states)
        return (ops.bias_residual(out, bias, kept),)


class FusedImageAttention(nn.Module):
    """An ``Attention`` over the pixels of images (B, C, H, W), with its norm and its residual, in
    the middle of a decoder.
    """

    bias: Tensor

    def __init__(self, attention: Any) -> None:
        super().__init__()
        expect(attention, residual_connection=True)
        need(type(attention) is Attention, f"a {type(attention).__name__}")
        need(attention.group_norm is not None, "an attention without a norm")
        self.norm = FusedNorm(attention.group_norm, silu=False)
        self.attention = FusedAttention(attention)
        need(not self.attention.across, "a cross-attention")
        need(self.attention.out.bias is not None, "an output without a bias")
        frozen(self, "bias", self.attention.out.bias)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        normed, kept = self.norm.and_x(hidden_states)
        assert isinstance(kept, Tensor)
        rows = as_rows(normed).flatten(1, 2)
        out = self.attention.out.without_bias(self.attention(rows))
        return ops.bias_residual(as_images(out, hidden_states), self.bias, kept)
