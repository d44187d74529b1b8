"""Algorithm 1 of arXiv 2502.15588: train until the validation accuracy stands still, make harder
samples, go on.

To understand a round, read in this order:

    practice/loop.py                the algorithm, and what a round and an interval of training are
    practice/loop_state.py          what a loop remembers beside learner and samples
    practice/patience.py            when samples are due
    practice/stopping.py            how ranks stop, or save, at the same step
    sources/source.py               what a source is asked, and what it answers
    sources/static.py               how samples are made without guidance, in batches by rank
    sources/unguided.py             which of them another source has made already
    sources/dynamic.py              rounds of such samples, and their entropy
    sources/prune.py                the best of many of them
    sources/deliberate_practice.py  the source "dp": rounds with labels, omega, and who guides
    sources/strengths.py            how strongly they guide, by class
    sources/guided_methods.py       how guided samples come about
    pool/protocol.py                what they are added to, whoever holds it
    practice/saved_samples.py       how they outlive the process
    practice/checkpointer.py        how the rest does: ``Loop.components``
    feed/loader.py                  what the learner is given of the pool
    learn/trainer.py                what it does with a batch
    practice/losses.py              what is remembered of its losses
    practice/callbacks.py           who is told, and of what
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

from torch import Tensor, nn

from dpfast.config import Recipe
from dpfast.data.real import RealData, RealSet
from dpfast.errors import InputError
from dpfast.evaluate.measures import Evaluation, by_shots, evaluate
from dpfast.evaluate.sets import EvaluationSet, evaluate_sets
from dpfast.feed import make_loader
from dpfast.feed.augment import Augment
from dpfast.feed.loader import Loader
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.protocol import OwnPipeline
from dpfast.hardware.device import is_gpu
from dpfast.hardware.out_of_memory import release
from dpfast.learn.models import NewLearner, guiding, learner_factory
from dpfast.learn.trainer import Trainer
from dpfast.parallel import ALONE, Ranks
from dpfast.pool.protocol import Pool
from dpfast.practice.background import WrittenCheckpoint
from dpfast.practice.callbacks import Addition, Callback, Progress
from dpfast.practice.checkpoint import STABLE, Checkpoint, of_round
from dpfast.practice.checkpointer import LoopCheckpointer, Moment
from dpfast.practice.disk import Needs, check_disk, checkpoint_bytes, samples_to_come
from dpfast.practice.loop_state import Component, LoopSeconds, LoopState
from dpfast.practice.losses import Losses
from dpfast.practice.patience import Patience, next_chance
from dpfast.practice.result import Result
from dpfast.practice.run_paths import RunPaths
from dpfast.practice.run_pool import new_pool, stored_shape
from dpfast.practice.saved_samples import SavedSamples
from dpfast.practice.stopping import CHECKPOINT, STOP, LossError, Stop, StopTogether
from dpfast.samples import SampleBatch
from dpfast.sources.costs import Cost, pruning_ratio
from dpfast.sources.source import RoundRequest, Source


class Loop:
    """One learner, one source, one pool. ``Loop(...).run(source)`` trains from scratch to the
    recipe's iterations.

    Models, losses and batches are on the pipeline's device. callbacks: told what happens, in their
    order. folder: where the state is kept; None: nowhere. stop: asked after every step and batch.
    ranks: run one loop each, in step: they make and hold their parts of the samples, train on their
    parts of the batches, and decide alike. new_learner: gives the initial learner, loader: what
    ``make_loader`` takes; None: the recipe's. class_counts: (K,), the recipe's targets, by which
    accuracies are told by shots as well. most: samples that the pool holds at most; None: the
    recipe's.
    """

    source: Source  # from ``run`` on

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        pipeline: Pipeline | OwnPipeline,
        real: RealData,
        *,
        sets: Sequence[EvaluationSet] = (),
        folder: RunPaths | None = None,
        callbacks: Sequence[Callback] = (),
        stop: Stop | None = None,
        ranks: Ranks = ALONE,
        new_learner: NewLearner | None = None,
        loader: str | Callable[..., Loader] | None = None,
        class_counts: Tensor | None = None,
        most: int | None = None,
    ) -> None:
        learner, practice = recipe.learner, recipe.practice
        self.recipe = recipe
        self.name = name
        self.ranks = ranks
        self.pipeline = pipeline
        self.real = real
        self.sets = sets
        self.class_counts = class_counts
        self.folder, self.callbacks = folder, callbacks
        self.stop = stop or Stop()
        self.stop_together = StopTogether(self.stop, ranks)
        self.interval = practice.interval(learner.batch_size)
        new_learner = new_learner or learner_factory(recipe, pipeline)
        self.trainer = Trainer(new_learner(), learner, iterations=practice.iterations, ranks=ranks)
        self.state = LoopState()
        self.shape = stored_shape(recipe, pipeline, real)
        pool = new_pool(
            recipe,
            pipeline,
            self.shape,
            ranks,
            None if folder is None else folder.path,
            most=most,
        )
        self.samples = SavedSamples(pool, self.state, folder, name, recipe, ranks)
        self.loader = make_loader(
            loader or learner.loader,
            self.pool,
            batch_size=learner.batch_size,
            seed=recipe.learner_seed,
            augment=Augment.of(learner),
            device=pipeline.device,
            classes=len(pipeline.class_names),
            fresh_weight=practice.fresh_weight,
            **({"groups": self._groups} if name == "mix" and practice.real_in_batch else {}),
        )
        self.losses = Losses(self.loader, pipeline.device, ranks)
        self.seconds = LoopSeconds(self.loader)
        self.grad_norm: float | None = None  # before the last evaluation
        self.patience = Patience(
            practice.patience, practice.initial_samples, practice.patience_growth
        )
        self.initial_cost = Cost()
        self.cost_before = Cost()  # the source's, before the pending round
        self.checkpointer = LoopCheckpointer(
            folder,
            self.samples,
            self._saved_components,
            practice,
            size=checkpoint_bytes(self.trainer.model),
            told=self._tell_checkpoint,
        )

    def _groups(self) -> tuple[int, float] | None:
        """Returns the groups from which the source wants samples to be drawn at this moment
        (``Source.drawn``).
        """
        return self.source.drawn(self.state.round)

    def components(self) -> dict[str, Component]:
        """Returns the parts of the loop that keep their own state, by name, in the order in which a
        checkpoint is taken and restored.
        """
        return {
            "state": self.state,
            "seconds": self.seconds,
            "trainer": self.trainer,
            "loader": self.loader,
            "losses": self.losses,
            "patience": self.patience,
            "source": self.source,
            "initial_cost": self.initial_cost,
            "cost_before": self.cost_before,
            "samples": self.samples,
        }

    @property
    def pool(self) -> Pool:
        """The pool that is trained on: the samples of all ranks."""
        return self.samples.pool

    @property
    def guide(self) -> nn.Module:
        """The live weights that guide, in the learner's precision."""
        return self.trainer.classifier(self.recipe.guidance.guide_with)

    @cached_property
    def guides(self) -> nn.Module:
        """The weights that guide: ``guide``, or for the criterion "disagreement" both weights,
        ``guide`` before the others.
        """
        other = "raw" if self.recipe.guidance.guide_with == "ema" else "ema"
        return guiding(self.recipe.guidance.criterion, self.guide, self.trainer.classifier(other))

    @property
    def evaluated(self) -> nn.Module:
        """The live weights whose accuracy counts, in the learner's precision."""
        return self.trainer.classifier(self.recipe.learner.evaluate_with)

    def run(self, source: Source, *, start: Checkpoint | None = None) -> Result:
        """Runs the loop, from a checkpoint on where there is one.

        Raises ``Stopped`` when the stop was requested, ``LossError`` when the loss is not finite.
        """
        self.source = source
        with contextlib.ExitStack() as stack:
            stack.callback(self.loader.close)
            stack.callback(self._tell, lambda callback, now: callback.on_end(now))
            stack.callback(source.close)
            if start is not None:
                self._restore(start)
            stack.enter_context(self.checkpointer.opened(self.pipeline.class_names))
            self._tell(lambda callback, now: callback.on_start(now))
            if start is None:
                self._save()
            self._practise()
            return self._finish()

    def _practise(self) -> None:
        """Runs Algorithm 1."""
        if self.state.pending:  # line 1: N unguided samples; or a round that was cut short
            self._check_disk()
            self._add_samples()
            self._save()
        while self._train():  # tau steps
            if self._stands_still():  # T >= T_max
                self._begin_round()
                self._save()
                self._check_disk()
                self._add_samples()  # P samples that the learner of this moment guides
                self._save()
            else:
                self.checkpointer.evaluated(self._moment())

    def _train(self) -> bool:
        """Trains up to the next evaluation; False when the iterations end before it."""
        with self.seconds.of("training"):
            if self._train_steps():
                return True
            self._check_loss()
        self._save(wait=self.stop.requested)
        self.stop.check()
        return False

    def _train_steps(self) -> bool:
        """Trains up to the next evaluation; False at the end of the iterations, or at a stop."""
        trainer = self.trainer
        at_once = trainer.device.type == "cpu" and self.ranks.alone
        self.stop_together.anew()
        while trainer.step_count < trainer.iterations:
            asked = self.stop_together.before(
                trainer.step_count, checkpoint=self.checkpointer.overdue
            )
            if asked == STOP:
                break
            if asked == CHECKPOINT:
                self._check_loss()
                self._save()
            loss = trainer.step(*next(self.loader))
            self.losses.add(loss, trainer.step_count)
            due = self._evaluates_at(trainer.step_count)
            if due or at_once:  # a step on a GPU must not wait for its loss
                self._check_loss()
            self.source.stepped(trainer.step_count, self._next_round)
            self._tell(lambda callback, now: callback.on_step(now))
            if due:
                return True
        return False

    def _evaluates_at(self, step: int) -> bool:
        """Returns True if the learner is evaluated after ``step`` steps: it always is before an
        addition.
        """
        moments = self.source.moments
        return step % self.interval == 0 or (moments is not None and step in moments)

    def _stands_still(self) -> bool:
        """Evaluates; True when samples are due."""
        state = self.state
        step = self.trainer.step_count
        steps = step - self.losses.step  # since the evaluation before
        with self.seconds.of("evaluation"):
            found = self._evaluate(self.real.validation)
            state.accuracy = found.top1
            state.per_class = found.per_class
            self.losses.anchor(step)
            self.grad_norm = self.trainer.grad_norm()
        # the count of evaluations without progress starts with the stable phase
        due = not self.trainer.warming and self.patience.update(found.top1, len(self.pool))
        loss = self.losses.mean(steps)
        self._tell(lambda callback, now: callback.on_evaluation(now, found, loss))
        if self.source.moments is not None:
            due = step in self.source.moments
        return due and self._next_round() is not None

    def _begin_round(self) -> None:
        """Marks the next round as pending: from here on a checkpoint leads into it."""
        self.state.pending = True
        self.state.round_start = len(self.pool)
        self.cost_before.load_state_dict(self.source.cost.state_dict())

    def _next_round(self) -> RoundRequest | None:
        """Returns the round that would be asked for at this moment; None where no more are
        added.
        """
        most = self.recipe.practice.maximum_rounds
        size = len(self.pool)
        enough = most is not None and self.state.additions >= most
        if enough or self._next_chance() is None or not self.source.available(size):
            return None
        return self._request(size)

    def _next_chance(self) -> int | None:
        """Returns the step after which a round may be due next; None where none will be."""
        step = self.trainer.step_count
        if self.state.frozen or self.trainer.cooling:
            return None
        added = step in self.state.moments[-1:]  # once after one step
        return next_chance(step + added, self.interval, self.source.moments)

    def _request(self, start: int) -> RoundRequest:
        """Returns the request to the source behind ``start`` samples."""
        source = self.source
        return RoundRequest(
            number=self.state.round + 1,
            start=start,
            count=source.available(start) if start else source.initial_samples,
            learner_step=self.trainer.step_count,
            per_class=self.state.per_class,
            turn=self.pool.turn,
        )

    def _add_samples(self) -> None:
        """Makes the pending round, or the rest of it."""
        request = self._request(self.state.round_start)
        with self._guiding():
            self._generate(request)
            addition = self._account(request)
        self._close_round(request)
        self.source.added(self._next_round())
        self._tell(lambda callback, now: callback.on_round(now, addition))

    def _generate(self, request: RoundRequest) -> None:
        """Appends this rank's samples of a round to the pool, as the source makes them."""
        source = self.source
        number = request.number
        local = self.pool.local
        part = self.ranks.share(request.count, self.recipe.generator.batch_size, turn=request.turn)
        made = len(local) - self.pool.held(request.start)
        self._tell(lambda callback, now: callback.on_generation(now, number, part, made))
        self._make_room()
        local.reserve(part - made)
        batches = source.make(request, made)
        if not isinstance(batches, Iterable):
            raise InputError(
                f"source {self.name!r}: make gives a {type(batches).__name__}, expected an "
                "iterator of SampleBatch"
            )
        stopping: contextlib.AbstractContextManager[None] = self.stop.at_once()
        if source.streams:
            batches = self.samples.noted(batches, source.state_dict, self.stop)
            stopping = contextlib.nullcontext()
        with stopping:
            for batch in batches:
                self._append(batch, number)
        held = len(local) - self.pool.held(request.start)
        if held != part:
            raise InputError(
                f"source {self.name!r}: round {number} has {held} samples, expected {part}"
            )
        self.pool.complete(request.count)
        source.cost.share(self.cost_before, self.ranks)
        source.release()  # before the yardstick is made

    def _append(self, batch: SampleBatch, number: int) -> None:
        """Adds a batch of round ``number`` to the pool."""
        if not isinstance(batch, SampleBatch):
            raise InputError(
                f"source {self.name!r}: make yields a {type(batch).__name__}, expected a "
                "SampleBatch"
            )
        self.ranks.beat()
        self.samples.append(
            batch,
            round=number,
            omega=self.source.omega_of(number, batch.labels),
            cfg_scale=self.source.cfg_scale(number),
            steps=self.source.steps(number),
        )
        self._tell(lambda callback, now: callback.on_samples(now, batch))

    def _account(self, request: RoundRequest) -> Addition:
        """Returns the account of a round whose samples are all in the pool."""
        cost = self.source.cost.since(self.cost_before)
        number = request.number
        addition = Addition(
            number=number,
            added=request.count,
            total=len(self.pool),
            cost=cost,
            omega=self.source.omega(number),
        )
        if not number or self.source.yardstick is None:
            return addition
        hard = float(self.pool.column("entropy", request.start).mean())
        easy = self.source.yardstick.entropies(self.guide)
        return replace(
            addition,
            entropy=hard,
            unguided_entropy=float(easy.mean()),
            pruning_ratio=pruning_ratio(easy, hard),
        )

    def _close_round(self, request: RoundRequest) -> None:
        """Makes a round part of the loop's state; its samples are saved from here on."""
        state = self.state
        self._make_room()
        self.samples.save()
        if request.number:
            self.patience.added()
            state.moments.append(self.trainer.step_count)
        else:
            self.initial_cost.load_state_dict(self.source.cost.state_dict())
        state.round, state.pending = request.number, False
        state.rounds.append(request.count)

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

    @contextlib.contextmanager
    def _guiding(self) -> Iterator[None]:
        """Puts the learner into eval mode within a ``with`` block, so that it can guide."""
        model = self.trainer.model  # the EMA never trains
        training = model.training
        self.guides.eval()
        try:
            yield
        finally:
            model.train(training)

    def _check_loss(self) -> None:
        bad = self.losses.bad()
        if not bad:
            return
        ids = ", ".join(map(str, self.losses.samples_of(bad)))
        saved = self.checkpointer.newest()
        kept = f"the last good checkpoint is {saved}" if saved else "there is no checkpoint"
        raise LossError(
            f"{self.name}: the loss is not finite at iteration {bad}, on the samples {ids}; {kept}"
        )

    def _check_disk(self) -> None:
        """Raises ``InputError`` where the disk has no room: before the first sample for all that
        is to come, before a later round for that.
        """
        if self.folder is None:
            return
        first = self.state.round < 0
        needs = None
        if self.folder.writes:
            count = self.source.available(self.state.round_start)
            if first:
                practice = self.recipe.practice
                count = samples_to_come(self.source, practice, self.state, len(self.pool))
            needs = Needs.of(
                self.recipe,
                self.pool,
                self.shape,
                count,
                scratch=self._scratch(),
                saved=self.samples.shards,
                checkpoint=self.checkpointer.size,
                checkpoints=self.folder.checkpoints(self.name),
            )
        when = "the run" if first else f"round {self.state.round + 1}"
        check_disk(self.ranks, needs, self.folder.path, when)

    def _scratch(self) -> int:
        """Returns bytes that the largest round to come takes of the disk while it is made."""
        later = self.source.available(self.state.round_start or self.source.initial_samples)
        return self.source.scratch(later)

    def _save(self, *, wait: bool = False) -> None:
        """Begins a checkpoint of this moment; ``wait``: and ends it."""
        self.checkpointer.save(self._moment(), wait=wait)

    def _moment(self) -> Moment:
        """Returns this moment, with the label of a checkpoint that is kept for good: before an
        addition where the recipe keeps rounds, and the last one before the cool-down, from which a
        run can be made longer.
        """
        trainer = self.trainer
        state = self.state
        label = None
        after = trainer.step_count + self.interval
        if trainer.step_count % self.interval == 0 and not trainer.cooling:
            label = STABLE if trainer.cooling_at(after) else None
        if self.recipe.practice.keep_rounds and state.pending and state.round >= 0:
            label = of_round(state.round)
        return Moment(trainer.step_count, trainer.iterations, label, state.pending)

    def _saved_components(self) -> dict[str, Component]:
        """Returns the components that a checkpoint holds: the loop's parts, and how far the lines
        of the run's files go, which loops share.
        """
        assert self.folder is not None
        return {**self.components(), "folder": self.folder}

    def _restore(self, start: Checkpoint) -> None:
        """Puts the loop where the checkpoint was taken; what follows equals the whole run bit by
        bit on a CPU.
        """
        for name, component in self.components().items():
            component.load_state_dict(start.components[name])
        if self.samples.within_round is not None:
            self.source.load_state_dict(self.samples.within_round["source"])
        self.loader.pool = self.pool

    def _evaluate(self, real: RealSet) -> Evaluation:
        """Returns the measures of the learner on a set of real images, of which each rank has its
        part.
        """
        found = evaluate(self.evaluated, real.images, real.labels, self.ranks)
        if self.class_counts is None:
            return found
        return replace(found, shots=by_shots(found.per_class, self.class_counts))

    def _finish(self) -> Result:
        """Evaluates the learner on all sets, tells the result and saves the end."""
        seconds = self.seconds
        with self.stop.at_once():
            result = Result(
                source=self.name,
                pool=self.pool,
                learner=self.trainer.weights(self.recipe.learner.evaluate_with),
                validation=self._evaluate(self.real.validation),
                test=self._evaluate(self.real.test),
                iterations=self.trainer.step_count,
                additions=self.state.additions,
                initial_cost=self.initial_cost,
                cost=self.source.cost,
                training_seconds=seconds.training,
                evaluation_seconds=seconds.evaluation,
                loader_wait=seconds.waiting / max(seconds.training - seconds.waiting, 1e-9),
                sets=tuple(evaluate_sets(self.evaluated, self.sets, self.ranks)),
            )
        if not self.state.finished:
            self._tell(lambda callback, now: callback.on_result(now, result))
            self.state.finished = True
            self._save(wait=True)
        return result

    def progress(self) -> Progress:
        """Returns the state of the loop, for those who watch it."""
        size = len(self.pool)
        return Progress(
            source=self.name,
            rank=self.ranks.rank,
            step=self.trainer.step_count,
            iterations=self.trainer.iterations,
            pool_size=size,
            round=self.state.round,
            waited=self.patience.waited,
            patience=self.patience.limit(size) if self.source.moments is None else None,
            next_round=None if self.source.moments is None else self._next_chance(),
            accuracy=self.state.accuracy,
            lr=self.trainer.newest_rate,
            grad_norm=self.grad_norm,
            training_seconds=self.seconds.training,
            evaluation_seconds=self.seconds.evaluation,
            waiting_seconds=self.seconds.waiting,
        )

    def _tell(self, event: Callable[[Callback, Progress], None]) -> None:
        """Tells an event to all callbacks, in their order."""
        now = self.progress() if self.callbacks else None
        for callback in self.callbacks:
            assert now is not None
            event(callback, now)

    def _tell_checkpoint(self, written: WrittenCheckpoint) -> None:
        self.source.checkpointed(written.step, pending=written.pending)
        self._tell(lambda callback, now: callback.on_checkpoint(now, written))
