"""Blocks of DiT and Stable Diffusion 3 (adaLN-Zero), and the two ends of their transformers.

The end of a branch (gate and residual) and the beginning of the next (norm and modulation) are one
pass, across blocks too: a block hands its last branch on to the next one, which adds it. In a step
without a tape the feed-forward layer's GELU is inside its product.

In float8 (``quantise``) the norm writes a step's activations without a tape in 8 bits, and so does
one pass behind the attention and one with the GELU; a step with a tape is that of bf16.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from torch import Tensor, nn

from dpfast import ops
from dpfast.generate.models.attention import attend
from dpfast.generate.models.frozen_layers import Modulated
from dpfast.generate.models.fused.convolutional import as_images
from dpfast.generate.models.fused.projection import Projection, frozen, is_taped
from dpfast.generate.models.fused.refusal import expect, need
from dpfast.generate.models.fused.transformer import FusedAttention


class Stream(NamedTuple):
    """The output of a block: the stream x (B, T, D), and the gated branch that is still to be added
    to it.
    """

    x: Tensor
    branch: Tensor
    gate: Tensor  # (B, D)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype


def _is_taped(stream: Stream | Tensor) -> bool:
    return is_taped(stream.x if isinstance(stream, Stream) else stream)


def _norm8(
    stream: Stream | Tensor, scale: Tensor, shift: Tensor, eps: float, *, eight: bool
) -> tuple[Tensor, Tensor | ops.Quantised]:
    """Returns what ``_norm`` returns, or its norm in float8."""
    if not eight:
        return _norm(stream, scale, shift, eps)
    x, branch, gate = stream if isinstance(stream, Stream) else (stream, None, None)
    return ops.gate_norm_quantise(x, branch, gate=gate, scale=scale, shift=shift, eps=eps)


def _norm(
    stream: Stream | Tensor, scale: Tensor, shift: Tensor, eps: float, *, keep: bool = True
) -> tuple[Tensor, Tensor]:
    """Returns the stream with its branch, and its modulated norm."""
    x, branch, gate = stream if isinstance(stream, Stream) else (stream, None, None)
    return ops.gate_norm_modulate(
        x, branch, gate=gate, scale=scale, shift=shift, eps=eps, keep=keep
    )


class FeedForward(nn.Module):
    """A ``FeedForward`` with the tanh form of GELU: (B, T, D) to (B, T, D)."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        inner, _, out, *rest = layer.net
        need(type(inner) is GELU, f"a {type(inner).__name__} in the feed-forward layer")
        expect(inner, approximate="tanh")
        need(all(type(each) is nn.Dropout for each in rest), "a layer behind the feed-forward's")
        self.into, self.out = Projection(inner.proj), Projection(out)

    def forward(self, x: Tensor | ops.Quantised) -> Tensor:
        if not isinstance(x, Tensor):
            return self.out(ops.quantise(self.into(x), gelu=True))
        # CUDA's epilogue is the tanh form; a CPU's would be the exact one
        if (x.is_cuda or x.is_meta) and self.into.bias is not None and not is_taped(x):
            rows = torch._addmm_activation(
                self.into.bias, x.flatten(0, 1), self.into.weight.t(), use_gelu=True
            )
            return self.out(rows.unflatten(0, x.shape[:2]))
        return self.out(F.gelu(self.into(x), approximate="tanh"))


class FusedDiTBlock(nn.Module):
    """A ``BasicTransformerBlock`` of a DiT: ``Stream`` or (B, T, D) to (B, T, D), or to a
    ``Stream`` where it hands its last branch on to the next block.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        expect(block, norm_type="ada_norm_zero", pos_embed=None, attn2=None, _chunk_size=None)
        expect(block, training=False)
        need(not hasattr(block, "fuser"), "a gated attention")
        kind = type(block.norm1)
        need(kind in (AdaLayerNormZero, Modulated), f"a {kind.__name__}")
        self.norm1 = block.norm1
        self.eps = (plain_eps(block.norm1.norm), plain_eps(block.norm3))
        self.attention = FusedAttention(block.attn1)
        need(not self.attention.across, "a cross-attention")
        self.feed_forward = FeedForward(block.ff)
        self.hands_on = False  # until ``link`` has seen the model around it
        self.float8 = False  # until ``quantise``

    def forward(
        self, hidden_states: Any, *, timestep: Any = None, class_labels: Any = None, **_: Any
    ) -> Any:
        rows = _rows(self.norm1, timestep, class_labels, hidden_states.dtype)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = rows.chunk(6, dim=1)
        eight = self.float8 and not _is_taped(hidden_states)
        x, normed = _norm8(hidden_states, scale, shift, self.eps[0], eight=eight)
        branch = _out(self.attention.out, self.attention(normed), eight=eight)
        stream = Stream(x, branch, gate)
        x, normed = _norm8(stream, scale_mlp, shift_mlp, self.eps[1], eight=eight)
        branch = self.feed_forward(normed)
        if self.hands_on:
            return Stream(x, branch, gate_mlp)
        return torch.addcmul(x, gate_mlp[:, None], branch)


def _out(layer: Any, x: Tensor, *, eight: bool) -> Tensor:
    """Returns an attention's output layer."""
    out: Tensor = layer(ops.quantise(x) if eight else x)
    return out


def _rows(norm: Any, timestep: Any, class_labels: Any, dtype: torch.dtype) -> Tensor:
    """Returns the six rows (B, 6 D) of a block's adaLN-Zero."""
    if isinstance(norm, Modulated):
        modulations: Tensor = timestep.modulations
        return modulations[norm.block]
    rows: Tensor = norm.linear(norm.silu(norm.emb(timestep, class_labels, hidden_dtype=dtype)))
    return rows


def plain_eps(norm: Any) -> float:
    """Returns the eps of a LayerNorm without weights."""
    need(type(norm) is nn.LayerNorm, f"a {type(norm).__name__}")
    need(norm.weight is None and norm.bias is None, "a norm with weights of its own")
    return float(norm.eps)


class FusedJointBlock(nn.Module):
    """A ``JointTransformerBlock`` of Stable Diffusion 3: image and text, each a ``Stream`` or (B,
    T, D), to the text (None behind the last block) and the image.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        expect(block, use_dual_attention=False, _chunk_size=None, training=False)
        attention = block.attn
        kind = type(attention.processor)
        need(kind is JointAttnProcessor2_0, f"a {kind.__name__}")
        self.last = bool(block.context_pre_only)
        self.image, self.text = block.norm1.linear, block.norm1_context.linear
        self.eps_image = (plain_eps(block.norm1.norm), plain_eps(block.norm2))
        norms = [block.norm1_context.norm, *([] if self.last else [block.norm2_context])]
        self.eps_text = tuple(plain_eps(norm) for norm in norms)
        self.heads = attention.heads
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, getattr(attention, name, None))
        self.inputs = Projection(attention.to_q, attention.to_k, attention.to_v)
        self.text_inputs = Projection(
            attention.add_q_proj, attention.add_k_proj, attention.add_v_proj
        )
        self.out = Projection(attention.to_out[0])
        self.text_out = None if self.last else Projection(attention.to_add_out)
        self.feed_forward = FeedForward(block.ff)
        self.text_feed_forward = None if self.last else FeedForward(block.ff_context)
        self.hands_on = False  # until ``link`` has seen the model around it
        self.float8 = False  # until ``quantise``

    def forward(
        self, hidden_states: Any, encoder_hidden_states: Any, temb: Tensor, *_: Any, **__: Any
    ) -> tuple[Any, Any]:
        conditioning = F.silu(temb)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.image(conditioning).chunk(6, 1)
        rows = self.text(conditioning).chunk(2 if self.last else 6, dim=1)
        eight = self.float8 and not (_is_taped(hidden_states) or _is_taped(encoder_hidden_states))
        x, normed = _norm8(hidden_states, scale, shift, self.eps_image[0], eight=eight)
        # behind the last block the text is only read: scale comes first there
        text_scale, text_shift = rows if self.last else (rows[1], rows[0])
        text, text_normed = _norm8(
            encoder_hidden_states, text_scale, text_shift, self.eps_text[0], eight=eight
        )
        branch, text_branch = self._attend(normed, text_normed)
        stream = Stream(x, _out(self.out, branch, eight=eight), gate)
        x, normed = _norm8(stream, scale_mlp, shift_mlp, self.eps_image[1], eight=eight)
        image = self._end(x, self.feed_forward(normed), gate_mlp)
        if self.text_out is None or self.text_feed_forward is None:
            return None, image
        _, _, text_gate, text_shift_mlp, text_scale_mlp, text_gate_mlp = rows
        stream = Stream(text, _out(self.text_out, text_branch, eight=eight), text_gate)
        text, text_normed = _norm8(
            stream, text_scale_mlp, text_shift_mlp, self.eps_text[1], eight=eight
        )
        return self._end(text, self.text_feed_forward(text_normed), text_gate_mlp), image

    def _end(self, x: Tensor, branch: Tensor, gate: Tensor) -> Stream | Tensor:
        if self.hands_on:
            return Stream(x, branch, gate)
        return torch.addcmul(x, gate[:, None], branch)

    def _attend(
        self, image: Tensor | ops.Quantised, text: Tensor | ops.Quantised
    ) -> tuple[Tensor, Tensor]:
        parts = self._heads(self.inputs(image), self.norm_q, self.norm_k)
        split = parts[0].shape[2]
        added = self._heads(self.text_inputs(text), self.norm_added_q, self.norm_added_k)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(parts, added, strict=True))
        out = attend(q, k, v).transpose(1, 2).flatten(2)
        return out[:, :split], out[:, split:]

    def _heads(self, rows: Tensor, norm_q: Any, norm_k: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rows.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v


class FusedDiT(diffusers.DiTTransformer2DModel):
    """A DiT of fused blocks, by its class alone: the last norm takes the last branch and the
    modulation along.
    """

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Any = None,
        class_labels: Any = None,
        cross_attention_kwargs: Any = None,
        return_dict: bool = True,
    ) -> Any:
        x: Any = self.pos_embed(hidden_states)
        for block in self.transformer_blocks:
            x = block(x, timestep=timestep, class_labels=class_labels)
        first: Any = self.transformer_blocks[0]
        conditioning = first.norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
        shift, scale = self.proj_out_1(F.silu(conditioning)).chunk(2, dim=1)
        _, normed = _norm(x, scale, shift, self.norm_out.eps, keep=False)
        rows = self.proj_out_2(normed)
        patch, (height, width) = self.config.patch_size, hidden_states.shape[-2:]
        cut = rows.reshape(-1, height // patch, width // patch, patch, patch, self.out_channels)
        out = cut.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, height, width)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


class FusedModulatedOut(nn.Module):
    """The last norm of Stable Diffusion 3, an ``AdaLayerNormContinuous``."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        need(type(norm) is AdaLayerNormContinuous, f"a {type(norm).__name__}")
        inner = norm.norm
        need(getattr(inner, "weight", None) is None, "a norm with weights of its own")
        self.linear, self.eps = norm.linear, float(inner.eps)

    def forward(self, hidden_states: Stream | Tensor, temb: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(temb)).chunk(2, dim=1)
        return _norm(hidden_states, scale, shift, self.eps, keep=False)[1]


class FusedPatches(nn.Module):
    """The convolution that cuts images (B, C, H, W) into patches, as a product: (B, D, h, w)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        need(type(convolution) is nn.Conv2d, f"a {type(convolution).__name__} as a patch layer")
        expect(convolution, stride=convolution.kernel_size, padding=(0, 0), groups=1)
        expect(convolution, dilation=(1, 1))
        frozen(self, "weight", convolution.weight.flatten(1))
        frozen(self, "bias", convolution.bias)
        self.size = convolution.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.size
        b, c, h, w = x.shape
        cut = x.reshape(b, c, h // height, height, w // width, width).permute(0, 2, 4, 1, 3, 5)
        rows = F.linear(cut.flatten(3), self.weight, self.bias)
        return as_images(rows, x[:, :, ::height, ::width])


def link(model: Any) -> None:
    """Lets all blocks of a transformer hand on their last branch, where all are fused and the norm
    behind them takes it.
    """
    blocks = list(model.transformer_blocks)
    if blocks and all(isinstance(block, FusedDiTBlock) for block in blocks):
        plain_eps(model.norm_out)
        model.__class__ = FusedDiT
    elif blocks and all(isinstance(block, FusedJointBlock) for block in blocks):
        model.norm_out = FusedModulatedOut(model.norm_out)
    else:
        return
    for block in blocks:
        block.hands_on = True


def quantise(model: nn.Module) -> tuple[int, int]:
    """Lets the linear layers of a model's fused blocks run in float8 in steps without a tape, in
    place; in bf16 stays a block with one that cannot.

    Returns how many linear layers are in float8, and of how many in the model.
    """
    count = 0
    for block in model.modules():
        if isinstance(block, (FusedDiTBlock, FusedJointBlock)):
            layers = [layer for layer in block.modules() if isinstance(layer, Projection)]
            if all(layer.takes_float8() for layer in layers):
                for layer in layers:
                    layer.quantise()
                block.float8 = True
                count += len(layers)
    kinds = (Projection, nn.Linear)
    return count, sum(isinstance(layer, kinds) for layer in model.modules())


def alone(block: nn.Module) -> nn.Module:
    """Returns a twin of a block that adds its last branch itself, for who looks at what lies
    between blocks; other modules as they are.
    """
    if not isinstance(block, (FusedDiTBlock, FusedJointBlock)):
        return block
    twin = copy.copy(block)
    twin.hands_on = False
    return twin
