"""How fast a loop goes: rates, the share of the peak, waits and memory, for ``timings.jsonl`` and
TensorBoard.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from dpfast.errors import InputError
from dpfast.hardware.memory import peak_memory
from dpfast.hardware.peaks import Device, peaks_of
from dpfast.launch import world_size
from dpfast.planning.training import count_training
from dpfast.sources.costs import Cost

if TYPE_CHECKING:
    from dpfast.practice.loop import Loop

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """Seconds and steps of a loop up to a moment."""

    step: int
    training: float
    evaluation: float
    waited: float


class Throughput:
    """Of one loop, from the moment that it begins or goes on.

    mfu is the share of the peak of all ranks' devices: FLOPs by torch's formulas over seconds,
    against the peak of the dtype that the models run in. It is left out where the peak is not
    known, or the learner cannot be counted.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self._before = self._now()

    @cached_property
    def peaks(self) -> Device | None:
        return peaks_of(self.loop.pipeline.device)

    @cached_property
    def image_flops(self) -> float | None:
        """Of an image in a training step."""
        loop = self.loop
        image = tuple(loop.real.validation.images.shape[1:])
        try:
            counted = count_training(
                loop.recipe.learner, loop.pipeline.denoiser.classes, image, half=loop.trainer.bf16
            )
            return counted.flops
        except (InputError, RuntimeError, NotImplementedError) as error:
            log.warning(
                "the learner's FLOPs are not known, so no mfu of training: %s",
                str(error).splitlines()[0],
            )
            return None

    def generation(self, cost: Cost) -> dict[str, float]:
        """Of a round that took ``cost``."""
        half = self.loop.recipe.generator.dtype != "float32"
        return {
            **self._share(cost.flops, cost.seconds, half=half),
            "skipped": cost.skipped,
            "retries": cost.retries,
            "memory_peak": peak_memory(self.loop.pipeline.device),
        }

    def interval(self) -> dict[str, float]:
        """Of the training and the evaluation since the last call."""
        before, now = self._before, self._now()
        self._before, seconds = now, now.training - before.training
        steps, wait = now.step - before.step, now.waited - before.waited
        images = steps * self.loop.recipe.learner.batch_size
        return {
            "steps": steps,
            "seconds": seconds,
            "images_per_second": images / max(seconds, 1e-9),
            **self._share(images * (self.image_flops or 0.0), seconds, half=self.loop.trainer.bf16),
            "loader_wait": wait / max(seconds - wait, 1e-9),
            "evaluation_seconds": now.evaluation - before.evaluation,
            "memory_peak": peak_memory(self.loop.pipeline.device),
        }

    def _share(self, flops: float, seconds: float, *, half: bool) -> dict[str, float]:
        if self.peaks is None or not flops:
            return {}
        peak = self.peaks.half if half else self.peaks.full
        return {"mfu": flops / max(seconds, 1e-9) / (peak * world_size())}

    def _now(self) -> Reading:
        loop, state = self.loop, self.loop.state
        return Reading(
            loop.trainer.step_count,
            state.training_seconds,
            state.evaluation_seconds,
            loop.loader.waited,
        )
