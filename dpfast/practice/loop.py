"""Algorithm 1 of arXiv 2502.15588: train until the validation accuracy stands still, make harder samples, go on."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.config import Recipe, RecipeError
from dpfast.data.real import RealData
from dpfast.evaluate.measures import Evaluation, evaluate, predict
from dpfast.evaluate.sets import EvaluationSet, Row, evaluate_sets
from dpfast.feed.augment import Augment
from dpfast.feed.loader import make_loader
from dpfast.feed.order import Order
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import SampleBatch
from dpfast.learn.models import build_learner
from dpfast.learn.trainer import Trainer
from dpfast.ops import entropy
from dpfast.pool.pool import SamplePool
from dpfast.pool.saver import Saver, SaveWarning
from dpfast.pool.shards import DamagedPoolError
from dpfast.practice import checkpoint
from dpfast.practice.callbacks import Addition, Callback
from dpfast.practice.checkpoint import Checkpoint
from dpfast.practice.costs import Cost, pruning_ratio
from dpfast.practice.patience import Patience
from dpfast.practice.run_folder import RunFolder
from dpfast.practice.sources import Round, Source
from dpfast.practice.stopping import LossError, Stop, Stopped

PROGRESS_SECONDS = 30.0  # of generation between two savings of a round's samples


@dataclass(frozen=True)
class Result:
    """One source's outcome: the pool it trained on and its accuracy on the two real sets (``evaluate_with`` weights).

    cost: of all samples; initial_cost: of those before training. Seconds are those of all lives of a resumed run.
    loader_wait: time spent waiting for batches over the time of the learner's steps.
    """

    source: str
    pool: SamplePool
    learner: nn.Module
    validation: Evaluation
    test: Evaluation
    iterations: int
    additions: int
    initial_cost: Cost
    cost: Cost
    training_seconds: float
    evaluation_seconds: float
    loader_wait: float
    sets: tuple[Row, ...] = ()  # the recipe's further evaluation sets

    @property
    def generation_seconds(self) -> float:
        return self.cost.seconds


class Loop:
    """One learner, one source, one pool. ``Loop(...).run(source)`` trains from scratch to the recipe's iterations.

    callbacks: told what happens, in their order. folder: where the state is kept; None: nowhere. stop: asked after
    every step and batch.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        pipeline: Pipeline,
        real: RealData,
        *,
        sets: Sequence[EvaluationSet] = (),
        folder: RunFolder | None = None,
        callbacks: Sequence[Callback] = (),
        stop: Stop | None = None,
    ) -> None:
        self.recipe, self.name, self.pipeline, self.real, self.sets = recipe, name, pipeline, real, sets
        self.folder, self.callbacks, self.stop = folder, callbacks, stop or Stop()
        config, practice = recipe.learner, recipe.practice
        self.trainer = Trainer(new_learner(recipe, pipeline), config, iterations=practice.iterations)
        self.pool = SamplePool.from_recipe(
            recipe.pool,
            practice.maximum_samples,
            real.validation.images.shape[1:],
            folder=None if folder is None else folder.path,
        )
        self.loader = make_loader(
            config.loader,
            self.pool,
            batch_size=config.batch_size,
            seed=recipe.seed,
            augment=Augment(
                flip=config.flip, shift=config.shift, crop=config.crop, mixup=config.mixup, cutmix=config.cutmix
            ),
            classes=pipeline.denoiser.classes,
            fresh_weight=practice.fresh_weight,
        )
        self.patience = Patience(practice.patience, practice.initial_samples, practice.patience_growth)
        self.interval = practice.interval(config.batch_size)
        self.round = -1  # the newest complete one; round 0 are the initial samples
        self.round_start = 0  # the pool's size before it, or before the pending one
        self.pending = True  # the next round is due, or being made
        self.frozen = False  # a branch: no more additions
        self.moments: list[int] = []  # the steps after which samples were added
        self.finished = False
        self.initial_cost = Cost()
        self.training_seconds = self.evaluation_seconds = 0.0
        self._per_class: Tensor | None = None
        self._loss_sum = torch.zeros((), device=self.trainer.device)
        self._bad_step = torch.zeros((), dtype=torch.int64, device=self.trainer.device)  # first without a finite loss
        self._known = 0, self.loader.state()  # a step and the loader's position after it
        self._waited = 0.0  # in earlier lives of the run
        self._saver: Saver | None = None

    @property
    def additions(self) -> int:
        """Complete rounds after the initial samples."""
        return max(self.round, 0)

    @property
    def guide(self) -> nn.Module:
        """The live weights that guide."""
        return self.trainer.weights(self.recipe.guidance.guide_with)

    @property
    def evaluated(self) -> nn.Module:
        """The live weights whose accuracy counts."""
        return self.trainer.weights(self.recipe.learner.evaluate_with)

    def run(self, source: Source, *, start: Checkpoint | None = None) -> Result:
        """Runs the loop, from a checkpoint on where there is one.

        Raises ``Stopped`` when the stop was requested, ``LossError`` when the loss is not finite.
        """
        self.source = source
        with contextlib.ExitStack() as stack:
            stack.callback(self.loader.close)
            stack.callback(self._tell, "on_end")
            if start is not None:
                self._restore(start)
            if self.folder is not None and not self.finished:
                names = self.pipeline.class_names
                self._saver = stack.enter_context(
                    Saver(self.pool, self.folder.pool(self.name), classes=names, truncate=True)
                )
                if start is None:
                    self._save()
            self._loop()
            return self._result()

    def _loop(self) -> None:
        practice, trainer = self.recipe.practice, self.trainer
        if self.pending:
            self._add()
            self._save()
        started = time.perf_counter()
        while trainer.step_count < practice.iterations:
            if self.stop.requested:
                self.training_seconds += time.perf_counter() - started
                self._save()
                raise Stopped
            self._step()
            if trainer.step_count % self.interval:
                continue
            mean = float(self._loss_sum) / self.interval
            self._check_loss()
            self._loss_sum.zero_()
            self.training_seconds += time.perf_counter() - started
            if self._evaluate(mean):
                self.pending, self.round_start = True, len(self.pool)
                self._save()
                self._add()
            self._save()
            started = time.perf_counter()
        self._check_loss()
        self.training_seconds += time.perf_counter() - started

    def _step(self) -> None:
        loss = self.trainer.step(*next(self.loader))
        self._loss_sum += loss
        step = self.trainer.step_count
        self._bad_step += torch.where((self._bad_step == 0) & ~loss.isfinite(), step, 0)
        if loss.device.type == "cpu":
            self._check_loss()  # on a GPU at the next evaluation: a step must not wait for it
        self._tell("on_step")

    def _check_loss(self) -> None:
        bad = int(self._bad_step)
        if not bad:
            return
        order = Order(self.recipe.seed, self.recipe.learner.batch_size, fresh_weight=self.recipe.practice.fresh_weight)
        step, position = self._known
        order.restore(position)
        for _ in range(bad - step):
            rows = order.next(len(self.pool), self.pool.fresh if order.fresh_weight != 1 else 0)
        ids = sorted(self.pool.column("sample_id")[rows].tolist())
        saved = None if self.folder is None else checkpoint.paths(self.folder.checkpoints(self.name))
        raise LossError(
            f"{self.name}: the loss is not finite at iteration {bad}, on the samples {', '.join(map(str, ids))}; "
            + (f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint")
        )

    def _evaluate(self, loss: float) -> bool:
        """Evaluates; True when samples are due."""
        started, practice, size = time.perf_counter(), self.recipe.practice, len(self.pool)
        validation = self.real.validation
        result = evaluate(self.evaluated, validation.images, validation.labels)
        self._per_class = result.per_class
        self._known = self.trainer.step_count, self.loader.state()
        self.evaluation_seconds += time.perf_counter() - started
        # the count of evaluations without progress starts with the stable phase
        due = not self.trainer.warming and self.patience.update(result.top1, size)
        self._tell("on_evaluation", result, loss)
        if self.source.moments is not None:
            due = self.trainer.step_count in self.source.moments
        most = practice.maximum_rounds
        closed = self.frozen or self.trainer.cooling or (most is not None and self.additions >= most)
        return due and not closed and self.source.available(size) > 0

    def _add(self) -> None:
        """Makes the pending round, or the rest of it."""
        source, start = self.source, self.round_start
        round = Round(
            number=self.round + 1,
            start=start,
            count=source.available(start) if start else source.initial_samples,
            learner_step=self.trainer.step_count,
            per_class=self._per_class,
        )
        self._tell("on_generation", round.number, round.count)
        before = source.cost.state()
        with self._guiding():
            with contextlib.nullcontext() if source.streams else self.stop.at_once():
                batches = self._saved_on_the_way(source.make(round, len(self.pool) - start), round.number)
                for batch in batches:
                    self.pool.append(
                        batch,
                        round=round.number,
                        omega=source.omega(round.number),
                        cfg_scale=source.cfg_scale(round.number),
                        steps=self.recipe.generator.steps,
                        seed=self.recipe.seed,
                    )
                    self._tell("on_samples", batch)
            cost = Cost(**{name: value - before[name] for name, value in source.cost.state().items()})
            addition = Addition(number=round.number, added=round.count, total=len(self.pool), cost=cost)
            if round.number:
                hard = float(self.pool.column("entropy")[start:].mean())
                easy = entropy(predict(self.guide, source.probe))
                ratio = pruning_ratio(easy, hard)
                addition = replace(addition, entropy=hard, unguided_entropy=float(easy.mean()), pruning_ratio=ratio)
                self.patience.added()
                self.moments.append(self.trainer.step_count)
            else:
                self.initial_cost = replace(source.cost)
        if self._saver is not None:
            self._saver.save()
        self.round, self.pending = round.number, False
        self._tell("on_round", addition)

    @contextlib.contextmanager
    def _guiding(self) -> Iterator[None]:
        guide = self.guide
        training = guide.training
        guide.eval()
        try:
            yield
        finally:
            guide.train(training)

    def _saved_on_the_way(self, batches: Iterator[SampleBatch], number: int) -> Iterator[SampleBatch]:
        """Passes batches on, saves what has been appended now and then, and stops between them when asked to."""
        saved = time.perf_counter()
        for batch in batches:
            yield batch
            asked = self.stop.requested
            if self.source.streams and (asked or time.perf_counter() - saved > PROGRESS_SECONDS):
                if self.folder is not None and self._saver is not None:
                    self._saver.save()
                    if self._saver.wait() == len(self.pool):
                        progress = {"round": number, "samples": len(self.pool), "cost": self.source.cost.state()}
                        self.folder.save_progress(self.name, progress)
                saved = time.perf_counter()
                if asked:
                    raise Stopped

    def _result(self) -> Result:
        validation, test, waited = self.real.validation, self.real.test, self._waited + self.loader.waited
        result = Result(
            source=self.name,
            pool=self.pool,
            learner=self.evaluated,
            validation=evaluate(self.evaluated, validation.images, validation.labels),
            test=evaluate(self.evaluated, test.images, test.labels),
            iterations=self.trainer.step_count,
            additions=self.additions,
            initial_cost=self.initial_cost,
            cost=self.source.cost,
            training_seconds=self.training_seconds,
            evaluation_seconds=self.evaluation_seconds,
            loader_wait=waited / max(self.training_seconds - waited, 1e-9),
            sets=tuple(evaluate_sets(self.evaluated, self.sets)),
        )
        if not self.finished:
            self._tell("on_result", result)
            self.finished = True
            self._save()
        return result

    def _save(self) -> None:
        """A checkpoint of this moment. While a round is pending it holds the moment before."""
        if self.folder is None or self._saver is None:
            return
        samples = self.round_start if self.pending else len(self.pool)
        if self._saver.wait() < samples:
            self._saver.save()  # a checkpoint must not promise samples that are not on the disk: try again
            if self._saver.wait() < samples:
                return
        state = {
            "samples": samples,
            "round": self.round,
            "round_start": self.round_start,
            "pending": self.pending,
            "frozen": self.frozen,
            "finished": self.finished,
            "moments": self.moments,
            "loader": self.loader.state(),
            "patience": self.patience.state(),
            "per_class": None if self._per_class is None else self._per_class.tolist(),
            "cost": self.source.cost.state(),
            "initial_cost": self.initial_cost.state(),
            "seconds": [self.training_seconds, self.evaluation_seconds, self._waited + self.loader.waited],
            "written": self.folder.written(),
        }
        tensors = {"loss_sum": self._loss_sum, **checkpoint.prefixed("trainer", self.trainer.state())}
        kept = self.recipe.practice.checkpoints_kept
        ended = self.recipe.practice.keep_rounds and self.pending and self.round >= 0
        folder, step = self.folder.checkpoints(self.name), self.trainer.step_count
        try:
            checkpoint.save(folder, step, tensors, state, keep=kept, round=self.round if ended else None)
        except OSError as error:
            warnings.warn(f"the checkpoint was not written: {error}; training goes on", SaveWarning, stacklevel=2)

    def _restore(self, start: Checkpoint) -> None:
        """Continues from a checkpoint; what follows equals the uninterrupted run bit by bit on a CPU."""
        assert self.folder is not None
        state = start.state
        self.trainer.restore(checkpoint.part("trainer", start.tensors))
        self._loss_sum.copy_(start.tensors["loss_sum"])
        self.round, self.round_start, self.pending = state["round"], state["round_start"], state["pending"]
        self.frozen, self.finished, self.moments = state["frozen"], state["finished"], state["moments"]
        self.loader.restore(state["loader"])
        self.patience.restore(state["patience"])
        self._per_class = None if state["per_class"] is None else torch.tensor(state["per_class"])
        self.source.cost.restore(state["cost"])
        self.initial_cost.restore(state["initial_cost"])
        self.training_seconds, self.evaluation_seconds, self._waited = state["seconds"]
        self._known = self.trainer.step_count, self.loader.state()
        self.pool = self.loader.pool = self._saved_pool(state["samples"])

    def _saved_pool(self, samples: int) -> SamplePool:
        """The first ``samples`` from the folder, and what had been saved of a round that was being made."""
        assert self.folder is not None
        placed: dict[str, Any] = {"tiers": self.pool.tiers, "chunk_bytes": self.pool.chunk_bytes}
        progress = self.folder.progress(self.name) if self.pending and self.source.streams else None
        if progress is not None and progress["round"] == self.round + 1 and progress["samples"] > samples:
            with contextlib.suppress(DamagedPoolError):
                pool = SamplePool.open(self.folder.pool(self.name), limit=progress["samples"], **placed)
                self.source.cost.restore(progress["cost"])
                return pool
        if not samples:
            return self.pool
        try:
            return SamplePool.open(self.folder.pool(self.name), limit=samples, **placed)
        except DamagedPoolError as error:
            raise RecipeError(f"resume: {error}") from error

    def _tell(self, event: str, *values: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *values)


def new_learner(recipe: Recipe, pipeline: Pipeline) -> nn.Module:
    """The recipe's classifier, initialised from its seed."""
    torch.manual_seed(recipe.seed)
    return build_learner(
        recipe.learner.model,
        classes=pipeline.denoiser.classes,
        channels=pipeline.image_channels,
        **recipe.learner.options,
    )
