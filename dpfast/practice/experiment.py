"""The sources of a recipe side by side: one generator, one set of real images, one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpfast.config import SOURCES, Recipe
from dpfast.data.real import check_real, load_real
from dpfast.errors import InputError, RecipeError
from dpfast.evaluate.measures import predict
from dpfast.evaluate.sets import evaluation_sets
from dpfast.feed import choose_loader
from dpfast.generate.from_recipe import check_generator, image_shape, load_pipeline
from dpfast.hardware.device import device_named
from dpfast.learn.models import new_learner
from dpfast.parallel import ALONE, Ranks
from dpfast.pool.placement import Placement
from dpfast.practice import checkpoint
from dpfast.practice.callbacks import Callback, Console
from dpfast.practice.checkpoint import Checkpoint
from dpfast.practice.fitted import fit_run
from dpfast.practice.loop import Loop
from dpfast.practice.overlap import GeneratorRank, OverlapGroups, OverlappedSource
from dpfast.practice.result import Result
from dpfast.practice.run_paths import RunPaths
from dpfast.practice.run_pool import placement, stored_shape
from dpfast.practice.stopping import Stop
from dpfast.practice.throughput import Throughput
from dpfast.sources.deliberate_practice import DeliberatePracticeSource
from dpfast.sources.dynamic import DynamicSource
from dpfast.sources.guided_methods import check_guided_method
from dpfast.sources.prune import PruneSource
from dpfast.sources.source import Source
from dpfast.sources.static import StaticSource
from dpfast.sources.unguided import UnguidedSamples


class DeliberatePractice:
    """The sources of a recipe, one after the other, over one generator and one set of real images.

        results = DeliberatePractice(Recipe.load("fashion")).run()

    Deliberate Practice runs first. Its rivals then get as many samples as it ended with and as many
    iterations, those with rounds at the same moments. Without it they go by the recipe: the maximum
    of samples, their own patience.

    unguided: samples that exist already (``UnguidedSamples.remember``), for experiments that share
    a generator and a seed.
    ranks: every rank of a run makes this object and calls ``run``, with the same arguments. With
    the recipe's ``overlap`` the last ones only generate, and ``ranks`` are then the others.

    Raises ``RecipeError`` from the constructor when the recipe, the generator and the real images
    do not fit together.
    """

    def __init__(
        self, recipe: Recipe, *, unguided: UnguidedSamples | None = None, ranks: Ranks = ALONE
    ) -> None:
        practice = recipe.practice
        recipe.check_ranks(ranks.size)
        self.link = OverlapGroups.of(ranks, practice.overlap) if practice.overlap else None
        ranks = ranks if self.link is None else self.link.trainers
        self.recipe, self.ranks = recipe, ranks
        recipe.need_folders(*(["pipeline"] if unguided is None else []), "validation")
        names = (
            check_generator(recipe.generator)
            if unguided is None
            else unguided.sampler.pipeline.class_names
        )
        check_real(recipe.validation, recipe.held_out, names)
        ranks.beat()
        self.pipeline = (
            load_pipeline(
                recipe.generator,
                device=device_named(recipe.device, rank=ranks.local_rank, ranks=ranks.size),
            )
            if unguided is None
            else unguided.sampler.pipeline
        )
        ranks.beat()
        self.real = load_real(
            recipe.validation,
            held_out=recipe.held_out,
            classes=self.pipeline.class_names,
            shape=image_shape(self.pipeline),
            ranks=ranks,
        )
        self.sets = evaluation_sets(
            recipe.evaluation, self.real.test, self.real.classes, seed=recipe.seed
        )
        ranks.beat()
        self._check()
        ranks.beat()
        self.fit = fit_run(recipe, self.pipeline, ranks, together=self.link is None)
        self.recipe = recipe = recipe if self.fit is None else self.fit.recipe
        ranks.beat()
        if (
            not recipe.pool.mapped
        ):  # the disk of mapped files is known with the folder; the loop looks before any work
            self.place_pool()
        self.unguided = unguided or UnguidedSamples(recipe, self.pipeline, ranks)
        self.loop: Loop | None = None  # the one that runs, or ran last

    def place_pool(self, out: Path | None = None) -> Placement:
        """Where a rank's samples will lie. Raises ``RecipeError`` where they have no place, as the
        run does.

        out: the run's folder, on whose disk mapped files lie; it need not be there yet.
        """
        shape = stored_shape(self.recipe, self.pipeline, self.real)
        return placement(self.recipe, self.pipeline, shape, self.ranks, out)

    def _check(self) -> None:
        practice, classes = self.recipe.practice, self.pipeline.denoiser.classes
        for name in ("initial_samples", "round_samples"):
            if getattr(practice, name) < classes:
                raise RecipeError(
                    f"{name} = {getattr(practice, name)}: expected at least one for each of "
                    f"{classes} classes"
                )
        if len(self.real.classes) != classes:
            raise RecipeError(
                f"validation = {self.recipe.validation!r}: {len(self.real.classes)} classes, "
                f"the generator has {classes}"
            )
        if self.recipe.learner.classes not in (None, classes):
            raise RecipeError(
                f"classes = {self.recipe.learner.classes}: the learner needs the generator's "
                f"{classes} classes"
            )
        choose_loader(self.recipe.learner.loader, self.recipe.pool.codec)
        if "dp" in practice.sources:
            check_guided_method(self.recipe, self.pipeline)
        learner, images = new_learner(self.recipe, self.pipeline), self.real.validation.images
        shape = tuple(
            predict(learner, images.new_zeros(2, *images.shape[1:])).shape
        )  # a rank may have no image
        if shape != (2, classes):
            raise RecipeError(
                f"model = {self.recipe.learner.model!r}: its logits are {shape} for 2 images, "
                f"expected (2, {classes})"
            )

    def run(
        self,
        folder: RunPaths | None = None,
        *,
        progress: bool = True,
        callbacks: Sequence[Callback] = (),
        stop: Stop | None = None,
    ) -> list[Result]:
        """Runs all sources. Nothing is written without a ``folder``; one that holds a run's state
        is continued.

        folder: of several ranks the first one has a ``RunWriter``, the others its ``RunPaths``.
        A rank that only generates returns no results.
        Raises ``Stopped`` after a stop was requested and ``LossError`` when a loss is not finite.
        """
        names = [name for name in SOURCES if name in self.recipe.practice.sources]
        if self.link is not None and self.link.generates:
            if "dp" in names:
                GeneratorRank(self.recipe, self.pipeline, self.link, stop or Stop()).serve()
            return []
        starts = {name: self._start(folder, name) for name in names}
        begun = [name for name in names if starts[name] is not None]
        newest = starts[begun[-1]] if begun else None
        if folder is not None:  # all loops write into the same files
            folder.load_state_dict({} if newest is None else newest.components["folder"])
        told = [*callbacks, *([Console()] if progress and self.ranks.first else [])]
        if folder is not None:
            image = tuple(self.real.validation.images.shape[1:])
            told = [*folder.watchers(Throughput(self.recipe, self.pipeline, image)), *told]
        results: list[Result] = []
        practised: Loop | None = None
        for name in names:
            loop = Loop(
                self.recipe,
                name,
                self.pipeline,
                self.real,
                sets=self.sets,
                folder=folder,
                callbacks=told,
                stop=stop,
                ranks=self.ranks,
            )
            self.loop = loop
            source = self._source(name, loop, practised)
            result = loop.run(source, start=starts[name])
            if (
                self.recipe.pool.save_samples != "jpeg"
            ):  # the pool has what is left of the images that were made
                self.unguided.remember(loop.pool.local, result.initial_cost)
            results.append(result)
            if name == "dp":
                practised = loop
        return results

    def _start(self, folder: RunPaths | None, name: str) -> Checkpoint | None:
        """The newest checkpoint of a source, the same one on every rank: that of the first."""
        if folder is None:
            return None
        with self.ranks.all_or_none():
            newest = self._newest(folder.checkpoints(name), name) if self.ranks.first else None
        path = self.ranks.broadcast_object(None if newest is None else str(newest.path))
        return newest if newest is not None or path is None else checkpoint.load(Path(path))

    def _newest(self, folder: Path, name: str) -> Checkpoint | None:
        """Where a source goes on. After the iterations have grown the first one goes on before the
        old cool-down, and
        its rivals, which take their sizes and moments from it, begin anew."""
        newest, practice = checkpoint.latest(folder), self.recipe.practice
        if newest is None or newest.iterations == practice.iterations:
            return newest
        if name != next(source for source in SOURCES if source in practice.sources):
            return None
        before = newest.iterations
        if newest.step < before - self.recipe.learner.cooldown * before:
            return newest
        kept = checkpoint.stable(folder)
        if kept is None:
            raise RecipeError(
                f"iterations = {practice.iterations} was {before}: the run has begun its "
                "cool-down, and kept no "
                "checkpoint before it"
            )
        try:
            return checkpoint.load(kept)
        except InputError as error:
            raise RecipeError(
                f"iterations = {practice.iterations} was {before}: {error}"
            ) from error

    def _source(self, name: str, loop: Loop, practised: Loop | None) -> Source:
        recipe, unguided = self.recipe, self.unguided
        if name == "dp":
            source = DeliberatePracticeSource(
                recipe,
                self.pipeline,
                unguided,
                loop.guide,
                guides=loop.guides,
                pool=lambda: loop.pool.local,
            )
            return source if self.link is None else OverlappedSource(source, loop.guides, self.link)
        if name == "static":
            total = recipe.practice.maximum_samples if practised is None else len(practised.pool)
            return StaticSource(recipe, unguided, total)
        kind = {"prune": PruneSource, "dynamic": DynamicSource}[name]
        return kind(
            recipe,
            unguided,
            loop.guide,
            moments=None if practised is None else frozenset(practised.state.moments),
        )
