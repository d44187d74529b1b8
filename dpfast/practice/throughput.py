"""The speed of a loop: rates, the share of the peak, waits and memory, for ``timings.jsonl`` and
TensorBoard.
"""

from __future__ import annotations

import logging
from functools import cached_property

from dpfast.config import Recipe
from dpfast.errors import InputError, first_line
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.protocol import OwnPipeline
from dpfast.hardware.memory import peak_memory
from dpfast.hardware.peaks import Peaks, peaks_of
from dpfast.launch import world_size
from dpfast.learn.precision import in_bf16
from dpfast.planning.training import count_training
from dpfast.practice.callbacks import Progress
from dpfast.sources.costs import Cost

log = logging.getLogger(__name__)


class Throughput:
    """Computes the rates of a run's loops, one after the other, from where they stand.

    image: (C, H, W) of what the learner trains on; counted: whether it is the recipe's learner,
    which can be counted.

    mfu is the share of the peak of all ranks' devices: FLOPs by torch's formulas over seconds,
    against the peak of the dtype that the models run in. It is left out where the peak is not
    known, or the learner cannot be counted.
    """

    def __init__(
        self,
        recipe: Recipe,
        pipeline: Pipeline | OwnPipeline,
        image: tuple[int, ...],
        *,
        counted: bool = True,
    ) -> None:
        self.recipe = recipe
        self.image = image
        self.counted = counted
        self.device = pipeline.device
        self.classes = len(pipeline.class_names)
        self.half = in_bf16(recipe.learner.precision, pipeline.device)
        self._before: Progress | None = None

    @cached_property
    def peaks(self) -> Peaks | None:
        """The peaks of this rank's device; None where they are not known."""
        return peaks_of(self.device)

    @cached_property
    def image_flops(self) -> float | None:
        """The FLOPs of one image in a training step; None where they cannot be counted."""
        learner = self.recipe.learner
        if not self.counted:
            log.info("the learner is an object of the caller's: no mfu of training")
            return None
        try:
            return count_training(learner, self.classes, self.image, half=self.half).flops
        except (InputError, RuntimeError, NotImplementedError) as error:
            log.warning(
                "the learner's FLOPs are not known, so no mfu of training: %s",
                first_line(error),
            )
            return None

    def begin(self, progress: Progress) -> None:
        """Starts with a loop that begins, or goes on."""
        self._before = progress

    def generation(self, cost: Cost) -> dict[str, float]:
        """Returns the rates of a round, given its ``cost``."""
        half = self.recipe.generator.dtype != "float32"
        return {
            **self._share(cost.flops, cost.seconds, half=half),
            "skipped": cost.skipped,
            "retries": cost.retries,
            "memory_peak": peak_memory(self.device),
        }

    def interval(self, progress: Progress) -> dict[str, float]:
        """Returns the rates of training and evaluation since the last call, or since ``begin``."""
        before = self._before
        assert before is not None
        self._before = progress
        seconds = progress.training_seconds - before.training_seconds
        wait = progress.waiting_seconds - before.waiting_seconds
        steps = progress.step - before.step
        images = steps * self.recipe.learner.batch_size
        return {
            "steps": steps,
            "seconds": seconds,
            "images_per_second": images / max(seconds, 1e-9),
            **self._share(images * (self.image_flops or 0.0), seconds, half=self.half),
            "loader_wait": wait / max(seconds - wait, 1e-9),
            "evaluation_seconds": progress.evaluation_seconds - before.evaluation_seconds,
            "memory_peak": peak_memory(self.device),
        }

    def _share(self, flops: float, seconds: float, *, half: bool) -> dict[str, float]:
        if self.peaks is None or not flops:
            return {}
        peak = self.peaks.half if half else self.peaks.full
        return {"mfu": flops / max(seconds, 1e-9) / (peak * world_size())}
