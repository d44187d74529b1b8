"""Feature caching: a denoiser whose inner blocks rest on some unguided steps, in a form that stays
one full graph.

Between neighbouring steps the deep features of a denoiser change little. A "keep" step runs the
whole network and hands out what its inner blocks made; a "reuse" step runs the outer ones around
that tensor:

transformers  the first block runs, what the others add to it is kept (as in First Block Cache of
              diffusers)
UNets         the outermost down and up block run, the output of the up blocks below is kept
              (DeepCache, Ma et al.
              2023, arXiv 2312.00858)

Guided steps neither keep nor reuse, and nothing is reused across one. The gradient of a network
with a constant inside
is not the gradient of the network: guidance would climb what the outer blocks alone say. And
guidance moves x by omega
of its norm in a direction that no trajectory takes by itself: features from before the move belong
to another sample. With every second step guided there is therefore nothing to reuse.

Which steps reuse is fixed by the schedule, not by a comparison of features: diffusers' hooks
compare them, read the result on the host and keep their tensors in Python, which neither one full
graph nor a CUDA graph allows. Here the kept tensor is an input and an output of the step like the
state itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from dpfast.errors import InputError
from dpfast.generate.models.blocks import TRANSFORMERS, Blocks, blocks_of, replaced, with_forward
from dpfast.generate.models.denoiser import predict
from dpfast.generate.models.fused.adaptive import FusedJointBlock

Features = Literal["compute", "keep", "reuse"]
# Blocks that return the text's hidden states and, behind them, the image's.
JOINT = (
    JointTransformerBlock,
    FusedJointBlock,
    FluxTransformerBlock,
    FluxSingleTransformerBlock,
)


def cached_steps(guided: Sequence[bool], cfg: Sequence[bool], interval: int) -> list[Features]:
    """Returns each step's use of its features: every ``interval``-th step of a run of unguided
    steps keeps them.

    guided, cfg: of each step. A run ends at a guided step and where classifier-free guidance begins
    or ends, which changes the batch of the denoiser. A step that nobody reuses has nothing to keep.
    """
    found: list[Features] = []
    position = 0
    for i, (own, both) in enumerate(zip(guided, cfg, strict=True)):
        goes_on = i > 0 and not own and not guided[i - 1] and both == cfg[i - 1]
        position = position + 1 if goes_on else 0
        found.append("reuse" if position % interval else "compute")
    for i, following in enumerate(found[1:]):
        if following == "reuse" and found[i] == "compute":
            found[i] = "keep"
    return found


class FeatureCache:
    """The "keep" and "reuse" calls of a denoiser of ``dpfast.generate.models.denoiser``, which
    share its weights.

    Raises ``InputError`` for a model without blocks that are known here, or with a single one.
    """

    def __init__(self, denoiser: Any) -> None:
        self._slot = _Slot()
        model: Any = getattr(denoiser, "model", None)
        known = blocks_of(denoiser)
        transformers: Any = {name: known[name] for name in TRANSFORMERS if name in known}
        if sum(map(len, transformers.values())) > 1:
            keep, reuse = _transformer(transformers, self._slot)
        elif len(getattr(model, "up_blocks", ())) > 1 and not hasattr(
            model.up_blocks[-2], "skip_conv"
        ):
            keep, reuse = _unet(model, self._slot)
        else:
            raise InputError(
                f"cache_interval: a {type(denoiser).__name__} "
                "has no inner blocks that are known here"
            )
        self._keep, self._reuse = replaced(denoiser, keep), replaced(denoiser, reuse)

    def keep(
        self, x: Tensor, timestep: Tensor, labels: Tensor, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the denoiser's prediction, and its features (B, ...)."""
        prediction = predict(self._keep, x, timestep, labels, scale)
        kept, self._slot.value = self._slot.value, None
        assert kept is not None
        return prediction, kept

    def reuse(
        self,
        x: Tensor,
        timestep: Tensor,
        labels: Tensor,
        kept: Tensor,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Returns the prediction of the outer blocks around ``kept``."""
        self._slot.value = kept
        prediction = predict(self._reuse, x, timestep, labels, scale)
        self._slot.value = None
        return prediction


class _Slot:
    """Carries features past diffusers' forward, within one call. Empty between calls."""

    value: Tensor | None = None


def _stream(out: Any) -> Tensor:
    """Returns the image's hidden states in a block's output; joint blocks return the text's before
    them.
    """
    return out[1] if isinstance(out, tuple) else out


def _transformer(lists: dict[str, list[Any]], slot: _Slot) -> tuple[Blocks, Blocks]:
    blocks = [block for each in lists.values() for block in each]
    first, last = blocks[0], blocks[-1]
    joint = isinstance(last, JOINT)

    def run_first(*args: Any, **kwargs: Any) -> Any:
        out = first(*args, **kwargs)
        slot.value = _stream(out)
        return out

    def run_last(*args: Any, **kwargs: Any) -> Any:
        out = last(*args, **kwargs)
        assert slot.value is not None
        slot.value = _stream(out) - slot.value
        return out

    def add(*args: Any, **kwargs: Any) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]) + slot.value
        return (kwargs["encoder_hidden_states"], hidden) if joint else hidden

    forms = {first: with_forward(first, run_first), last: with_forward(last, run_last)}
    added = {first: first, last: with_forward(last, add)}
    keep: Blocks = {name: [forms.get(b, b) for b in each] for name, each in lists.items()}
    reuse: Blocks = {name: [added[b] for b in each if b in added] for name, each in lists.items()}
    return keep, reuse


def _unet(model: Any, slot: _Slot) -> tuple[Blocks, Blocks]:
    *inner, last = model.up_blocks
    source = inner[-1]

    def run(*args: Any, **kwargs: Any) -> Any:
        slot.value = source(*args, **kwargs)
        return slot.value

    def passes(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    def take(*_: Any, **__: Any) -> Tensor | None:
        return slot.value

    def idle(block: Any) -> nn.Module:
        # of the residuals that the up blocks take away
        count = len(block.resnets) + (block.downsamplers is not None)
        return with_forward(
            block, lambda hidden_states, *_, **__: (hidden_states, (hidden_states,) * count)
        )

    resting = [with_forward(block, passes) for block in inner[:-1]]
    reuse: Blocks = {
        "down_blocks": [model.down_blocks[0], *map(idle, model.down_blocks[1:])],
        "up_blocks": [*resting, with_forward(source, take), last],
    }
    if model.mid_block is not None:
        reuse["mid_block"] = with_forward(model.mid_block, passes)
    return {"up_blocks": [*inner[:-1], with_forward(source, run), last]}, reuse
