"""Algorithm 1 of arXiv 2502.15588: train until the validation accuracy stands still, make harder samples, go on."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dpfast.config import Recipe, RecipeError
from dpfast.data.real import RealData, load_real
from dpfast.feed.augment import Augment
from dpfast.feed.loader import choose, make_loader
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import SampleBatch
from dpfast.learn.evaluate import Evaluation, evaluate, predict
from dpfast.learn.models import build_learner
from dpfast.learn.trainer import Trainer
from dpfast.ops import entropy
from dpfast.pool.pool import SamplePool
from dpfast.pool.saver import Saver, SaveWarning
from dpfast.pool.shards import DamagedPoolError
from dpfast.practice import checkpoint
from dpfast.practice.patience import Patience
from dpfast.practice.run_folder import RunFolder
from dpfast.practice.sources import (
    PROBE_IDS,
    DeliberatePracticeSource,
    Source,
    StaticSource,
    balanced_labels,
    new_sampler,
)

PROBE_SAMPLES = 250


@dataclass(frozen=True)
class Result:
    """One source's outcome: the pool it trained on and its accuracy on the two real sets, EMA weights."""

    source: str
    pool: SamplePool
    learner: nn.Module
    validation: Evaluation
    test: Evaluation
    iterations: int
    additions: int
    initial_seconds: float  # of the generation, the part before training
    generation_seconds: float
    training_seconds: float
    loader_wait: float  # time spent waiting for batches over the time of the learner's steps


class Loop:
    """One learner, one source, one pool. ``Loop(...).run()`` trains from scratch to the recipe's iterations.

    Validation is evaluated with the EMA weights; they are also the ones that guide, unless ``guide_with`` says "raw".
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        pipeline: Pipeline,
        real: RealData,
        folder: RunFolder | None,
        *,
        progress: bool = True,
    ) -> None:
        self.recipe, self.name, self.pipeline, self.real, self.folder = recipe, name, pipeline, real, folder
        self.progress = progress
        config = recipe.learner
        self.trainer = Trainer(new_learner(recipe, pipeline), config, iterations=recipe.practice.iterations)
        self.pool = SamplePool()
        self.loader = make_loader(
            config.loader,
            self.pool,
            batch_size=config.batch_size,
            seed=recipe.seed,
            augment=Augment(
                flip=config.flip, shift=config.shift, crop=config.crop, mixup=config.mixup, cutmix=config.cutmix
            ),
            classes=pipeline.denoiser.classes,
        )
        self.patience = Patience(
            initial=recipe.practice.patience,
            initial_samples=recipe.practice.initial_samples,
            growth=recipe.practice.patience_growth,
        )
        self.additions = 0
        self.generation_seconds = self.initial_seconds = 0.0
        self.saver: Saver | None = None

    @property
    def guide(self) -> nn.Module:
        """The live weights that guide; the raw model switches to eval mode while it does."""
        return self.trainer.ema if self.recipe.guidance.guide_with == "ema" else self.trainer.model

    def run(self, source: Source, probe: SampleBatch) -> Result:
        """Runs the loop. ``probe``: unguided samples outside every pool, the yardstick for the entropy of new ones."""
        with contextlib.closing(self.loader):
            if self.folder is None:
                return self._run(source, probe)
            names = self.pipeline.class_names
            with Saver(self.pool, self.folder.pool(self.name), classes=names, truncate=True) as self.saver:
                return self._run(source, probe)

    def _run(self, source: Source, probe: SampleBatch) -> Result:
        practice, trainer = self.recipe.practice, self.trainer
        if not len(self.pool):
            self._add(source.initial(), source.initial_samples, omega=0.0, label=f"{self.name}: initial samples")
            self.initial_seconds = self.generation_seconds
        started, generated = time.perf_counter(), self.generation_seconds
        stepping, waited = 0.0, self.loader.waited
        loss_sum = torch.zeros(())
        with self._bar(practice.iterations, "it", f"{self.name}: training") as bar:
            bar.update(trainer.step_count)
            while trainer.step_count < practice.iterations:
                images, labels = next(self.loader)
                step_started = time.perf_counter()
                loss_sum += trainer.step(images, labels)
                stepping += time.perf_counter() - step_started
                bar.update()
                if trainer.step_count % practice.evaluate_every:
                    continue
                accuracy = self._evaluate(float(loss_sum) / practice.evaluate_every)
                loss_sum.zero_()
                # the count of evaluations without progress starts with the stable phase
                due = not trainer.warming and self.patience.update(accuracy, len(self.pool))
                if due and source.available(len(self.pool)) and not trainer.cooling:
                    self._practice(source, probe)
                self._save()
        training = time.perf_counter() - started - (self.generation_seconds - generated)
        share = (self.loader.waited - waited) / max(stepping, 1e-9)
        self._time("training", seconds=training, steps_per_second=practice.iterations / training, loader_wait=share)
        return self._result(training, share)

    def _evaluate(self, loss: float) -> float:
        result = evaluate(self.trainer.ema, self.real.validation.images, self.real.validation.labels)
        step, size = self.trainer.step_count, len(self.pool)
        self._log(
            "evaluation",
            accuracy=result.top1,
            loss=loss,
            validation_loss=result.loss,
            entropy=result.entropy,
            samples=size,
        )
        waited = f"{self.patience.waited}/{self.patience.limit(size)}"
        self._say(
            f"{self.name:>6} | iteration {step:5d} | pool {size:6d} | validation accuracy {result.top1:6.2%} | "
            f"training loss {loss:.3f} | waited {waited}"
        )
        return result.top1

    def _practice(self, source: Source, probe: SampleBatch) -> None:
        before, step, guide = len(self.pool), self.trainer.step_count, self.guide
        training = guide.training
        guide.eval()
        self.additions += 1
        omega, label = self.recipe.guidance.omega, f"{self.name}: round {self.additions}"
        self._add(source.more(before, step), source.available(before), omega=omega, label=label)
        hard = float(self.pool.column("entropy")[before:].mean())
        easy = float(entropy(predict(guide, probe.images)).mean())
        guide.train(training)
        self.patience.reset()
        self._log("addition", round=self.additions, samples=len(self.pool), entropy=hard, unguided_entropy=easy)
        self._say(
            f"{self.name:>6} | round {self.additions:2d} at iteration {step} | pool {before} -> {len(self.pool)} | "
            f"mean entropy of the new samples {hard:.3f} nats, of unguided ones {easy:.3f}"
        )

    def _add(self, batches: Iterable[SampleBatch], total: int, *, omega: float, label: str) -> None:
        started = time.perf_counter()
        with self._bar(total, "sample", label) as bar:
            for batch in batches:
                self.pool.append(
                    batch,
                    round=self.additions,
                    omega=omega,
                    cfg_scale=self.recipe.generator.cfg_scale,
                    steps=self.recipe.generator.steps,
                    seed=self.recipe.seed,
                )
                bar.update(len(batch))
        if self.saver is not None:
            self.saver.save()
        seconds = time.perf_counter() - started
        self.generation_seconds += seconds
        self._time("generation", seconds=seconds, samples=total, samples_per_second=total / seconds)

    def _result(self, training_seconds: float, loader_wait: float) -> Result:
        real = self.real
        result = Result(
            source=self.name,
            pool=self.pool,
            learner=self.trainer.ema,
            validation=evaluate(self.trainer.ema, real.validation.images, real.validation.labels),
            test=evaluate(self.trainer.ema, real.test.images, real.test.labels),
            iterations=self.trainer.step_count,
            additions=self.additions,
            initial_seconds=self.initial_seconds,
            generation_seconds=self.generation_seconds,
            training_seconds=training_seconds,
            loader_wait=loader_wait,
        )
        self._log(
            "result",
            samples=len(self.pool),
            additions=self.additions,
            validation_accuracy=result.validation.top1,
            test_accuracy=result.test.top1,
            test_per_class=[round(float(v), 6) for v in result.test.per_class],
        )
        if self.folder is not None:
            self.folder.save_learner(self.name, self.trainer.ema.module)
        return result

    def _save(self) -> None:
        if self.folder is None:
            return
        if self.saver is not None and self.saver.wait() < len(self.pool):
            self.saver.save()  # a checkpoint must not promise samples that are not on the disk: try again
            return
        state = {
            "samples": len(self.pool),
            "loader": self.loader.state(),
            "patience": [self.patience.best, self.patience.waited],
            "additions": self.additions,
            "seconds": [self.initial_seconds, self.generation_seconds],
            "written": self.folder.written(),
        }
        tensors = checkpoint.prefixed("trainer", self.trainer.state())
        try:
            checkpoint.save(self.folder.checkpoint(self.name), tensors, state)
        except OSError as error:
            warnings.warn(f"the checkpoint was not written: {error}; training goes on", SaveWarning, stacklevel=2)

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continues from a checkpoint; what follows equals the uninterrupted run bit by bit on a CPU."""
        self.trainer.restore(checkpoint.part("trainer", tensors))
        assert self.folder is not None
        try:
            self.pool = self.loader.pool = SamplePool.open(self.folder.pool(self.name), limit=state["samples"])
        except DamagedPoolError as error:
            raise RecipeError(f"resume: {error}") from error
        self.loader.restore(state["loader"])
        self.patience.best, self.patience.waited = state["patience"]
        self.additions = state["additions"]
        self.initial_seconds, self.generation_seconds = state["seconds"]

    def _bar(self, total: int, unit: str, label: str) -> tqdm:
        return tqdm(total=total, unit=unit, desc=label, disable=not self.progress, leave=False, dynamic_ncols=True)

    def _log(self, event: str, **values: Any) -> None:
        if self.folder is not None:
            self.folder.log(event, self.name, self.trainer.step_count, **values)

    def _time(self, event: str, **values: Any) -> None:
        if self.folder is not None:
            self.folder.time(event, self.name, self.trainer.step_count, **values)

    def _say(self, line: str) -> None:
        if self.progress:
            tqdm.write(line)


class DeliberatePractice:
    """The sources of a recipe, one after the other, over one generator and one set of real images.

        results = DeliberatePractice(Recipe.load("fashion")).run()

    Deliberate Practice runs first; a static run gets as many samples as it ended with, and as many iterations.

    Raises ``RecipeError`` from the constructor when the recipe, the generator and the real images do not fit together.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.pipeline = Pipeline.from_pretrained(recipe.generator.pipeline, attention=recipe.generator.attention)
        self.real = load_real(recipe.validation)
        self._check()
        SamplePool.plan(recipe.practice.maximum_samples, self.real.validation.images.shape[1:]).check()

    def _check(self) -> None:
        practice, classes = self.recipe.practice, self.pipeline.denoiser.classes
        for name in ("initial_samples", "round_samples"):
            if getattr(practice, name) < classes:
                raise RecipeError(f"{name} = {getattr(practice, name)}: at least one for each of {classes} classes")
        if len(self.real.classes) != classes:
            raise RecipeError(
                f"validation = {self.recipe.validation!r}: {len(self.real.classes)} classes, "
                f"the generator has {classes}"
            )
        if self.recipe.learner.classes not in (None, classes):
            raise RecipeError(
                f"classes = {self.recipe.learner.classes}: the learner needs the generator's {classes} classes"
            )
        choose(self.recipe.learner.loader)
        learner = new_learner(self.recipe, self.pipeline)
        shape = tuple(predict(learner, self.real.validation.images[:2]).shape)
        if shape != (2, classes):
            raise RecipeError(
                f"model = {self.recipe.learner.model!r}: its logits are {shape} for 2 images, expected (2, {classes})"
            )

    def run(self, folder: RunFolder | None = None, *, progress: bool = True) -> list[Result]:
        """Runs all sources; "dp" comes first. Nothing is written without a ``folder``."""
        recipe = self.recipe
        classes = self.pipeline.denoiser.classes
        probe = new_sampler(recipe, self.pipeline, None).generate(
            balanced_labels(0, PROBE_SAMPLES, classes), torch.arange(PROBE_IDS, PROBE_IDS + PROBE_SAMPLES)
        )
        practised: Result | None = None
        results = []
        for name in sorted(recipe.practice.sources, key=("dp", "static").index):
            loop = Loop(recipe, name, self.pipeline, self.real, folder, progress=progress)
            if folder is not None and folder.checkpoint(name).is_file():
                tensors, state = checkpoint.load(folder.checkpoint(name))
                loop.restore(tensors, state)
                if name == folder.resumed():
                    folder.rewind(state["written"])
                else:
                    loop.folder = None  # finished before the interruption: its lines stand
            if name == "dp":
                results.append(loop.run(DeliberatePracticeSource(recipe, self.pipeline, loop.guide), probe))
                practised = results[0]
            elif practised is None:
                results.append(loop.run(StaticSource(recipe, self.pipeline, recipe.practice.maximum_samples), probe))
            else:
                if not len(loop.pool):
                    loop.generation_seconds = (
                        practised.initial_seconds
                    )  # its first samples are taken over, at their price
                source = StaticSource(recipe, self.pipeline, len(practised.pool), ready=_unguided(practised.pool))
                results.append(loop.run(source, probe))
        return results


def new_learner(recipe: Recipe, pipeline: Pipeline) -> nn.Module:
    """The recipe's classifier, initialised from its seed."""
    torch.manual_seed(recipe.seed)
    return build_learner(
        recipe.learner.model,
        classes=pipeline.denoiser.classes,
        channels=pipeline.image_channels,
        **recipe.learner.options,
    )


def _unguided(pool: SamplePool) -> SampleBatch:
    """The initial samples of a pool: the static source would make the same ones again."""
    rows = torch.nonzero(pool.column("round") == 0).flatten()
    return SampleBatch(
        images=pool.images(rows),
        labels=pool.column("label")[rows],
        sample_ids=pool.column("sample_id")[rows],
        entropy=pool.column("entropy")[rows],
    )
