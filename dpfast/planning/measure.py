"""The stages of a recipe, timed on this machine: a few batches of each, with the weights that the
recipe names.

They are timed where the recipe runs, in batches that end in time: a small one by the counted work,
then one as large as the small one's seconds allow. What is too long for even one sample is not
timed, and the plan goes by its limit.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from dpfast.config import Recipe
from dpfast.errors import InputError
from dpfast.evaluate.measures import predict
from dpfast.feed import make_loader
from dpfast.feed.augment import Augment
from dpfast.generate.from_recipe import load_pipeline, new_sampler
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.protocol import OwnPipeline
from dpfast.hardware.device import device_named
from dpfast.hardware.flops import Counts
from dpfast.hardware.peaks import Peaks, here
from dpfast.learn.models import guiding, learner_factory
from dpfast.learn.trainer import Trainer
from dpfast.planning.architectures import is_published
from dpfast.planning.fitting import fit, stages_of
from dpfast.planning.without_generator import without_generator
from dpfast.pool.pool import SamplePool
from dpfast.samples import SampleBatch
from dpfast.sources.costs import Cost
from dpfast.sources.guided_methods import GuidedRequest, guided_method
from dpfast.sources.strengths import Strengths

EVALUATED = 500  # images
SECONDS = 20.0  # of all stages together, an even part each
EXPECTED = 0.1  # of its limit: what a stage is expected to reach before it is timed
# calls after the first, and seconds of all of them, with which a stage has been timed
ROUNDS, ENOUGH = (
    3,
    1.0,
)


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds of one unit: an unguided and a guided sample, an image in a training step, an
    evaluated image.

    None: not timed, since one unit takes too long here. notes: what was timed, a line for each
    stage.
    """

    unguided: float | None
    guided: float | None
    training: float | None
    evaluation: float | None
    notes: tuple[str, ...] = ()


def measure(
    recipe: Recipe, *, pipeline: Pipeline | OwnPipeline | None = None, seconds: float = SECONDS
) -> Timings:
    """Times the stages on the recipe's device, in at most about ``seconds`` beside loading.

    pipeline: where it is loaded already. Raises what ``load_pipeline`` and ``stages_of`` raise, and
    ``InputError`` for a published name, which has no weights.
    """
    generates = recipe.practice.generates
    if pipeline is None:
        if generates and is_published(recipe.generator.pipeline):
            raise InputError(
                f"pipeline = {recipe.generator.pipeline!r}: a published model without weights, "
                "which this machine cannot time; expected their folder, or OWNER/NAME of the Hub, "
                "or a plan for a GPU such as 'h100'"
            )
        device = device_named(recipe.device)
        pipeline = (
            load_pipeline(recipe.generator, device=device)
            if generates
            else without_generator(recipe, None, device)
        )
    stages = stages_of(recipe, here())
    recipe = fit(recipe, here(), stages=stages).recipe
    classes = len(pipeline.class_names)
    config = recipe.learner
    device = pipeline.device
    clock = StageClock(here(), seconds / 4, device)
    trainer = Trainer(learner_factory(recipe, pipeline)(), config, iterations=10**6)
    guide, other = (trainer.classifier(which) for which in (recipe.guidance.guide_with, "raw"))
    guide = guiding(recipe.guidance.criterion, guide, other).eval()
    first = recipe.of_round(1)
    plain = new_sampler(recipe, pipeline, None)
    sampler = new_sampler(first, pipeline, guide)
    held = [_noise(pipeline)]

    @contextlib.contextmanager
    def unguided(size: int) -> Iterator[Callable[[], object]]:
        def call() -> None:
            ids = torch.arange(size)
            held[:] = plain.stream(ids % classes, sample_ids=ids, batch_size=size)

        yield call

    dtype, at_once = recipe.generator.dtype, recipe.generator.at_once
    made = pushed = None
    if generates:
        made = clock.time("unguided samples", unguided, stages.unguided, most=at_once, dtype=dtype)
    plain.release()
    pool = SamplePool(
        recipe.pool.codec if recipe.pool.codec != "latents" else "pixels",
        shape=held[0].images.shape[1:],
    )
    for batch in held:
        pool.append(batch, round=0, omega=0.0, cfg_scale=1.0, steps=1, seed=0)
    way = guided_method(
        first,
        sampler,
        new_sampler(first, pipeline, guide, compile=False, cuda_graphs=False),
        lambda: pool,
    )

    @contextlib.contextmanager
    def guided(size: int) -> Iterator[Callable[[], object]]:
        labels = torch.arange(size) % classes
        wanted = GuidedRequest(
            labels=labels,
            start=len(pool),
            done=0,
            strengths=Strengths(omega=first.guidance.omega),
            cfg_scale=first.generator.cfg_scale,
            learner_step=0,
        )
        yield lambda: list(way.make(wanted, Cost()))

    if generates:
        pushed = clock.time("guided samples", guided, stages.guided, most=at_once, dtype=dtype)
    sampler.release()

    augment = Augment.of(replace(config, aug_repeats=1))  # batches of any size are timed

    @contextlib.contextmanager
    def training(size: int) -> Iterator[Callable[[], object]]:
        loader = make_loader(
            config.loader,
            pool,
            batch_size=size,
            seed=recipe.seed,
            augment=augment,
            device=device,
            classes=classes,
        )
        trainer.model.train()
        with contextlib.closing(loader):
            yield lambda: trainer.step(*next(loader))

    precision = "bfloat16" if trainer.bf16 else "float32"
    share = min(config.batch_size, config.micro_batch or config.batch_size)
    learned = clock.time(
        "training", training, stages.training, most=share, dtype=precision, least=2
    )
    images = pool.images(torch.arange(EVALUATED) % len(pool))

    @contextlib.contextmanager
    def evaluation(size: int) -> Iterator[Callable[[], object]]:
        yield lambda: predict(trainer.classifier("ema"), images[:size])

    judged = clock.time(
        "evaluation", evaluation, stages.evaluation, most=EVALUATED, dtype=precision
    )
    return Timings(
        unguided=made, guided=pushed, training=learned, evaluation=judged, notes=tuple(clock.notes)
    )


def _noise(pipeline: Pipeline | OwnPipeline) -> SampleBatch:
    """Returns two samples of noise, for a pool where making one takes too long."""
    images = torch.randint(
        256, (2, *pipeline.image_shape), dtype=torch.uint8, device=pipeline.device
    )
    ids = torch.arange(2, device=pipeline.device)
    return SampleBatch(
        images=images, labels=ids % len(pipeline.class_names), sample_ids=ids, entropy=ids.float()
    )


class StageClock:
    """Times stages in ``seconds`` each; ``notes`` says how."""

    def __init__(self, peaks: Peaks, seconds: float, device: torch.device) -> None:
        self.peaks = peaks
        self.seconds = seconds
        self.device = device
        self.notes: list[str] = []

    def time(
        self,
        name: str,
        prepared: Callable[[int], contextlib.AbstractContextManager[Callable[[], object]]],
        counts: Counts,
        *,
        most: int,
        dtype: str,
        least: int = 1,
    ) -> float | None:
        """Returns seconds of one unit, in a batch of a multiple of ``least`` and at most ``most``
        units; None: not timed.

        prepared: of a number of units, within which it gives a call that does them. counts: of a
        unit.
        """
        expected = max(self.peaks.limits(counts).values()) / EXPECTED
        if expected * least > self.seconds:
            self.notes.append(
                f"{name}: not timed, {least} may take "
                f"{expected * least:.0f} s on {self.device}: derived"
            )
            return None
        size = max(least, min(most, int(self.seconds / (16 * expected))) // least * least)
        times = self._times(prepared, size, self.seconds / 2, rounds=1)
        left = self.seconds - sum(times)
        larger = min(most, int(size * left / (4 * times[-1]))) // least * least
        if larger >= 2 * size or size == most:
            size = max(size, larger)
            times = self._times(prepared, size, left, rounds=ROUNDS)
        each = statistics.median(times[1:] or times) / size
        whole = "" if size == most else f", of {most}"
        self.notes.append(
            f"{name}: {size} at once{whole} on {self.device} in {dtype}, {each:.3g} s each"
        )
        return each

    def _times(
        self,
        prepared: Callable[[int], contextlib.AbstractContextManager[Callable[[], object]]],
        size: int,
        seconds: float,
        *,
        rounds: int,
    ) -> list[float]:
        """Returns seconds of calls, the first of which warms up; fewer of them where another one
        would exceed ``seconds``.
        """
        times: list[float] = []
        with prepared(size) as call:
            while not times or (
                sum(times) + (times[-1] if len(times) > 1 else 0.0) <= seconds
                and (len(times) <= rounds or (rounds > 1 and sum(times) < ENOUGH))
            ):
                started = time.perf_counter()
                call()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                times.append(time.perf_counter() - started)
        return times
