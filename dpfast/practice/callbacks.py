"""What a loop tells others while it runs: the console, the folder of the run, or anything of yours.

class Alert(Callback):
    def on_round(self, loop, addition):
        print(loop.name, addition.number, len(loop.pool))

DeliberatePractice(recipe).run(callbacks=[Alert()])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from dpfast.evaluate.measures import Evaluation
from dpfast.samples import SampleBatch
from dpfast.sources.costs import Cost

if TYPE_CHECKING:
    from dpfast.practice.loop import Loop
    from dpfast.practice.result import Result


@dataclass(frozen=True, kw_only=True)
class Addition:
    """One finished round. number: 0 for the initial samples; added, total: samples; cost: of making
    them.

    The rest has no value in round 0. entropy, unguided_entropy: mean nats of the new samples and of
    unguided ones under the learner that guided; pruning_ratio: how many unguided samples one of
    these replaces (``dpfast.sources.costs.pruning_ratio``).
    """

    number: int
    added: int
    total: int
    cost: Cost
    entropy: float | None = None
    unguided_entropy: float | None = None
    pruning_ratio: float | None = None


class Callback:
    """Override what you need. ``loop`` has the recipe, the source's name, trainer, pool and costs:
    read, do not change.

    An exception from a callback stops the run.
    """

    def on_start(self, loop: Loop) -> None:
        """The loop begins, or goes on where a checkpoint was taken."""

    def on_generation(self, loop: Loop, number: int, total: int) -> None:
        """A round of ``total`` samples begins."""

    def on_samples(self, loop: Loop, batch: SampleBatch) -> None:
        """A batch has been appended to the pool."""

    def on_round(self, loop: Loop, addition: Addition) -> None:
        """A round is complete."""

    def on_step(self, loop: Loop) -> None:
        """One optimiser step."""

    def on_evaluation(self, loop: Loop, evaluation: Evaluation, loss: float) -> None:
        """An evaluation on the validation set; ``loss`` is the mean training loss since the one
        before.
        """

    def on_result(self, loop: Loop, result: Result) -> None:
        """The end of the loop."""

    def on_end(self, loop: Loop) -> None:
        """The loop is left, for whatever reason."""


class Console(Callback):
    """A progress bar and a line for every evaluation and round."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_generation(self, loop: Loop, number: int, total: int) -> None:
        what = f"round {number}" if number else "initial samples"
        self._open(total, "sample", f"{loop.name}: {what}", len(loop.pool) - loop.state.round_start)

    def on_samples(self, loop: Loop, batch: SampleBatch) -> None:
        if self.bar is not None:
            self.bar.update(len(batch))

    def on_step(self, loop: Loop) -> None:
        if self.bar is None or self.bar.unit != "it":
            self._open(
                loop.recipe.practice.iterations,
                "it",
                f"{loop.name}: training",
                loop.trainer.step_count - 1,
            )
        assert self.bar is not None
        self.bar.update()

    def on_evaluation(self, loop: Loop, evaluation: Evaluation, loss: float) -> None:
        size, patience = len(loop.pool), loop.patience
        tqdm.write(
            f"{loop.name:>7} | iteration {loop.trainer.step_count:5d} | pool {size:6d} | "
            f"validation accuracy {evaluation.top1:6.2%} | training loss {loss:.3f} | "
            f"waited {patience.waited}/{patience.limit(size)}"
        )

    def on_round(self, loop: Loop, addition: Addition) -> None:
        if addition.number:
            tqdm.write(
                f"{loop.name:>7} | round {addition.number:2d} at iteration "
                f"{loop.trainer.step_count} | "
                f"pool {addition.total - addition.added} -> {addition.total} | mean entropy of the "
                "new samples "
                f"{addition.entropy:.3f} nats, of unguided ones {addition.unguided_entropy:.3f}"
            )

    def on_end(self, loop: Loop) -> None:
        self._close()

    def _open(self, total: int, unit: str, label: str, initial: int) -> None:
        self._close()
        self.bar = tqdm(
            total=total, unit=unit, desc=label, initial=initial, leave=False, dynamic_ncols=True
        )

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None
