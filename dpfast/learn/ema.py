"""An exponential moving average of a model's weights and buffers, which no step waits for."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """The average of ``model`` over its steps: ``module``, in eval mode, which never learns.

    Floating-point parameters and buffers are averaged and others copied, out of the tensors that
    ``model`` has now: it must change them in place. Nothing is read on the host and nothing copied
    from it. (torch's ``AveragedModel`` sends its counter to the device in each update, and that
    copy waits for all work before it.)
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        self._floating = [pair for pair in pairs if pair[0].is_floating_point()]
        self._others = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Moves the average to ``decay`` of itself and 1 - ``decay`` of the model."""
        averaged, current = zip(*self._floating, strict=True)
        torch._foreach_lerp_(averaged, current, 1 - decay)
        if self._others:
            averaged, current = zip(*self._others, strict=True)
            torch._foreach_copy_(averaged, current)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
