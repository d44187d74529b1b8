"""The decoder of AutoencoderTiny: every convolution with its bias, its ReLU and the residual of its
block at once (``ops.relu_chain``), in chains from one enlargement to the next.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dpfast import ops
from dpfast.generate.models.fused.convolutional import doubled
from dpfast.generate.models.fused.refusal import expect_3x3, need

NONE = -1  # no residual


class ReluChain(nn.Module):
    """Convolutions of images (B, C, H, W), each with a ReLU behind it; residuals as
    ``ops.relu_chain`` counts them.
    """

    def __init__(self, weights: Any, biases: Any, residuals: tuple[int, ...]) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList(biases)
        self.requires_grad_(False)
        self.residuals = residuals

    def forward(self, x: Tensor) -> Tensor:
        return ops.relu_chain(x, [*self.weights], [*self.biases], self.residuals)

    def then(self, other: ReluChain) -> ReluChain:
        """Returns this chain and another one behind it."""
        before = len(self.residuals)
        moved = tuple(r if r == NONE else r + before for r in other.residuals)
        return ReluChain(
            [*self.weights, *other.weights],
            [*self.biases, *other.biases],
            self.residuals + moved,
        )


class Doubled(nn.Module):
    """An ``Upsample`` to twice the size, by nearest neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        return doubled(x)


def tiny_block(block: Any) -> ReluChain:
    """Returns the fused form of an ``AutoencoderTinyBlock``."""
    need(type(block.skip) is nn.Identity, f"a {type(block.skip).__name__} beside the convolutions")
    convolutions, activations = block.conv[::2], [*block.conv[1::2], block.fuse]
    for activation in activations:
        need(type(activation) is nn.ReLU, f"a {type(activation).__name__}")
    need(len(convolutions) == len(activations), "no activation behind a convolution")
    for convolution in convolutions:
        expect_3x3(convolution)
    weights, biases = ([getattr(c, name) for c in convolutions] for name in ("weight", "bias"))
    return ReluChain(weights, biases, (*[NONE] * (len(convolutions) - 1), 0))


def tiny_decoder(decoder: Any) -> nn.Module:
    """Returns a ``DecoderTiny`` of fused blocks, in place: its own first convolution and activation
    join them.
    """
    first, activation, *others = decoder.layers
    need(type(activation) is nn.ReLU, f"a {type(activation).__name__}")
    expect_3x3(first)
    layers: list[nn.Module] = [ReluChain([first.weight], [first.bias], (NONE,))]
    for layer in others:
        if isinstance(layer, ReluChain) and isinstance(layers[-1], ReluChain):
            layers[-1] = layers[-1].then(layer)
        elif type(layer) is nn.Upsample and (layer.scale_factor, layer.mode) == (2.0, "nearest"):
            layers.append(Doubled())
        else:
            layers.append(layer)
    decoder.layers = nn.Sequential(*layers)
    return decoder
