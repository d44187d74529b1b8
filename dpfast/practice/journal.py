"""The events of a loop in the logs (``dpfast.logs``), with their numbers as fields."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from dpfast.evaluate.measures import Evaluation
from dpfast.practice.callbacks import Addition, Callback
from dpfast.practice.stopping import Stopped
from dpfast.samples import SampleBatch

if TYPE_CHECKING:
    from dpfast.practice.loop import Loop
    from dpfast.practice.result import Result

log = logging.getLogger(__name__)


class LogCallback(Callback):
    """Level info: where a loop begins, rounds, evaluations, results. Level debug: every batch of
    samples.
    """

    def on_start(self, loop: Loop) -> None:
        self._tell(
            loop,
            "start",
            "begins at iteration %d with %d samples",
            loop.trainer.step_count,
            len(loop.pool),
        )

    def on_generation(self, loop: Loop, number: int, total: int) -> None:
        self._tell(
            loop,
            "generation",
            "round %d: makes %d samples",
            number,
            total,
            round=number,
            samples=total,
        )

    def on_samples(self, loop: Loop, batch: SampleBatch) -> None:
        if log.isEnabledFor(logging.DEBUG):
            self._tell(
                loop,
                "samples",
                "made %d samples",
                len(batch),
                level=logging.DEBUG,
                made=len(batch),
                skipped=batch.skipped,
                retries=batch.retries,
            )

    def on_round(self, loop: Loop, addition: Addition) -> None:
        cost = addition.cost
        self._tell(
            loop,
            "round",
            "round %d is complete",
            addition.number,
            round=addition.number,
            added=addition.added,
            seconds=cost.seconds,
            skipped=cost.skipped,
            retries=cost.retries,
            entropy=addition.entropy,
        )

    def on_evaluation(self, loop: Loop, evaluation: Evaluation, loss: float) -> None:
        self._tell(
            loop,
            "evaluation",
            "validation accuracy %.4f",
            evaluation.top1,
            accuracy=evaluation.top1,
            loss=loss,
            waited=loop.patience.waited,
            patience=loop.patience.limit(len(loop.pool)),
        )

    def on_result(self, loop: Loop, result: Result) -> None:
        self._tell(
            loop,
            "result",
            "held-out accuracy %.4f",
            result.test.top1,
            test_accuracy=result.test.top1,
            validation_accuracy=result.validation.top1,
            additions=result.additions,
        )

    def on_end(self, loop: Loop) -> None:
        """The way in which the loop is left: at its end, stopped, or by an error, whose traceback
        is kept.
        """
        error = sys.exc_info()[1]
        if error is None or isinstance(error, Stopped):
            how = "ends" if error is None else "is stopped"
            self._tell(loop, "end", "%s at iteration %d", how, loop.trainer.step_count)
        else:
            self._tell(
                loop, "end", "fails: %s", error, level=logging.ERROR, error=type(error).__name__
            )

    def _tell(
        self,
        loop: Loop,
        event: str,
        words: str,
        *values: object,
        level: int = logging.INFO,
        **fields: Any,
    ) -> None:
        step, size = loop.trainer.step_count, len(loop.pool)
        named = {"event": event, "source": loop.name, "step": step, "pool": size, **fields}
        failed = level == logging.ERROR
        log.log(level, f"{loop.name}: {words}", *values, exc_info=failed, extra={"fields": named})
