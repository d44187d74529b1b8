"""The events of a loop and those who hear them: the console, the logs, the run's folder, or yours.

class Alert(Callback):
    def on_round(self, progress, addition):
        print(progress.source, addition.number, progress.pool_size)

DeliberatePractice(recipe).run(callbacks=[Alert()])
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import Any

from dpfast import terminal
from dpfast.evaluate.measures import Evaluation
from dpfast.practice.background import WrittenCheckpoint
from dpfast.practice.result import Result
from dpfast.practice.stopping import Stopped
from dpfast.samples import SampleBatch
from dpfast.sources.costs import Cost

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The state of a loop at the moment of an event; it never changes.

    Seconds are those of all lives of a run.

    Attributes:
        source: Name of the loop's source.
        rank: This process among those of the run.
        step: Optimiser steps taken so far.
        iterations: Optimiser steps of the whole run.
        pool_size: Samples in the pool.
        round: The newest complete round, -1 before the initial samples.
        waited: Evaluations without a new best accuracy.
        patience: Evaluations that are waited for; None where rounds are due after known steps.
        next_round: The next of those known steps; None after the last one, and with patience.
        accuracy: Of the last evaluation, in [0, 1]; None before it.
        lr: The newest step's learning rate.
        grad_norm: Norm of the gradient over all weights in the step before the last evaluation,
            before it was clipped; None until there is one.
        training_seconds: Seconds of training.
        evaluation_seconds: Seconds of evaluation.
        waiting_seconds: Seconds of training in which it waited for batches.
    """

    source: str
    rank: int
    step: int
    iterations: int
    pool_size: int
    round: int
    waited: int
    patience: int | None
    next_round: int | None
    accuracy: float | None
    lr: float
    grad_norm: float | None
    training_seconds: float
    evaluation_seconds: float
    waiting_seconds: float


@dataclass(frozen=True, kw_only=True)
class Addition:
    """One finished round of samples.

    Entropies and the ratio are None in round 0, and where a source has no yardstick.

    Attributes:
        number: 0 for the initial samples.
        added: Samples of this round.
        total: Samples in the pool behind it.
        cost: Cost of making the round's samples.
        omega: Strength of the round's guidance; 0: unguided.
        entropy: Mean nats of the new samples under the learner that guided.
        unguided_entropy: Mean nats of unguided samples under the same learner.
        pruning_ratio: Number of unguided samples that one of these replaces
            (``dpfast.sources.costs.pruning_ratio``).
    """

    number: int
    added: int
    total: int
    cost: Cost
    omega: float
    entropy: float | None = None
    unguided_entropy: float | None = None
    pruning_ratio: float | None = None


class Callback:
    """Hears what happens in a loop. Override what you need.

    An exception from a callback stops the run.

    Examples:
        >>> import dpfast
        >>> class Rounds(dpfast.Callback):  # for DeliberatePractice(recipe, callbacks=[Rounds()])
        ...     def on_round(self, progress, addition):
        ...         print(f"round {addition.number}: {addition.total} samples")
    """

    def on_start(self, progress: Progress) -> None:
        """Hears that the loop begins, or goes on where a checkpoint was taken."""

    def on_generation(self, progress: Progress, number: int, total: int, made: int) -> None:
        """Hears that a round begins.

        Args:
            progress: State of the loop.
            number: Number of the round, 0 for the initial samples.
            total: Samples of the round that this rank makes.
            made: Samples of those that exist already.
        """

    def on_samples(self, progress: Progress, batch: SampleBatch) -> None:
        """Hears that a batch has been appended to the pool."""

    def on_round(self, progress: Progress, addition: Addition) -> None:
        """Hears that a round is complete."""

    def on_step(self, progress: Progress) -> None:
        """Hears that one optimiser step has been taken."""

    def on_evaluation(self, progress: Progress, evaluation: Evaluation, loss: float) -> None:
        """Hears that the learner was evaluated on the validation set.

        Args:
            progress: State of the loop.
            evaluation: Measures of the learner on the validation set.
            loss: Mean training loss since the evaluation before.
        """

    def on_checkpoint(self, progress: Progress, written: WrittenCheckpoint) -> None:
        """Hears, some steps later, that a checkpoint is on the disk."""

    def on_result(self, progress: Progress, result: Result) -> None:
        """Hears that the loop has ended."""

    def on_end(self, progress: Progress) -> None:
        """Hears that the loop is left, for whatever reason."""


class Console(Callback):
    """Shows the progress, and a line for every evaluation and round."""

    def __init__(self) -> None:
        self.bar: terminal.Progress | None = None

    def on_generation(self, progress: Progress, number: int, total: int, made: int) -> None:
        what = f"round {number}" if number else "initial samples"
        self._open(total, "sample", f"{progress.source}: {what}", made)

    def on_samples(self, progress: Progress, batch: SampleBatch) -> None:
        if self.bar is not None:
            self.bar.update(len(batch))

    def on_step(self, progress: Progress) -> None:
        if self.bar is None or self.bar.unit != "step":
            label = f"{progress.source}: training"
            self._open(progress.iterations, "step", label, progress.step - 1)
        assert self.bar is not None
        self.bar.update()

    def on_evaluation(self, progress: Progress, evaluation: Evaluation, loss: float) -> None:
        terminal.tell(
            f"{progress.source:>7} | step {progress.step:4d} | pool {progress.pool_size:5d} | "
            f"validation {evaluation.top1:6.2%} | loss {loss:.3f} | {_waits(progress)}"
        )

    def on_round(self, progress: Progress, addition: Addition) -> None:
        if not addition.number:
            return
        line = (
            f"{progress.source:>7} | step {progress.step:4d} | round {addition.number} | "
            f"pool {addition.total - addition.added} -> {addition.total}"
        )
        if addition.entropy is not None:
            line += f" | entropy {addition.entropy:.2f}, unguided {addition.unguided_entropy:.2f}"
        terminal.tell(line)

    def on_end(self, progress: Progress) -> None:
        self._close()

    def _open(self, total: int, unit: str, label: str, initial: int) -> None:
        self._close()
        self.bar = terminal.Progress(total, unit, label, done=initial)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None


class LogCallback(Callback):
    """Writes the events of a loop into the logs (``dpfast.logs``), with their numbers as fields.

    Level info: where a loop begins, rounds, evaluations, results. Level debug: every batch of
    samples.
    """

    def on_start(self, progress: Progress) -> None:
        words = "begins at iteration %d with %d samples"
        self._log(progress, "start", words, progress.step, progress.pool_size)

    def on_generation(self, progress: Progress, number: int, total: int, made: int) -> None:
        words = "round %d: makes %d samples"
        self._log(progress, "generation", words, number, total, round=number, samples=total)

    def on_samples(self, progress: Progress, batch: SampleBatch) -> None:
        if not log.isEnabledFor(logging.DEBUG):
            return
        self._log(
            progress,
            "samples",
            "made %d samples",
            len(batch),
            level=logging.DEBUG,
            made=len(batch),
            skipped=batch.skipped,
            retries=batch.retries,
        )

    def on_round(self, progress: Progress, addition: Addition) -> None:
        cost = addition.cost
        self._log(
            progress,
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

    def on_evaluation(self, progress: Progress, evaluation: Evaluation, loss: float) -> None:
        self._log(
            progress,
            "evaluation",
            "validation accuracy %.4f",
            evaluation.top1,
            accuracy=evaluation.top1,
            loss=loss,
            waited=progress.waited,
            patience=progress.patience,
        )

    def on_result(self, progress: Progress, result: Result) -> None:
        self._log(
            progress,
            "result",
            "held-out accuracy %.4f",
            result.test.top1,
            test_accuracy=result.test.top1,
            validation_accuracy=result.validation.top1,
            additions=result.additions,
        )

    def on_end(self, progress: Progress) -> None:
        """Logs how the loop is left: at its end, stopped, or by an error, whose traceback is
        kept.
        """
        error = sys.exc_info()[1]
        if error is None or isinstance(error, Stopped):
            how = "ends" if error is None else "is stopped"
            self._log(progress, "end", "%s at iteration %d", how, progress.step)
            return
        self._log(
            progress, "end", "fails: %s", error, level=logging.ERROR, error=type(error).__name__
        )

    def _log(
        self,
        progress: Progress,
        event: str,
        words: str,
        *values: object,
        level: int = logging.INFO,
        **fields: Any,
    ) -> None:
        named = {
            "event": event,
            "source": progress.source,
            "step": progress.step,
            "pool": progress.pool_size,
            **fields,
        }
        failed = level == logging.ERROR
        text = f"{progress.source}: {words}"
        log.log(level, text, *values, exc_info=failed, extra={"fields": named})


def _waits(progress: Progress) -> str:
    """Returns the words for what the next round waits for."""
    if progress.patience is not None:
        return f"waited {progress.waited}/{progress.patience}"
    if progress.next_round is None:
        return "rounds over"
    return f"next at {progress.next_round}"
