"""The run of a sampler's steps: eagerly, compiled as one full graph each or by the blocks of their
models, replayed from a CUDA graph, or both; and many samples, in batches as large as pays.
"""

from __future__ import annotations

import contextlib
import logging
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dpfast.errors import InputError
from dpfast.generate import check, preflight
from dpfast.generate.batching import FIRST, LARGEST, BatchSizer, dearest, largest_batch
from dpfast.generate.bounded import BoundedPath, within_budget
from dpfast.generate.compiling import CompileCosts, Tuner, keep_compiled
from dpfast.generate.feature_cache import FeatureCache
from dpfast.generate.graphs import Captured, Recorder, recorder_on
from dpfast.generate.models.regional import Region, Regions, has_region
from dpfast.generate.solver_tables import SolverTable
from dpfast.generate.step import (
    Finished,
    StepInputs,
    StepOutputs,
    StepParts,
    Trajectory,
    Variant,
    finish_function,
    step_function,
)
from dpfast.hardware.device import searched_convolutions
from dpfast.hardware.out_of_memory import attempt, release
from dpfast.samples import SampleBatch

log = logging.getLogger(__name__)


class Runner:
    """Runs steps, and ``make(batch)`` over N samples, as fast as memory and compile time allow.

    Prepared steps, which are compiled or captured or both, take batches of one size: a smaller one
    is filled up to ``batch_size``, and a larger one runs eagerly.

    Args:
        parts: what the steps are made of.
        table: of the solver, on their device.
        compile: True, False or "auto", which asks ``tuner`` whether it pays.
        region: what is compiled, whole steps or the blocks that repeat in denoiser, decoders and
            learner (``dpfast.generate.models.regional``).
        cuda_graphs: True captures prepared steps, False runs them as they are; None: captures them
            on a GPU; or what records them.
        memory_budget: bytes that the gradient of a guided step may hold; None: any number.
        micro_batch: the most samples that are made at a time, where it is known what fits.
        backend: of ``torch.compile``.

    Raises ``InputError`` or ``TypeError`` for an argument that cannot work.

    Attributes:
        batch_size: of prepared steps; None: eager steps of any size. compiled: whether they are.
        fitting: guided or not -> the largest batch that is known to fit into memory.
    """

    def __init__(
        self,
        parts: StepParts,
        table: SolverTable,
        *,
        compile: bool | Literal["auto"] = False,
        region: Region = "step",
        cuda_graphs: bool | Recorder | None = None,
        memory_budget: int | None = None,
        micro_batch: int | None = None,
        backend: str | Callable = "inductor",
    ) -> None:
        if compile not in (True, False, "auto"):
            raise InputError(f"compile = {compile!r}: expected True, False or 'auto'")
        if region not in get_args(Region):
            raise InputError(
                f"compile_region = {region!r}: expected one of {', '.join(get_args(Region))}"
            )
        if region == "blocks" and not has_region(parts.denoiser):
            raise InputError(
                "compile_region = 'blocks': this denoiser has no transformer blocks that repeat; "
                "use 'step'"
            )
        if memory_budget is not None:
            check.count("memory_budget", memory_budget, "bytes, at least 1, or None")
        if micro_batch is not None:
            check.count("micro_batch", micro_batch, "samples, at least 1, or None")
        self.table = table
        self.region = region
        self.memory_budget = memory_budget
        self.backend = backend
        self.device = table.rows.device
        self.recorder = recorder_on(self.device, cuda_graphs)
        self.tuner = Tuner(CompileCosts(self.device, _described(parts, region)), compile)
        self.fitting = {} if micro_batch is None else dict.fromkeys((False, True), micro_batch)
        self.batch_size: int | None = None
        self.compiled = False
        self._functions: dict[Variant | str, Callable[..., Any]] = {}
        self._indices = [torch.tensor(i, device=self.device) for i in range(len(table))]
        self._given = parts
        self._parts: StepParts | None = None

    @property
    def parts(self) -> StepParts:
        """The parts that the steps are made of, once the learner has been tried out."""
        if self._parts is None:
            self.check_learner()
        assert self._parts is not None
        return self._parts

    def check_learner(self) -> None:
        """Tries the learner out, once, and fits its gradient into the memory budget.

        Raises ``InputError`` as ``preflight.check_modules``, each time, ``preflight.try_learner``
        and ``within_budget`` do.
        """
        path, denoiser = self._given.path, self._given.denoiser
        if path is not None:
            preflight.check_modules(path.learner)
        if self._parts is not None:
            return
        if path is not None:
            preflight.try_learner(path, denoiser.sample_shape, denoiser.classes, self.device)
            if self.memory_budget is not None:
                recompute = self.tuner.mode is False or self.region == "blocks"
                path = within_budget(path, self.table, self.memory_budget, recompute=recompute)
        self._parts = replace(self._given, path=path)

    def step(self, trajectory: Trajectory) -> StepOutputs:
        """Returns the next step of a batch that ``padded`` gave."""
        variant = trajectory.variant
        with self._searched():
            return self._function(variant, str(variant))(*self.inputs(trajectory))

    def blank(self, size: int) -> Trajectory:
        """Returns a batch of zeros before its first step, to count what a step takes."""
        shape = (size, *self._given.denoiser.sample_shape)
        integers = torch.zeros(size, dtype=torch.int64, device=self.device)
        return Trajectory(
            x=torch.zeros(shape, device=self.device),
            x0_prev=torch.zeros(shape, device=self.device) if self._given.multistep else None,
            labels=integers,
            sample_ids=integers,
            omega=torch.zeros(size, device=self.device),
            cfg_scale=torch.zeros((), device=self.device),
            seed=integers[0],
            skipped=integers[0],
            variants=(),
        )

    def inputs(self, trajectory: Trajectory) -> StepInputs:
        """Returns the inputs of a batch's next step."""
        return StepInputs(
            x=trajectory.x,
            x0_prev=trajectory.x0_prev if self._given.multistep else None,
            labels=trajectory.labels,
            sample_ids=trajectory.sample_ids,
            valid=trajectory.valid,
            step=self._indices[trajectory.step],
            rows=self.table.rows,
            timesteps=self.table.timesteps,
            omega=trajectory.omega,
            cfg_scale=trajectory.cfg_scale,
            seed=trajectory.seed,
            features=trajectory.features,
            anchor=trajectory.anchor,
            factors=self._given.factors,
        )

    def finish(self, latents: Tensor) -> Finished:
        """Runs what follows the last step, for latents (B, c, h, w)."""
        size = len(latents)
        with self._searched():
            finish = self._function("finish", "decoding")
            finished = finish(_filled(latents, self.batch_size or size))
        return Finished(*(rows[:size] for rows in finished))

    def _searched(self) -> contextlib.AbstractContextManager[None]:
        return searched_convolutions(self.device, static=self.batch_size is not None)

    def padded(self, trajectory: Trajectory) -> Trajectory:
        """Returns a batch filled up to the size that the steps take, and readies them for it.

        Captures follow weights that were replaced instead of updated in place.
        """
        if self.batch_size is not None and len(trajectory) > self.batch_size:
            self._clear()
        for function in self._captured():
            function.refresh()
        size = self.batch_size
        if size is None:
            return trajectory
        valid = torch.arange(size, device=self.device) < len(trajectory)
        return replace(trajectory.mapped(lambda rows: _filled(rows, size)), valid=valid)

    def cropped(self, trajectory: Trajectory, size: int) -> Trajectory:
        """Returns the ``size`` rows that are no filling, behind the last of the steps."""
        return replace(trajectory.mapped(lambda rows: rows[:size]), valid=None)

    def prepare(self, size: int, *, compile: bool) -> None:
        """Lets batches of up to ``size`` run compiled (``compile``) and captured (with a recorder)
        from here on.
        """
        if (self.batch_size, self.compiled) != (size, compile):
            self._clear()
            self.batch_size, self.compiled = size, compile

    def prepare_one(self, size: int) -> None:
        """Prepares for a single batch of ``size`` what is asked for however few samples there are,
        and lets go of nothing that takes such a batch.
        """
        always = self.tuner.mode is True
        if always or self.recorder is not None:
            self.prepare(max(size, self.batch_size or 0), compile=always or self.compiled)

    def batches(
        self,
        total: int,
        make: Callable[[slice], SampleBatch],
        batch_size: int | Literal["auto"],
        variants: Sequence[Variant],
    ) -> Iterator[SampleBatch]:
        """Yields what ``make`` makes of the rows 0 to ``total``, in order, each once.

        batch_size: "auto" doubles the batch while it pays, up to what the dearest of the steps
        shows to fit. variants: of the steps. A batch that does not fit into memory is made again
        in halves; ``fitting`` remembers what did fit. Raises ``InputError`` or ``TypeError`` for
        another batch size at the call.
        """
        if batch_size != "auto":
            if isinstance(batch_size, bool) or not isinstance(batch_size, int):
                raise TypeError(f"batch_size must be an integer or 'auto', got {batch_size!r}")
            if batch_size < 1:
                raise InputError(f"batch_size = {batch_size}: expected at least 1, or 'auto'")
        return self._batches(total, make, batch_size, variants)

    def _batches(
        self,
        total: int,
        make: Callable[[slice], SampleBatch],
        batch_size: int | Literal["auto"],
        variants: Sequence[Variant],
    ) -> Iterator[SampleBatch]:
        guided = any(variant.guided for variant in variants)
        sizer = self._sizer(total, batch_size, variants)
        done = retries = 0
        while done < total:
            if not sizer.searching:
                self._prepare_rest(sizer.size, total - done)
            started = time.perf_counter()
            batch, failure = attempt(partial(make, slice(done, done + sizer.size)))
            if failure is not None:
                sizer.out_of_memory(failure)
                self._make_room(sizer.size, guided=guided)
                retries += 1
                continue
            assert batch is not None
            if len(batch) == sizer.size:
                seconds = time.perf_counter() - started
                sizer.report(seconds)
                self.tuner.report(len(batch), seconds, compiled=self.compiled)
            done += len(batch)
            yield replace(batch, retries=retries) if retries else batch
            retries = 0

    def _sizer(
        self,
        total: int,
        batch_size: int | Literal["auto"],
        variants: Sequence[Variant],
    ) -> BatchSizer:
        guided = any(variant.guided for variant in variants)
        prepared = self.batch_size
        if batch_size == "auto":
            if prepared is not None:  # found by an earlier stream
                return BatchSizer(prepared, limit=prepared, search=False)
            if total > FIRST:
                fits = largest_batch(partial(self._dearest_step, variants), self.device)
                return BatchSizer(FIRST, limit=min(self.fitting.get(guided, LARGEST), fits))
            batch_size = total
        if batch_size > total and batch_size != prepared:
            batch_size = total
        size = max(1, batch_size)
        return BatchSizer(size, limit=self.fitting.get(guided, size), search=False)

    def _dearest_step(self, variants: Sequence[Variant], size: int) -> None:
        """Runs what takes the most memory on ``size`` samples, eagerly: a step and the decoding."""
        blank = self.blank(size)
        step_function(self.parts, dearest(variants))(*self.inputs(blank))
        finish_function(self.parts)(blank.x)

    def _prepare_rest(self, size: int, samples: int) -> None:
        """Prepares batches of ``size`` where that pays within ``samples``."""
        compile = self.tuner.decide(samples, compiled=self.compiled and self.batch_size == size)
        if compile or self.recorder is not None:
            self.prepare(size, compile=compile)
        else:
            self._clear()

    def _make_room(self, size: int, *, guided: bool) -> None:
        """Gives back what can be made again, where memory has run out."""
        self.close()
        release(self.device)
        log.warning("out of memory: going on with batches of %d", size)
        self.fitting[guided] = size

    def _function(self, key: Variant | str, name: str) -> Callable[..., Any]:
        if key not in self._functions:
            function: Callable[..., Any]
            parts = self._by_blocks if self.compiled and self.region == "blocks" else self.parts
            function = (
                step_function(parts, key) if isinstance(key, Variant) else finish_function(parts)
            )
            if self.compiled and self.region == "step":
                function = self._compile(function)
            if self.batch_size is not None and self.recorder is not None:
                function = Captured(function, self.recorder, watched=self._weights, name=name)
            self._functions[key] = function
        return self._functions[key]

    @cached_property
    def _by_blocks(self) -> StepParts:
        parts, regions = self.parts, Regions(self._compile)
        twin, path = regions.twin(parts.denoiser), parts.path
        decoder = regions.twin(parts.decoder)
        if path is not None:
            recompute = path.denoiser is not parts.denoiser  # within a memory budget
            path = BoundedPath.of(
                path,
                denoiser=regions.twin(parts.denoiser, recompute=True) if recompute else twin,
                decoder=regions.twin(path.decoder),
                learner=regions.twin(path.learner),
                taped=True,
            )
        cache = parts.cache and FeatureCache(twin)
        return replace(parts, denoiser=twin, decoder=decoder, path=path, cache=cache)

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.backend == "inductor":
            keep_compiled()
        return torch.compile(
            _with_own_code(function), fullgraph=True, dynamic=False, backend=self.backend
        )

    def _weights(self) -> Iterable[Tensor]:
        """Yields the tensors of the learner that a capture reads in place; the generator's own
        weights are frozen.
        """
        learner = None if self.parts.path is None else self.parts.path.learner
        if isinstance(learner, nn.Module):
            yield from learner.parameters()
            yield from learner.buffers()

    def _captured(self) -> Iterator[Captured]:
        for function in self._functions.values():
            if isinstance(function, Captured):
                yield function

    @property
    def fallbacks(self) -> dict[str, str]:
        """The reasons for which steps are not captured although a recorder is there, by the step's
        name.
        """
        return {
            function.name: function.reason
            for function in self._captured()
            if function.reason is not None
        }

    def release(self) -> None:
        """Gives back the memory of captured steps. They stay compiled and prepared, and are
        captured anew when they run.

        A capture's memory is a pool of its own, which no other allocation can use while the capture
        lives: 12 GiB for 32 unguided samples of Stable Diffusion 1.5 at 512 px, 37 GiB for as many
        guided ones (counted). Capturing again takes 2.2 s, to the end of the first batch (measured
        on an H200), and a round of such samples minutes to hours: so nothing stays captured between
        rounds. What was compiled holds code and no memory of the device, takes minutes to make
        again, and stays.
        """
        for function in self._captured():
            function.close()
        if self.recorder is not None:
            self.recorder.close()
            release(self.device)

    def close(self) -> None:
        """Releases compiled and captured steps and their memory; what runs next is eager."""
        self._clear()
        if self.recorder is not None:
            self.recorder.close()

    def _clear(self) -> None:
        for function in self._captured():
            function.close()
        self._functions.clear()
        self.batch_size, self.compiled = None, False


def _filled(rows: Tensor, size: int) -> Tensor:
    """Returns ``rows`` with copies of the last one behind them, ``size`` in all."""
    more = size - len(rows)
    return torch.cat([rows, rows[-1:].expand(more, *rows.shape[1:])]) if more > 0 else rows


def _described(parts: StepParts, region: Region) -> str:
    """Returns the models whose compilation is measured."""
    denoiser, path = parts.denoiser, parts.path
    models = [getattr(denoiser, "model", denoiser), None if path is None else path.learner]
    names = " + ".join(type(model).__name__ for model in models if model is not None)
    return f"{names} {denoiser.sample_shape}{' by blocks' if region == 'blocks' else ''}"


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a copy of a Python function that torch.compile counts apart.

    Compilations are cached, and limited in their number, by code object. The steps of all samplers
    of a process come from one; sharing it, the ninth compiled sampler would fail.
    """
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own
