"""One rank of a run, walked through on a device without numbers: the real loop, at the published
sizes.

Models, batches and images have the recipe's sizes; what repeats is cut: a few batches a round, a
few steps between two evaluations, one round of each kind, a restart in the middle. Every part is
the one that runs on a GPU. What has to be read from the device is scripted
(``dpfast.rehearsal.device.scripted``), what only a GPU has is stood in for
(``dpfast.rehearsal.standins``).
"""

from __future__ import annotations

import contextlib
import gc
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.config import READ, SOURCES, Recipe, is_import_path
from dpfast.data.folders import BATCH
from dpfast.data.real import RealData, RealSet
from dpfast.errors import RecipeError
from dpfast.generate import graphs
from dpfast.generate.from_recipe import guidance_config
from dpfast.generate.guidance import cfg_steps, factors
from dpfast.generate.pipelines import Pipeline
from dpfast.hardware.flops import Fused
from dpfast.learn import checkpointing, trainer
from dpfast.learn.models import recipe_learner
from dpfast.parallel import Ranks
from dpfast.planning.architectures import pipeline_of
from dpfast.planning.memory import AHEAD
from dpfast.practice import experiment, stopping
from dpfast.practice.callbacks import Addition, Callback, Progress
from dpfast.practice.loop import Loop
from dpfast.practice.run_paths import RunPaths
from dpfast.practice.run_writer import RunWriter
from dpfast.practice.stopping import Stop, Stopped
from dpfast.rehearsal.autocast import checkpoint
from dpfast.rehearsal.device import META, FakeDevice
from dpfast.rehearsal.disk import RehearsedDisk
from dpfast.rehearsal.graphs import RehearsedRecorder
from dpfast.rehearsal.standins import put, stand_ins
from dpfast.sources import costs
from dpfast.sources.costs import Price
from dpfast.sources.source import RoundRequest

BATCHES = 2  # of a rank in each round, and one that is not full
STEPS = 3  # between two evaluations
ITERATIONS = 10
STOPPED = 7  # the step after which the run is stopped: behind an addition, before the cool-down
MICRO_BATCHES = 4  # of a step; what the loader holds of the others is accounted for
WALKED = 1  # steps of the learner after each addition; the others are the same again


def cut(recipe: Recipe, ranks: Ranks, classes: int) -> Recipe:
    """Returns the recipe with everything that repeats cut short, at the sizes of its models,
    batches and images; not compiled. Labels are balanced: class counts change which samples are
    made, not how.

    Raises ``RecipeError`` for what cannot be walked: files that are decoded take numbers, and ranks
    that only generate speak with the others all the time.
    """
    for name, value in (("codec", recipe.pool.codec), ("loader", recipe.learner.loader)):
        if value in ("jpeg", "dali"):
            raise RecipeError(
                f"{name} = {value!r}: a rehearsal decodes no files; "
                "rehearse it with pixels or latents"
            )
    if is_import_path(recipe.learner.loader):
        raise RecipeError(
            f"loader = {recipe.learner.loader!r}: a rehearsal accounts for no loader of yours; "
            "rehearse it with torch"
        )
    if recipe.learner.augment is not None:
        raise RecipeError(
            f"augment = {recipe.learner.augment!r}: a rehearsal accounts for no augmentation of "
            "yours; rehearse it without"
        )
    if recipe.practice.sources[0] not in SOURCES:
        raise RecipeError(
            f"sources = {','.join(recipe.practice.sources)!r}: a rehearsal walks none but "
            f"{', '.join(SOURCES)}"
        )
    if recipe.practice.sources[0] in (*READ, "mix"):
        raise RecipeError(
            f"sources = {','.join(recipe.practice.sources)!r}: a rehearsal reads no images of "
            "others; rehearse it with --sources static, which trains alike, or dp"
        )
    if recipe.practice.overlap:
        raise RecipeError(
            f"overlap = {recipe.practice.overlap}: "
            "a rehearsal walks ranks that do all in turns; expected 0"
        )
    batch = recipe.generator.batch_size  # a rank's turn; what is in memory at once may be less
    samples = max(ranks.size * BATCHES * batch, -(-classes // batch) * batch) + batch // 2
    practice = replace(
        recipe.practice,
        initial_samples=samples,
        round_samples=samples,
        maximum_samples=2 * samples,
        iterations=ITERATIONS,
        evaluate_every=STEPS,
        evaluate_unit="steps",
        patience=1,
        patience_growth="fixed",
        add_at=(),
        class_counts="",
        sources=("dp",) if "dp" in recipe.practice.sources else recipe.practice.sources[:1],
        yardstick_samples=min(recipe.practice.yardstick_samples, ranks.size * batch),
    )
    # where a round begins late, it begins at its own step
    steps = recipe.generator.steps if recipe.practice.restart else _fewest_steps(recipe)
    share = recipe.learner.batch_size // ranks.size
    shown = min(share, MICRO_BATCHES * (recipe.learner.micro_batch or share))
    return replace(
        recipe,
        practice=practice,
        evaluation=(),
        callbacks=(),
        trackers=(),
        generator=replace(recipe.generator, steps=steps, compile=False),
        learner=replace(recipe.learner, batch_size=shown * ranks.size, compile=False),
        pool=replace(recipe.pool, device_gib=1.0, host_gib=1.0, mapped=False),
    )


def _fewest_steps(recipe: Recipe) -> int:
    """Returns the shortest trajectory that has, in each round, every kind of step of the recipe's
    own: guided or not, anchored or not, with classifier-free guidance or without. Two are walked
    where there are two.
    """
    total = recipe.generator.steps
    rounds = [recipe.of_round(number) for number in range(recipe.scheduled_rounds + 1)]
    ways = {(each.guidance, each.generator.cfg_schedule): each for each in rounds}

    def kinds(way: Recipe, total: int) -> set[tuple[bool, bool, bool]]:
        guidance = guidance_config(way)
        guided = guidance.steps(total)
        cfg = cfg_steps(way.generator.cfg_interval, way.generator.cfg_schedule, total)
        has_one = bool(way.guidance.anchor or way.guidance.anchor_classes)
        begun = factors(guidance.anchor_schedule if has_one else (), total)
        return {(i in guided, i in cfg, i in guided and begun[i] > 0) for i in range(total)}

    wanted = [(way, kinds(way, total)) for way in ways.values()]
    shorter = range(min(total, 2), total + 1)
    return next(n for n in shorter if all(kinds(way, n) >= whole for way, whole in wanted))


def real_images(pipeline: Pipeline, ranks: Ranks) -> RealData:
    """Returns as many real images as fill one evaluation batch of every rank and a part of another;
    no memory of their own.
    """
    count = ranks.size * BATCH + BATCH // 5
    mine = len(ranks.indices(count, BATCH))
    images = torch.zeros((), dtype=torch.uint8).expand(mine, *pipeline.image_shape)
    real = RealSet(images, torch.arange(mine) % pipeline.denoiser.classes)
    return RealData(pipeline.class_names, real, real)


@dataclass
class Account:
    """The numbers of a walk that the device does not tell. captures: of all samplers; alive:
    captured graphs at a training step, at most.

    checkpoint_bytes: of one; copied, written: bytes of it that the loop itself copied to the host,
    and wrote.
    """

    captures: int = 0
    alive: int = 0
    checkpoint_bytes: int = 0
    copied: int = 0
    written: int = 0


class RehearsedLoop(Loop):
    """A loop whose parts are phases of a ``FakeDevice``."""

    device: FakeDevice  # these four are set by ``in_place``
    recorders: list[RehearsedRecorder]
    account: Account
    hidden: int  # bytes of the batches' micro-batches that ``cut`` left out
    steps = 0  # since samples were added

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        device = self.device
        with device.kind("learner"):
            super().__init__(*args, **kwargs)
        learner = self.trainer
        device.claim_module(learner.ema.module, "average")
        device.claim_module(learner.model, "learner")
        for parameter in learner.model.parameters():
            parameter.register_post_accumulate_grad_hook(_claimed_gradient(device))
        learner.optimizer.register_step_post_hook(
            lambda optimizer, *_: device.claim(_slots(optimizer), "optimizer")
        )
        step = device.step(learner.step, "activations")

        def watched(images: Tensor, labels: Tensor) -> Tensor:
            alive = sum(recorder.alive for recorder in self.recorders)
            self.account.alive = max(self.account.alive, alive)
            self.steps += 1
            if self.steps <= WALKED:
                loss: Tensor = step(images, labels)
                return loss
            learner.step_count += 1
            return images.new_zeros(())

        learner.step = watched  # type: ignore[method-assign]

    def _train(self) -> bool:
        with (
            self.device.phase("training"),
            self.device.kind("batches"),
            self.device.held("batches", self.hidden),
        ):
            return super()._train()

    def _stands_still(self) -> bool:
        with self.device.phase("evaluation"), self.device.kind("evaluation"):
            return super()._stands_still()

    def _add_samples(self) -> None:
        name = "guided samples" if self.state.round >= 0 else "initial samples"
        with self.device.phase(name), self.device.kind("sampling"):
            super()._add_samples()
        self.steps = 0

    def _account(self, request: RoundRequest) -> Addition:
        with self.device.phase("account of a round"):
            return super()._account(request)

    def _finish(self) -> Any:
        with self.device.phase("final evaluation"), self.device.kind("evaluation"):
            return super()._finish()


def _claimed_gradient(device: FakeDevice) -> Any:
    def claim(parameter: Tensor) -> None:
        if parameter.grad is not None:
            device.claim([parameter.grad], "gradients")

    return claim


def _slots(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for slots in optimizer.state.values():
        yield from (value for value in slots.values() if isinstance(value, Tensor))


@contextlib.contextmanager
def in_place(device: FakeDevice, account: Account, hidden: int) -> Iterator[None]:
    """Lets the loops of ``DeliberatePractice`` tell a rehearsal what they do, within a ``with``
    block.
    """
    recorders: list[RehearsedRecorder] = []
    told = {"device": device, "recorders": recorders, "account": account, "hidden": hidden}
    loop = type("RehearsedLoop", (RehearsedLoop,), told)

    def recorder(_: torch.device) -> RehearsedRecorder:
        recorders.append(RehearsedRecorder(device, f"sampler {len(recorders)}"))
        return recorders[-1]

    values: list[tuple[Any, str, Any]] = [
        (experiment, "fit_run", lambda *_, **__: None),  # it was fitted before
        (experiment, "Loop", loop),
        (
            trainer,
            "synchronised",
            lambda model, _: model,
        ),  # torch's own on a GPU, whose messages nobody records
        (checkpointing, "checkpoint", checkpoint),
        (stopping, "ASK", 0.0),  # ranks agree before every step, so that all stop at the same one
        (costs, "price", lambda *_, **__: Price(0.0, 0.0)),
        (graphs, "CudaRecorder", recorder),
    ]
    with put(values):
        yield
    account.captures = sum(each.captures for each in recorders)


def learner_on_the_device(recipe: Recipe, pipeline: Pipeline) -> Callable[[], nn.Module]:
    """Builds the recipe's learner without drawing its weights on the host first."""

    def built() -> nn.Module:
        with META:
            return recipe_learner(
                recipe.learner,
                classes=len(pipeline.class_names),
                channels=pipeline.image_channels,
            )

    return built


def _weights(pipeline: Pipeline) -> Iterator[Tensor]:
    """Yields the weights of all models that a pipeline's parts hold, and the tables beside them."""
    seen: set[int] = set()
    parts: list[object] = [pipeline.denoiser, pipeline.decoder, pipeline.guidance_decoder]
    while parts:
        part = parts.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, nn.Module):
            yield from (*part.parameters(), *part.buffers())
        elif isinstance(part, Tensor):
            yield part
        elif type(part).__module__.startswith("dpfast."):
            parts += vars(part).values()


class _StopsAt(Callback):
    """Asks a run to stop after a step, as SIGTERM does."""

    def __init__(self, step: int) -> None:
        self.step, self.stop = step, Stop()

    def on_step(self, progress: Progress) -> None:
        if progress.step == self.step:
            self.stop.requested = True


def walk(recipe: Recipe, ranks: Ranks, device: FakeDevice, *, gpu: bool = True) -> Account:
    """Runs a recipe, made short by ``cut``, as ``ranks.rank``. gpu: or on a CPU.

    The run is stopped in its middle. The first rank then goes on from the folder to the end, as
    after a kill.
    """
    account, disk = Account(), RehearsedDisk()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # nothing is computed: more threads would only wait for each other
        gc.collect()
        # what was there before is not looked at each time that a phase gives back its memory
        gc.freeze()
        stack.callback(gc.unfreeze)
        stack.enter_context(warnings.catch_warnings())
        # there is nothing to copy into
        warnings.filterwarnings("ignore", "for .*copying from a non-meta parameter")
        for context in (Fused(), device, stand_ins(device, gpu=gpu), put(disk.values())):
            stack.enter_context(context)
        with device.phase("models"), device.kind("generator"):
            pipeline = replace(pipeline_of(recipe.generator), device=META)
            device.claim(_weights(pipeline), "generator")
        short = cut(recipe, ranks, pipeline.denoiser.classes)
        missing = (recipe.learner.batch_size - short.learner.batch_size) // ranks.size
        hidden = AHEAD * missing * 4 * math.prod(pipeline.image_shape)
        stack.enter_context(in_place(device, account, hidden))
        practice = partial(
            experiment.DeliberatePractice,
            short,
            pipeline=pipeline,
            real=real_images(pipeline, ranks),
            learner=learner_on_the_device(short, pipeline),
            ranks=ranks,
        )
        out = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        stops = _StopsAt(STOPPED)
        with _folder(short, ranks, out, resume=False) as folder, contextlib.suppress(Stopped):
            practice().run(folder, progress=False, callbacks=[stops], stop=stops.stop)
        if ranks.first and short.pool.save_samples != "none":
            gc.collect()
            with device.after_a_restart(), _folder(short, ranks, out, resume=True) as folder:
                practice().run(folder, progress=False)
    account.checkpoint_bytes = disk.bytes
    account.copied = disk.copied
    account.written = disk.written
    return account


@contextlib.contextmanager
def _folder(recipe: Recipe, ranks: Ranks, out: Path, *, resume: bool) -> Iterator[RunPaths]:
    if ranks.first:
        with RunWriter(out, recipe, resume=resume, ranks=ranks) as folder:
            yield folder
    else:
        out.mkdir()
        yield RunPaths(out, ranks)
