"""The sources of a recipe side by side: one generator, one set of real images, one table.

Every part comes from the recipe, or is an object of the caller's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.config import READ, SOURCES, Recipe, SourceName, is_import_path, kind_of, made
from dpfast.config.imported import FORM
from dpfast.config.kinds import ImportPath
from dpfast.data.class_counts import class_counts
from dpfast.data.real import Given, RealData, check_apart, check_real, given_real, load_real
from dpfast.errors import InputError, RecipeError
from dpfast.evaluate.sets import evaluation_sets
from dpfast.feed import check_groups, choose_loader
from dpfast.feed.loader import Loader
from dpfast.feed.own_augment import augment_at, try_augment
from dpfast.generate import criteria
from dpfast.generate.criteria import Criterion
from dpfast.generate.from_recipe import (
    check_generator,
    decoder_of_run,
    fetched,
    load_pipeline,
)
from dpfast.generate.guidance import LearnerPath
from dpfast.generate.models.decoder import IdentityDecoder
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.preflight import try_criterion, try_learner
from dpfast.generate.protocol import OwnPipeline, check_pipeline
from dpfast.hardware.device import device_named, is_gpu
from dpfast.learn.models import NewLearner, guiding, learner_factory
from dpfast.learn.pretrained import as_kept
from dpfast.parallel import ALONE, Ranks
from dpfast.planning.without_generator import without_generator
from dpfast.pool.placement import Placement
from dpfast.pool.stored import Stored, open_stored
from dpfast.practice import checkpoint
from dpfast.practice.callbacks import Callback, Console
from dpfast.practice.checkpoint import Checkpoint
from dpfast.practice.contents import contents_of
from dpfast.practice.fitted import fit_run
from dpfast.practice.loop import Loop
from dpfast.practice.overlap import GeneratorRank, OverlapGroups, OverlappedSource
from dpfast.practice.preflight import LearnerTrial, trial_rows
from dpfast.practice.result import Result
from dpfast.practice.run_paths import RunPaths
from dpfast.practice.run_pool import placement, stored_shape
from dpfast.practice.run_writer import RunWriter
from dpfast.practice.stopping import Stop
from dpfast.practice.throughput import Throughput
from dpfast.practice.trackers import check_paths
from dpfast.sources.costs import Cost
from dpfast.sources.deliberate_practice import DeliberatePracticeSource
from dpfast.sources.dynamic import DynamicSource
from dpfast.sources.existing import Existing, ExistingSource
from dpfast.sources.guided_methods import check_guided_method
from dpfast.sources.labels import LabelOrder
from dpfast.sources.other_pool import OtherPool
from dpfast.sources.prune import PruneSource
from dpfast.sources.real_images import RealImages
from dpfast.sources.reuse import ReusedSamples
from dpfast.sources.source import LoopView, Source
from dpfast.sources.static import StaticSource
from dpfast.sources.strengths import Strengths
from dpfast.sources.unguided import UnguidedSamples


class DeliberatePractice:
    """The sources of a recipe, one after the other, over one generator and one set of real images.

        results = DeliberatePractice(Recipe.load("fashion")).run("runs/mine")

    Deliberate Practice runs first. The other sources then get as many samples as it ended with and
    as many iterations, those with rounds at the same moments. Without it they go by the recipe: the
    maximum of samples, their own patience.

    Args:
        recipe: Everything that no object is given for.
        pipeline: A ``Pipeline``, used as it was loaded, or an object with the protocol
            ``OwnPipeline``; None: the recipe's.
        learner: An ``nn.Module`` from images (B, C, H, W) in [-1, 1] to logits (B, K), of which
            every source trains a copy, or a function that builds one for each source; None: the
            recipe's.
        real: Images (N, C, H, W) and labels (N,), a ``Dataset`` of such pairs, or ``RealData``;
            None: the recipe's.
        sources: Names, import paths and ``Source`` objects, in place of the recipe's; those of your
            own run last.
        criterion: Function of logits (B, K) and labels (B,) that guidance raises
            (``dpfast.generate.criteria``); with the recipe's criterion "disagreement" it gets
            those of a committee, (B, 2, K).
        loader: Maker of the ``Loader``, called with the pool and the options of ``make_loader``.
        callbacks: Told of every run, after the recipe's and before those of ``run``.
        unguided: Samples that exist already (``UnguidedSamples.remember``), for experiments that
            share a generator and a seed.
        ranks: Processes of the run. Every rank makes this object and calls ``run``, with the same
            arguments. With the recipe's ``overlap`` the last ones only generate, and ``ranks`` are
            then the others.

    Raises:
        InputError: Where the recipe, the objects, the generator and the real images do not fit
            together.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        pipeline: Pipeline | OwnPipeline | None = None,
        learner: nn.Module | NewLearner | None = None,
        real: Given | None = None,
        sources: Sequence[str | Source] | None = None,
        criterion: Criterion | None = None,
        loader: Callable[..., Loader] | None = None,
        callbacks: Sequence[Callback] = (),
        unguided: UnguidedSamples | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        _check_kind("recipe", recipe, Recipe, "a Recipe, as Recipe.load gives it")
        _check_kind("ranks", ranks, Ranks, "dpfast.parallel.Ranks")
        if unguided is not None:
            _check_kind("unguided", unguided, UnguidedSamples, "UnguidedSamples")
        named, paths, own = _parted(recipe, sources)
        if named or paths:
            both = (*named, *paths)
            recipe = replace(recipe, practice=replace(recipe.practice, sources=both))
        recipe.check_ranks(ranks.size)
        overlap = recipe.practice.overlap
        self.overlap_groups = OverlapGroups.of(ranks, overlap) if overlap else None
        if self.overlap_groups is not None:
            ranks = self.overlap_groups.trainers
        self.ranks = ranks
        self.named = named
        self.own = own
        self.criterion = criterion
        self.loader = loader
        check_paths(recipe)
        told = (made("callbacks", path, Callback) for path in recipe.callbacks)
        self.callbacks = (*told, *_checked(callbacks))
        given: dict[str, object] = {"pipeline": pipeline, "learner": learner, "real": real}
        given |= {"criterion": criterion, "loader": loader}
        by_path = set(paths.values())  # of which the recipe knows
        given |= {f"source {name}": each for name, each in own.items() if name not in by_path}
        self.class_counts: Tensor | None = None
        self.objects = {name: kind_of(each) for name, each in given.items() if each is not None}
        if pipeline is None and unguided is not None:
            pipeline = unguided.pipeline
        if pipeline is None and ranks.alone and (recipe.practice.generates or self.own):
            recipe = replace(recipe, generator=fetched(recipe.generator))
        self._stored = self._open_stored(recipe)
        self.pipeline = self._load_pipeline(recipe, pipeline, checks_real=real is None)
        if isinstance(pipeline, Pipeline):  # for those who count, or decode latents later
            folder = str(pipeline.folder)
            generator = replace(recipe.generator, pipeline=folder, revision="")
            recipe = replace(recipe, generator=generator)
        ranks.beat()
        self.real = self._load_real(recipe, real)
        self.sets = evaluation_sets(
            recipe.evaluation, self.real.test, self.real.classes, seed=recipe.seed
        )
        ranks.beat()
        self.existing = self._open_existing(recipe)
        ranks.beat()
        self.asked = self.recipe = recipe
        self.new_learner = learner_factory(recipe, self.pipeline, learner)
        self._check()
        ranks.beat()
        self._tried = 0  # images of the learner's trial
        self._try_learner()
        ranks.beat()
        self._fit(recipe)
        self._check_labels(unguided)
        self.unguided = unguided or UnguidedSamples(
            self.recipe, self.pipeline, ranks, reused=self._reused(recipe)
        )
        self.loop: Loop | None = None  # the one that runs, or ran last

    @property
    def names(self) -> list[str]:
        """The sources in the order in which they run."""
        return [*self.named, *self.own]

    def _load_pipeline(
        self, recipe: Recipe, pipeline: Pipeline | OwnPipeline | None, *, checks_real: bool
    ) -> Pipeline | OwnPipeline:
        """Returns the recipe's pipeline where none is given. Folders are looked at before weights
        are read.
        """
        ranks, missing = self.ranks, "validation" if checks_real else None
        device = device_named(recipe.device, rank=ranks.local_rank, ranks=ranks.size)
        if pipeline is None and not (recipe.practice.generates or self.own):
            pipeline = without_generator(recipe, self._stored, device)
        needed = ("pipeline" if pipeline is None else None, missing)
        recipe.need_folders(*(name for name in needed if name))
        if pipeline is None:
            names = check_generator(recipe.generator)
        else:
            check_pipeline(pipeline)
            names = tuple(pipeline.class_names)
        if checks_real:
            check_real(recipe.validation, recipe.held_out, names)
            for field, of in (("real", ("real", "mix")), ("pool_from", ("pool",))):
                if any(name in self.named for name in of):
                    folder = getattr(recipe.practice, field)
                    check_apart(field, folder, recipe.validation, recipe.held_out)
        self.class_counts = class_counts(recipe.practice, names)
        Strengths.of(recipe.guidance, names)  # looked at before weights are read
        ranks.beat()
        if pipeline is not None:
            return pipeline
        return load_pipeline(recipe.generator, device=device)

    def _load_real(self, recipe: Recipe, real: Given | None) -> RealData:
        """Returns this rank's part of the real images that are given, or that the recipe names."""
        classes, shape = self.pipeline.class_names, self.pipeline.image_shape
        if real is not None:
            return given_real(real, classes=classes, shape=shape, ranks=self.ranks)
        return load_real(
            recipe.validation,
            held_out=recipe.held_out,
            classes=classes,
            shape=shape,
            ranks=self.ranks,
        )

    def _open_stored(self, recipe: Recipe) -> Stored | None:
        """Returns the samples that the source "pool" trains on; their columns alone are read."""
        if "pool" not in self.named:
            return None
        folder = recipe.practice.pool_from
        try:
            return open_stored(Path(folder), beat=self.ranks.beat)
        except InputError as error:
            raise type(error)(f"pool_from: {error}") from None

    def _open_existing(self, recipe: Recipe) -> dict[str, Existing]:
        """Maps each source of samples that exist to what it reads."""
        practice, ranks, classes = recipe.practice, self.ranks, self.pipeline.class_names
        options: dict[str, Any] = {
            "order": LabelOrder(len(classes), self.class_counts),
            "files": recipe.pool.codec == "jpeg",
            "device": self.pipeline.device,
            "ranks": ranks,
        }
        found: dict[str, Existing] = {}
        shape = self.pipeline.image_shape
        for name in ("real", "mix"):
            if name in self.named:
                total = practice.maximum_samples
                if name == "mix":
                    total = practice.mixed_real(practice.before_training)
                images = RealImages(
                    practice.real, classes, shape, seed=recipe.seed, most=total, **options
                )
                if name == "mix" and len(images) < total:
                    raise RecipeError(
                        f"real_share = {practice.real_share:g}: {total} real images; real = "
                        f"{practice.real!r} holds {images.total}"
                    )
                found[name] = images
        if self._stored is not None:
            found["pool"] = OtherPool(
                self._stored,
                practice.pool_from,
                classes,
                shape,
                rounds=practice.pool_rounds,
                most=practice.maximum_samples,
                decode=decoder_of_run(Path(practice.pool_from), self.pipeline.device),
                **options,
            )
        return found

    @property
    def most_samples(self) -> int | None:
        """The most samples of a run whose samples all exist; None where the recipe says."""
        if self.recipe.practice.generates or self.own:
            return None
        return max(map(len, self.existing.values()))

    def _reused(self, recipe: Recipe) -> ReusedSamples | None:
        """Returns the unguided samples that another run has saved."""
        run = recipe.practice.reuse
        if not run:
            return None
        if not isinstance(self.pipeline, Pipeline):
            raise InputError(
                f"reuse = {run!r}: that the generator is the same is known of a folder's alone, "
                f"and this one is a {type(self.pipeline).__name__}"
            )
        return ReusedSamples(
            run,
            recipe,
            LabelOrder(len(self.pipeline.class_names), self.class_counts),
            contents=contents_of(recipe),
            beat=self.ranks.beat,
        )

    def _fit(self, recipe: Recipe) -> None:
        """Takes ``recipe`` for the run, fitted to the memory that is there."""
        learner = self.objects.get("learner")
        together = self.overlap_groups is None
        self.fit = fit_run(recipe, self.pipeline, self.ranks, together=together, learner=learner)
        self.recipe = recipe if self.fit is None else self.fit.recipe
        self.ranks.beat()
        self._try_learner()
        if not recipe.pool.mapped:
            # the disk of mapped files is known with the folder; the loop looks before any work
            self.place_pool()

    def place_pool(self, out: Path | None = None) -> Placement:
        """Plans where a rank's samples will lie.

        Args:
            out: Folder of the run, on whose disk mapped files lie; it need not be there yet.

        Raises:
            RecipeError: Where they have no place, as the run does.
        """
        shape = stored_shape(self.recipe, self.pipeline, self.real)
        return placement(self.recipe, self.pipeline, shape, self.ranks, out, most=self.most_samples)

    def _check(self) -> None:
        practice, classes = self.recipe.practice, len(self.pipeline.class_names)
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
        if self.loader is None:
            choose_loader(self.recipe.learner.loader, self.recipe.pool.codec)
        elif not callable(self.loader):
            raise InputError(f"loader is a {type(self.loader).__name__}: expected a function")
        if "mix" in self.named and practice.real_in_batch:
            check_groups(self.loader or self.recipe.learner.loader)
        if self.recipe.learner.augment is not None:
            own_augment = augment_at(self.recipe.learner.augment)
            try_augment(own_augment, self.pipeline.image_shape, self.pipeline.device)
        if self.recipe.practice.guides:
            check_guided_method(self.recipe, self.pipeline)
        members = (2,) if self.recipe.guidance.criterion == "disagreement" else ()
        tried = {f"criterion = {name!r}": name for name in self._criteria() if is_import_path(name)}
        own = {what: criteria.named(name) for what, name in tried.items()}
        for what, each in (
            own if self.criterion is None else {"criterion": self.criterion}
        ).items():
            try_criterion(each, torch.zeros(2, *members, classes), what)

    def _check_labels(self, unguided: UnguidedSamples | None) -> None:
        """Raises ``InputError`` where samples that exist have other labels, and ``RecipeError``
        where new samples begin from those of a class that has none.
        """
        counts, practice = self.class_counts, self.recipe.practice
        if unguided is not None:
            known = unguided.labels.counts
            if (known is None) != (counts is None) or (
                counts is not None and known is not None and not torch.equal(known, counts)
            ):
                raise InputError(
                    "unguided: its samples have other labels than with class_counts = "
                    f"{practice.class_counts!r}"
                )
        if counts is None or not practice.restart or not practice.guides:
            return
        labels = LabelOrder(len(counts), counts).between(0, practice.initial_samples)
        without = (counts > 0) & (labels.bincount(minlength=len(counts)) == 0)
        if bool(without.any()):
            name = self.pipeline.class_names[int(without.nonzero()[0])]
            raise RecipeError(
                f"restart = {practice.restart:g}: new samples begin from the pool's, and "
                f"initial_samples = {practice.initial_samples} hold none of {name!r}"
            )

    def _try_learner(self) -> None:
        """Raises ``InputError`` for a learner that cannot be trained, saved or asked, unless one
        was tried with as many images.
        """
        rows = trial_rows(self.recipe.learner, self.ranks.size)
        if rows == self._tried:
            return
        given = self.objects.get("learner")
        LearnerTrial(
            what=f"learner = {given}" if given else f"model = {self.recipe.learner.model!r}",
            kind=InputError if given else RecipeError,
            config=self.recipe.learner,
            image=self.real.validation.images.shape[1:],
            classes=len(self.pipeline.class_names),
            device=self.pipeline.device,
            rows=rows,
        ).run(self.new_learner)
        if self.recipe.practice.guides:
            self._try_guide()
        self._tried = rows

    def _try_guide(self) -> None:
        """Raises ``InputError`` for a learner or a criterion that cannot guide, as
        ``dpfast.generate.preflight.try_learner`` does at the first guided batch.
        """
        guidance, device = self.recipe.guidance, self.pipeline.device
        with torch.random.fork_rng([device] if is_gpu(device) else []):
            learner = self.new_learner()
        shape, classes = self.pipeline.image_shape, len(self.pipeline.class_names)
        for criterion in self._criteria() if self.criterion is None else (self.criterion,):
            path = LearnerPath(
                decoder=IdentityDecoder(),
                learner=guiding(guidance.criterion, learner, learner).eval(),
                criterion=criteria.named(criterion),
            )
            try_learner(path, shape, classes, device)

    def _criteria(self) -> tuple[str, ...]:
        """Returns the recipe's criteria, of all rounds, each once."""
        recipe = self.recipe
        found = recipe.practice.criterion_rounds or (recipe.guidance.criterion,)
        return tuple(dict.fromkeys(found))

    def run(
        self,
        folder: RunPaths | str | Path | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        progress: bool = True,
        callbacks: Sequence[Callback] = (),
        stop: Stop | None = None,
    ) -> list[Result]:
        """Runs all sources, and returns their results.

        Nothing is written without a ``folder``; one that holds a run's state is continued. A rank
        that only generates returns no results.

        Args:
            folder: A path, or of several ranks for the first one a ``RunWriter``, for the others
                its ``RunPaths``.
            resume: True goes on with the run in the path, which began with objects of the same
                kinds.
            overwrite: True replaces the run in the path.
            progress: True shows a bar, and lines for rounds and evaluations.
            callbacks: Told as well, after those of the constructor.
            stop: Asked after every step and batch.

        Raises:
            InputError: For a folder that cannot be used, and where the disk has no room.
            Stopped: After a stop was requested.
            LossError: Where a loss is not finite.
        """
        stop = Stop() if stop is None else stop
        _check_kind("stop", stop, Stop, "dpfast.practice.stopping.Stop")
        callbacks = _checked(callbacks)
        if folder is None or isinstance(folder, RunPaths):
            return self._run(folder, progress, callbacks, stop)
        _check_kind("folder", folder, (str, Path), "a path")
        path = Path(folder)
        if not self.ranks.alone:
            raise InputError(
                f"folder = {str(path)!r}: of several ranks the first one needs a RunWriter, the "
                "others its RunPaths"
            )
        with RunWriter(path, self.asked, overwrite=overwrite, resume=resume) as writer:
            if writer.recipe != self.asked:  # it goes on as it was born
                self._fit(writer.recipe)
            return self._run(writer, progress, callbacks, stop)

    def _run(
        self, folder: RunPaths | None, progress: bool, callbacks: Sequence[Callback], stop: Stop
    ) -> list[Result]:
        names = self.names
        if self.overlap_groups is not None and self.overlap_groups.generates:
            if "dp" in names:
                GeneratorRank(
                    self.recipe,
                    self.pipeline,
                    self.overlap_groups,
                    stop,
                    self.new_learner,
                    criterion=self.criterion,
                ).serve()
            return []
        if folder is not None:
            with self.ranks.all_or_none():
                folder.keep_objects(self.objects)
                folder.keep_learner(self.new_learner)
            kept = as_kept(self.recipe, folder.path)
            if kept is not self.recipe:
                self.new_learner = learner_factory(kept, self.pipeline)
        starts = {name: self._start(folder, name) for name in names}
        begun = [name for name in names if starts[name] is not None]
        newest = starts[begun[-1]] if begun else None
        if folder is not None:  # all loops write into the same files
            folder.load_state_dict({} if newest is None else newest.components["folder"])
        told = [
            *self.callbacks,
            *callbacks,
            *([Console()] if progress and self.ranks.first else []),
        ]
        if folder is not None:
            image = tuple(self.real.validation.images.shape[1:])
            counted = "learner" not in self.objects
            rates = Throughput(self.recipe, self.pipeline, image, counted=counted)
            told = [*folder.watchers(rates), *told]
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
                new_learner=self.new_learner,
                loader=self.loader,
                class_counts=self.class_counts,
                most=self.most_samples,
            )
            self.loop = loop
            source = self._source(name, loop, practised)
            result = loop.run(source, start=starts[name])
            # the pool has what is left of the images that were made
            if self.recipe.pool.save_samples != "jpeg" and name not in ("mix", *READ):
                self.unguided.remember(loop.pool.local, result.initial_cost)
            results.append(result)
            if name == "dp":
                practised = loop
        return results

    def _start(self, folder: RunPaths | None, name: str) -> Checkpoint | None:
        """Returns the newest checkpoint of a source, the same one on every rank: that of the
        first.
        """
        if folder is None:
            return None
        with self.ranks.all_or_none():
            newest = self._newest(folder.checkpoints(name), name) if self.ranks.first else None
        path = self.ranks.broadcast_object(None if newest is None else str(newest.path))
        return newest if newest is not None or path is None else checkpoint.load(Path(path))

    def _newest(self, folder: Path, name: str) -> Checkpoint | None:
        """Returns the checkpoint from which a source goes on; None: it begins anew.

        After the iterations have grown the first source goes on before the old cool-down, and the
        others, which take their sizes and moments from it, begin anew. Raises ``RecipeError`` where
        no checkpoint from before the cool-down can be read.
        """
        newest, practice = checkpoint.latest(folder), self.recipe.practice
        if newest is None or newest.iterations == practice.iterations:
            return newest
        if name != self.names[0]:
            return None
        before = newest.iterations
        if newest.step < before - self.recipe.learner.cooldown * before:
            return newest
        kept = checkpoint.stable(folder)
        if kept is None:
            raise RecipeError(
                f"iterations = {practice.iterations} was {before}: the run has begun its "
                "cool-down, and kept no checkpoint before it"
            )
        try:
            return checkpoint.load(kept)
        except InputError as error:
            raise RecipeError(
                f"iterations = {practice.iterations} was {before}: {error}"
            ) from error

    def _source(self, name: str, loop: Loop, practised: Loop | None) -> Source:
        recipe, unguided = self.recipe, self.unguided
        moments = frozenset(recipe.practice.add_at) or None
        if practised is not None:
            moments = frozenset(practised.state.moments)
        if name in self.own:
            own = self.own[name]
            own.cost.load_state_dict(Cost().state_dict())
            own.begin(
                LoopView(
                    recipe=recipe,
                    pipeline=self.pipeline,
                    learner=loop.guide,
                    pool=lambda: loop.pool.local,
                    unguided=unguided,
                    ranks=self.ranks,
                    moments=moments,
                )
            )
            return own
        if name == "dp":
            source = DeliberatePracticeSource(
                recipe,
                self.pipeline,
                unguided,
                loop.guide,
                guides=loop.guides,
                pool=lambda: loop.pool,
                criterion=self.criterion,
                moments=moments,
            )
            if self.overlap_groups is None:
                return source
            return OverlappedSource(source, loop.guides, self.overlap_groups)
        total = recipe.practice.maximum_samples if practised is None else len(practised.pool)
        if name in READ:
            samples = self.existing[name]
            count = min(total, len(samples))
            return ExistingSource(samples, count, self.ranks, recipe.generator.batch_size)
        if name == "mix":
            mixed = self._source(recipe.practice.mix_with, loop, practised)
            assert isinstance(mixed, StaticSource)
            images = self.existing[name]
            assert isinstance(images, RealImages)
            mixed.real = images.first(recipe.practice.mixed_real(mixed.initial_samples))
            return mixed
        if name == "static":
            return StaticSource(recipe, unguided, total)
        if name == "prune":
            held = None if loop.folder is None else loop.folder.held(name)
            if recipe.pool.save_samples == "none":
                held = None
            return PruneSource(recipe, unguided, loop.guide, moments=moments, folder=held)
        return DynamicSource(recipe, unguided, loop.guide, moments=moments)


def _parted(
    recipe: Recipe, sources: Sequence[str | Source] | None
) -> tuple[tuple[SourceName, ...], dict[ImportPath, str], dict[str, Source]]:
    """Returns the names of the sources that the package knows, the import paths of the recipe with
    their names, and all of the caller's own by name, each in the order in which they run.

    Raises ``InputError`` for other things, names that come twice, and paths as ``made`` does.
    """
    if sources is None:
        sources = recipe.practice.sources
    _check_list("sources", sources, "names and Sources")
    own: dict[str, Source] = {}
    paths: dict[ImportPath, str] = {}
    for each in sources:
        if isinstance(each, str) and each in SOURCES:
            continue
        path = ImportPath(each) if isinstance(each, str) and is_import_path(each) else None
        if path is not None:
            initial = recipe.practice.initial_samples
            each = made("sources", path, Source, initial_samples=initial)  # type: ignore[type-abstract]
        if not isinstance(each, Source):
            raise InputError(
                f"sources: {each!r}: expected a Source, or one of {', '.join((*SOURCES, FORM))}"
            )
        name = each.name or type(each).__name__.lower()
        if name in SOURCES or name in own or not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise InputError(
                f"sources: name = {name!r}: expected letters and digits that no other source has"
            )
        if not (hasattr(each, "cost") and hasattr(each, "initial_samples")):
            raise InputError(
                f"source {name!r}: has no cost or initial_samples; expected an __init__ that calls "
                "super().__init__(initial_samples)"
            )
        own[name] = each
        if path is not None:
            paths[path] = name
    if not sources:
        raise InputError("sources: expected one or more")
    return tuple(name for name in SOURCES if name in sources), paths, own


def _checked(callbacks: Sequence[Callback]) -> tuple[Callback, ...]:
    """Returns the callbacks of a list. Raises ``InputError`` for other things."""
    _check_list("callbacks", callbacks, "dpfast.Callback")
    for each in callbacks:
        if isinstance(each, type):
            raise InputError(f"callbacks: {each.__name__} is a class, expected an object of it")
        if not isinstance(each, Callback):
            raise InputError(f"callbacks: a {type(each).__name__} is no dpfast.Callback")
    return tuple(callbacks)


def _check_list(name: str, given: object, items: str) -> None:
    """Raises ``InputError`` unless an argument is a sequence, and no text."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise InputError(f"{name} is a {type(given).__name__}: expected a list of {items}")


def _check_kind(name: str, given: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """Raises ``InputError`` unless an argument is of a kind, or of one of several."""
    if not isinstance(given, kind):
        raise InputError(f"{name} is a {type(given).__name__}: expected {wanted}")
