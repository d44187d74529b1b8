"""Warm-up, stable, decay: the learning-rate schedule of the paper (section C.5)."""

from __future__ import annotations

import math


def wsd(step: int, *, total: int, warmup: float, cooldown: float) -> float:
    """The learning rate of optimiser step ``step`` (0-based) as a factor of its peak.

    Linear over the first ``warmup`` x total steps, then 1, then a half cosine to 0 over the last
    ``cooldown`` x total.
    """
    if step < warmup * total:
        return (step + 1) / (warmup * total + 1)
    left = total - step
    if left < cooldown * total:
        return 0.5 - 0.5 * math.cos(math.pi * left / (cooldown * total))
    return 1.0
