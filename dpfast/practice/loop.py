"""Algorithm 1 of arXiv 2502.15588: train until the validation accuracy stands still, make harder
samples, go on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dpfast.config import Recipe
from dpfast.data.real import RealData
from dpfast.evaluate.measures import evaluate
from dpfast.evaluate.sets import EvaluationSet, evaluate_sets
from dpfast.feed import make_loader
from dpfast.feed.augment import Augment
from dpfast.generate.pipelines import Pipeline
from dpfast.hardware.device import is_gpu
from dpfast.hardware.out_of_memory import release
from dpfast.learn.committee import guiding
from dpfast.learn.models import new_learner
from dpfast.learn.trainer import Trainer
from dpfast.parallel import ALONE, Ranks
from dpfast.pool.pool import SamplePool
from dpfast.pool.sharded import ShardLayout, pool_of_ranks
from dpfast.practice.callbacks import Addition, Callback
from dpfast.practice.checkpoint import Checkpoint
from dpfast.practice.checkpointer import LoopCheckpointer, LoopState
from dpfast.practice.losses import Losses
from dpfast.practice.patience import Patience
from dpfast.practice.result import Result
from dpfast.practice.run_folder import RunPaths
from dpfast.practice.stopping import CHECKPOINT, STOP, LossError, Stop, StopTogether
from dpfast.sources.costs import Cost, pruning_ratio
from dpfast.sources.sources import Round, Source


class Loop:
    """One learner, one source, one pool. ``Loop(...).run(source)`` trains from scratch to the
    recipe's iterations.

    Models, losses and batches are on the pipeline's device. callbacks: told what happens, in their
    order. folder: where the state is kept; None: nowhere. stop: asked after every step and batch.
    ranks: run one loop each, in step: they make and hold their parts of the samples, train on their
    parts of the batches, and decide alike.

    pool: what is trained on.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        pipeline: Pipeline,
        real: RealData,
        *,
        sets: Sequence[EvaluationSet] = (),
        folder: RunPaths | None = None,
        callbacks: Sequence[Callback] = (),
        stop: Stop | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self.name, self.pipeline, self.real, self.sets = (
            recipe,
            name,
            pipeline,
            real,
            sets,
        )
        self.callbacks, self.stop, self.ranks = callbacks, stop or Stop(), ranks
        self.stop_together = StopTogether(self.stop, ranks)
        config, practice, device = recipe.learner, recipe.practice, pipeline.device
        self.trainer = Trainer(
            new_learner(recipe, pipeline), config, iterations=practice.iterations, ranks=ranks
        )
        self.shape = stored_shape(recipe, pipeline, real)
        local = SamplePool.from_recipe(
            recipe.pool,
            part_of_samples(recipe, ranks),
            self.shape,
            device=device,
            folder=None if folder is None else folder.path,
            decode=pipeline.guidance_decoder,
            processes=ranks.local_size,
        )
        self.pool = pool_of_ranks(local, ShardLayout(ranks, recipe.generator.batch_size))
        self.loader = make_loader(
            config.loader,
            self.pool,
            batch_size=config.batch_size,
            seed=recipe.seed,
            augment=Augment(
                flip=config.flip,
                shift=config.shift,
                crop=config.crop,
                mixup=config.mixup,
                cutmix=config.cutmix,
            ),
            device=device,
            classes=pipeline.denoiser.classes,
            fresh_weight=practice.fresh_weight,
        )
        self.patience = Patience(
            practice.patience, practice.initial_samples, practice.patience_growth
        )
        self.interval = practice.interval(config.batch_size)
        self.losses = Losses(self.loader, device, ranks)
        self.state, self.keeper = LoopState(), LoopCheckpointer(self, folder)
        self.initial_cost = Cost()
        self.cost_before = Cost()  # the source's, before the pending round

    @property
    def local(self) -> SamplePool:
        """The samples that this rank holds; all of ``pool`` where it is alone."""
        return self.pool.local

    @property
    def additions(self) -> int:
        """Complete rounds after the initial samples."""
        return max(self.state.round, 0)

    @property
    def guide(self) -> nn.Module:
        """The live weights that guide, in the learner's precision."""
        return self.trainer.classifier(self.recipe.guidance.guide_with)

    @cached_property
    def guides(self) -> nn.Module:
        """What guides: ``guide``, or for the criterion "disagreement" both weights, ``guide``
        before the others.
        """
        other = "raw" if self.recipe.guidance.guide_with == "ema" else "ema"
        return guiding(self.recipe.guidance.criterion, self.guide, self.trainer.classifier(other))

    @property
    def judged(self) -> nn.Module:
        """``evaluated`` in the learner's precision."""
        return self.trainer.classifier(self.recipe.learner.evaluate_with)

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
                self.keeper.restore(start)
            stack.enter_context(self.keeper.opened())
            self._tell("on_start")
            if start is None:
                self.keeper.save()
            self._practise()
            return self._finish()

    def _practise(self) -> None:
        """Algorithm 1."""
        if self.state.pending:  # line 1: N unguided samples; or a round that was cut short
            self.keeper.check_disk()
            self._add_samples()
            self.keeper.save()
        while self._train():  # tau steps
            if self._stands_still():  # T >= T_max
                self.state.pending, self.state.round_start = True, len(self.pool)
                self.cost_before = replace(self.source.cost)
                self.keeper.save()
                self.keeper.check_disk()
                self._add_samples()  # P samples that the learner of this moment guides
                self.keeper.save()
            else:
                self.keeper.evaluated()

    def _train(self) -> bool:
        """Trains up to the next evaluation; False when the iterations end before it."""
        trainer, started = self.trainer, time.perf_counter()
        self.stop_together.anew()
        try:
            while trainer.step_count < trainer.iterations:
                asked = self.stop_together.before(
                    trainer.step_count, checkpoint=self.keeper.overdue
                )
                if asked == STOP:
                    break
                if asked == CHECKPOINT:
                    self._check_loss()
                    self.keeper.save()
                self.losses.add(trainer.step(*next(self.loader)), trainer.step_count)
                due = trainer.step_count % self.interval == 0
                if due or (
                    trainer.device.type == "cpu" and self.ranks.alone
                ):  # a step on a GPU must not wait for it
                    self._check_loss()
                self._tell("on_step")
                if due:
                    return True
            self._check_loss()
        finally:
            self.state.training_seconds += time.perf_counter() - started
        self.keeper.save(wait=self.stop.requested)
        self.stop.check()
        return False

    def _stands_still(self) -> bool:
        """Evaluates; True when samples are due."""
        started, practice, state, size = (
            time.perf_counter(),
            self.recipe.practice,
            self.state,
            len(self.pool),
        )
        validation = self.real.validation
        result = evaluate(self.judged, validation.images, validation.labels, self.ranks)
        state.per_class = [None if value != value else value for value in result.per_class.tolist()]
        self.losses.anchor(self.trainer.step_count)
        state.evaluation_seconds += time.perf_counter() - started
        # the count of evaluations without progress starts with the stable phase
        due = not self.trainer.warming and self.patience.update(result.top1, size)
        self._tell("on_evaluation", result, self.losses.mean(self.interval))
        if self.source.moments is not None:
            due = self.trainer.step_count in self.source.moments
        most = practice.maximum_rounds
        closed = (
            state.frozen or self.trainer.cooling or (most is not None and self.additions >= most)
        )
        return due and not closed and self.source.available(size) > 0

    def _add_samples(self) -> None:
        """Makes the pending round, or the rest of it."""
        source, state, pool, local = self.source, self.state, self.pool, self.local
        start, known = state.round_start, state.per_class
        turn, before = pool.turn, pool.held(start)
        round = Round(
            number=state.round + 1,
            start=start,
            count=source.available(start) if start else source.initial_samples,
            learner_step=self.trainer.step_count,
            per_class=None
            if known is None
            else torch.tensor([float("nan") if v is None else v for v in known]),
            turn=turn,
        )
        part = self.ranks.share(round.count, self.recipe.generator.batch_size, turn=turn)
        self._tell("on_generation", round.number, part)
        self._make_room()
        local.reserve(part - (len(local) - before))
        with self._guiding():
            batches = source.make(round, len(local) - before)
            with contextlib.nullcontext() if source.streams else self.stop.at_once():
                for batch in self.keeper.on_the_way(batches) if source.streams else batches:
                    self.ranks.beat()
                    local.append(
                        batch,
                        payload=self.keeper.payload(batch),
                        round=round.number,
                        omega=source.omega(round.number),
                        cfg_scale=source.cfg_scale(round.number),
                        steps=source.steps(round.number),
                        seed=self.recipe.seed,
                    )
                    self._tell("on_samples", batch)
            pool.complete(round.count)
            source.cost.share(self.cost_before, self.ranks)
            source.release()  # before the yardstick is made
            addition = self._addition(round)
        self._make_room()
        self.keeper.save_samples()
        if round.number:
            self.patience.added()
            state.moments.append(self.trainer.step_count)
        else:
            self.initial_cost = replace(source.cost)
        state.round, state.pending = round.number, False
        state.rounds.append(round.count)
        self._tell("on_round", addition)

    def _make_room(self) -> None:
        """Gives back what a phase leaves in the device's memory: training and generation take turns
        in it.

        Training leaves gradients and batches that a growing pool makes stale, either one leaves
        blocks in the allocator's cache; captured steps are the sampler's
        (``GuidedSampler.release``). Weights, optimiser, EMA and pool stay.
        """
        self.trainer.release()
        self.loader.release()
        if is_gpu(self.trainer.device):
            release(self.trainer.device)

    def _addition(self, round: Round) -> Addition:
        """The account of a round whose samples are all in the pool."""
        cost = self.source.cost.since(self.cost_before)
        addition = Addition(number=round.number, added=round.count, total=len(self.pool), cost=cost)
        if not round.number:
            return addition
        hard = float(self.pool.column("entropy", round.start).mean())
        easy = self.source.yardstick.entropies(self.guide)
        ratio = pruning_ratio(easy, hard)
        return replace(
            addition, entropy=hard, unguided_entropy=float(easy.mean()), pruning_ratio=ratio
        )

    @contextlib.contextmanager
    def _guiding(self) -> Iterator[None]:
        model = self.trainer.model  # the EMA never trains
        training = model.training
        self.guides.eval()
        try:
            yield
        finally:
            model.train(training)

    def _check_loss(self) -> None:
        bad = self.losses.bad()
        if bad:
            ids, saved = ", ".join(map(str, self.losses.samples_of(bad))), self.keeper.newest()
            raise LossError(
                f"{self.name}: the loss is not finite at iteration {bad}, on the samples {ids}; "
                + (f"the last good checkpoint is {saved}" if saved else "there is no checkpoint")
            )

    def _finish(self) -> Result:
        validation, test, state = self.real.validation, self.real.test, self.state
        waited = state.waited + self.loader.waited
        with self.stop.at_once():
            result = Result(
                source=self.name,
                pool=self.pool,
                learner=self.evaluated,
                validation=evaluate(self.judged, validation.images, validation.labels, self.ranks),
                test=evaluate(self.judged, test.images, test.labels, self.ranks),
                iterations=self.trainer.step_count,
                additions=self.additions,
                initial_cost=self.initial_cost,
                cost=self.source.cost,
                training_seconds=state.training_seconds,
                evaluation_seconds=state.evaluation_seconds,
                loader_wait=waited / max(state.training_seconds - waited, 1e-9),
                sets=tuple(evaluate_sets(self.judged, self.sets, self.ranks)),
            )
        if not state.finished:
            self._tell("on_result", result)
            state.finished = True
            self.keeper.save(wait=True)
        return result

    def _tell(self, event: str, *values: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *values)


def part_of_samples(recipe: Recipe, ranks: Ranks) -> int:
    """How many of the most samples that a run can have one rank holds at most."""
    practice, batch = recipe.practice, recipe.generator.batch_size
    if ranks.alone:
        return practice.maximum_samples
    rounds = 1 + -(-(practice.maximum_samples - practice.initial_samples) // practice.round_samples)
    batches = practice.maximum_samples // batch + rounds  # the last one of a round may be smaller
    return min(-(-batches // ranks.size) * batch, practice.maximum_samples)


def stored_shape(recipe: Recipe, pipeline: Pipeline, real: RealData) -> tuple[int, ...]:
    """(C, H, W) of what a run's pool stores of a sample: latents, or pixels as those of the real
    images.
    """
    if recipe.pool.codec == "latents":
        return pipeline.denoiser.sample_shape
    return tuple(real.validation.images.shape[1:])
