"""The sources of a recipe side by side: one generator, one set of real images, one table."""

from __future__ import annotations

from collections.abc import Sequence

from dpfast.config import SOURCES, Recipe, RecipeError
from dpfast.data.real import check_real, load_real
from dpfast.device import device_named
from dpfast.evaluate.measures import predict
from dpfast.evaluate.sets import evaluation_sets
from dpfast.feed.loader import choose
from dpfast.generate.recipes import check_generator, image_shape, load_pipeline
from dpfast.pool.plan import plan_recipe
from dpfast.practice import checkpoint
from dpfast.practice.callbacks import Callback, Console
from dpfast.practice.guided import check_way
from dpfast.practice.learners import new_learner
from dpfast.practice.loop import Loop, stored_shape
from dpfast.practice.result import Result
from dpfast.practice.run_folder import RunFolder
from dpfast.practice.sources import DeliberatePracticeSource, DynamicSource, PruneSource, Source, StaticSource, Unguided
from dpfast.practice.stopping import Stop


class DeliberatePractice:
    """The sources of a recipe, one after the other, over one generator and one set of real images.

        results = DeliberatePractice(Recipe.load("fashion")).run()

    Deliberate Practice runs first. Its rivals then get as many samples as it ended with and as many iterations, those
    with rounds at the same moments. Without it they go by the recipe: the maximum of samples, their own patience.

    unguided: samples that exist already (``Unguided.remember``), for experiments that share a generator and a seed.

    Raises ``RecipeError`` from the constructor when the recipe, the generator and the real images do not fit together.
    """

    def __init__(self, recipe: Recipe, *, unguided: Unguided | None = None) -> None:
        self.recipe = recipe
        names = check_generator(recipe.generator) if unguided is None else unguided.sampler.pipeline.class_names
        check_real(recipe.validation, recipe.held_out, names)
        self.pipeline = (
            load_pipeline(recipe.generator, device=device_named(recipe.device))
            if unguided is None
            else unguided.sampler.pipeline
        )
        self.real = load_real(
            recipe.validation,
            held_out=recipe.held_out,
            classes=self.pipeline.class_names,
            shape=image_shape(self.pipeline),
        )
        self.sets = evaluation_sets(recipe.evaluation, self.real.test, self.real.classes, seed=recipe.seed)
        self._check()
        if not recipe.pool.mapped:  # the disk of mapped files is known with the folder; the loop looks before any work
            shape = stored_shape(recipe, self.pipeline, self.real)
            plan_recipe(recipe.pool, recipe.practice.maximum_samples, shape, device=self.pipeline.device)
        self.unguided = unguided or Unguided(recipe, self.pipeline)

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
        choose(self.recipe.learner.loader, self.recipe.pool.codec)
        if "dp" in practice.sources:
            check_way(self.recipe, self.pipeline)
        learner = new_learner(self.recipe, self.pipeline)
        shape = tuple(predict(learner, self.real.validation.images[:2]).shape)
        if shape != (2, classes):
            raise RecipeError(
                f"model = {self.recipe.learner.model!r}: its logits are {shape} for 2 images, expected (2, {classes})"
            )

    def run(
        self,
        folder: RunFolder | None = None,
        *,
        progress: bool = True,
        callbacks: Sequence[Callback] = (),
        stop: Stop | None = None,
    ) -> list[Result]:
        """Runs all sources. Nothing is written without a ``folder``; one that holds a run's state is continued.

        Raises ``Stopped`` after a stop was requested and ``LossError`` when a loss is not finite.
        """
        names = [name for name in SOURCES if name in self.recipe.practice.sources]
        starts = {n: None if folder is None else checkpoint.latest(folder.checkpoints(n)) for n in names}
        begun = [name for name in names if starts[name] is not None]
        if folder is not None:
            newest = starts[begun[-1]] if begun else None
            folder.rewind(newest.state["written"] if newest is not None else [0, 0])
        told = [*callbacks, *([Console()] if progress else [])]
        results: list[Result] = []
        practised: Loop | None = None
        for name in names:
            written = [folder] if folder is not None else []
            loop = Loop(
                self.recipe,
                name,
                self.pipeline,
                self.real,
                sets=self.sets,
                folder=folder,
                callbacks=[*written, *told],
                stop=stop,
            )
            result = loop.run(self._source(name, loop, practised), start=starts[name])
            self.unguided.remember(result.pool, result.initial_cost)
            results.append(result)
            if name == "dp":
                practised = loop
        return results

    def _source(self, name: str, loop: Loop, practised: Loop | None) -> Source:
        recipe, unguided = self.recipe, self.unguided
        if name == "dp":
            return DeliberatePracticeSource(
                recipe, self.pipeline, unguided, loop.guide, guides=loop.guides, pool=lambda: loop.pool
            )
        if name == "static":
            total = recipe.practice.maximum_samples if practised is None else len(practised.pool)
            return StaticSource(recipe, unguided, total)
        kind = {"prune": PruneSource, "dynamic": DynamicSource}[name]
        return kind(
            recipe, unguided, loop.guide, moments=None if practised is None else frozenset(practised.state.moments)
        )
