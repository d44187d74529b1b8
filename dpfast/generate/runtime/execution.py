"""How the variants of a step run: eagerly, compiled as one full graph each or by their denoiser's
blocks, replayed from a CUDA graph, or both.

A prepared execution takes batches of one size; a smaller batch is filled up with copies of its last
row.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dpfast.generate.feature_cache import FeatureCache
from dpfast.generate.graphs import Captured, Recorder
from dpfast.generate.runtime.regional import regional
from dpfast.generate.step import (
    Finished,
    StepInputs,
    StepOutputs,
    StepParts,
    Variant,
    finish_function,
    step_function,
)

Region = Literal["step", "blocks"]


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a Python function that torch.compile counts apart.

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


class Execution:
    """The steps of one sampler.

    Args:
        parts: what the steps are made of.
        recorder: captures prepared steps; None runs them as they are.
        backend: of ``torch.compile``.
        region: what is compiled, whole steps or the denoiser's blocks
        (``dpfast.generate.runtime.regional``).
    """

    def __init__(
        self,
        parts: StepParts,
        *,
        recorder: Recorder | None = None,
        backend: str | Callable = "inductor",
        region: Region = "step",
    ) -> None:
        self.parts, self.recorder, self.backend, self.region = parts, recorder, backend, region
        self.batch: int | None = (
            None  # the size that prepared steps take; None: eager steps of any size
        )
        self.compiled = False
        self._functions: dict[Variant | str, Callable[..., Any]] = {}

    def prepare(self, batch: int, *, compile: bool) -> None:
        """From here on, batches of up to ``batch`` run compiled (``compile``) and captured (with a
        recorder).
        """
        if (self.batch, self.compiled) != (batch, compile):
            self.close()
            self.batch, self.compiled = batch, compile

    def filling(self, size: int) -> int:
        """How many rows a batch of ``size`` is filled up by."""
        return 0 if self.batch is None else self.batch - size

    def step(self, variant: Variant, inputs: StepInputs) -> StepOutputs:
        return self._function(variant, str(variant))(*inputs)

    def finish(self, latents: Tensor) -> Finished:
        return self._function("finish", "decoding")(latents)

    def _function(self, key: Variant | str, name: str) -> Callable[..., Any]:
        if key not in self._functions:
            function: Callable[..., Any]
            parts = self._by_blocks if self.compiled and self.region == "blocks" else self.parts
            function = (
                step_function(parts, key) if isinstance(key, Variant) else finish_function(parts)
            )
            if self.compiled and self.region == "step":
                function = self._compile(function)
            if self.batch is not None and self.recorder is not None:
                function = Captured(function, self.recorder, watched=self._weights, name=name)
            self._functions[key] = function
        return self._functions[key]

    @cached_property
    def _by_blocks(self) -> StepParts:
        parts = self.parts
        twin, path = regional(parts.denoiser, self._compile), parts.path
        if path is not None:
            recompute = path.denoiser is not parts.denoiser  # within a memory budget
            guiding = regional(parts.denoiser, self._compile, recompute=True) if recompute else twin
            path = replace(path, denoiser=guiding, taped=True)
        return replace(parts, denoiser=twin, path=path, cache=parts.cache and FeatureCache(twin))

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(
            with_own_code(function), fullgraph=True, dynamic=False, backend=self.backend
        )

    def _weights(self) -> Iterable[Tensor]:
        """What of the learner a capture reads in place; the generator's own weights are frozen."""
        learner = None if self.parts.path is None else self.parts.path.learner
        if isinstance(learner, nn.Module):
            yield from learner.parameters()
            yield from learner.buffers()

    def refresh(self) -> None:
        """At the start of a batch: captures follow weights that were replaced instead of updated in
        place.
        """
        for function in self._functions.values():
            if isinstance(function, Captured):
                function.refresh()

    @property
    def fallbacks(self) -> dict[str, str]:
        """Why steps are not captured although a recorder is there: name of the step -> reason."""
        captured = (
            function for function in self._functions.values() if isinstance(function, Captured)
        )
        return {
            function.name: function.reason for function in captured if function.reason is not None
        }

    def release(self) -> None:
        """Releases captures; the steps stay compiled and prepared, and are captured anew when they
        run.
        """
        for function in self._functions.values():
            if isinstance(function, Captured):
                function.close()

    def close(self) -> None:
        """Releases compiled and captured steps; what runs next is eager."""
        self.release()
        self._functions.clear()
        self.batch, self.compiled = None, False
