"""CUDA graphs of the sampler's steps: captured once, replayed for every step.

A capture fixes addresses, so each input has a private buffer that a call fills before the replay,
and outputs are copied out, because the next replay overwrites them. What a call closes over
(weights) is read where it was at capture: updates in place are seen, moved tensors are not, and
`Captured.refresh` notices them. All captures of a recorder share one memory pool; that is sound
because they replay one after the other on one stream and nothing but the copies outlives a replay.

`Recorder` is all that this file knows of a device. `tests/gpu` holds `CudaRecorder` against eager
steps; where there is no GPU the rules are tested with a recorder that re-executes the recorded
operations at their old addresses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from dpfast.errors import InputError, first_line
from dpfast.hardware.device import is_gpu
from dpfast.hardware.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)
WARM_UPS = 3  # Triton's and cuBLAS' choices and workspaces must exist before a capture


class Recording(Protocol):
    outputs: tuple[Tensor | None, ...]  # a named tuple, at fixed addresses

    def replay(self) -> None: ...

    def reset(self) -> None: ...


class Recorder(Protocol):
    def record(self, call: Callable[[], Any]) -> Recording:
        """Runs ``call`` to warm up, then records it. Inputs and weights stay alive as long as the
        recording.
        """
        ...

    def close(self) -> None:
        """Lets go of the pool, after its recordings were reset. The next recording opens a new
        one.
        """
        ...


class CudaRecording:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any) -> None:
        self.graph, self.outputs = graph, outputs

    def replay(self) -> None:
        self.graph.replay()

    def reset(self) -> None:
        self.graph.reset()
        self.outputs = ()


class CudaRecorder:
    """Captures on a side stream into one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool: Any = None

    def record(self, call: Callable[[], Any]) -> CudaRecording:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                call()
        current.wait_stream(self.stream)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # thread_local: a loader's thread may call CUDA during the capture
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            outputs = call()
        return CudaRecording(graph, outputs)

    def close(self) -> None:
        self.pool = None


def recorder_on(device: torch.device, wanted: bool | Recorder | None) -> Recorder | None:
    """Returns the recorder of a device; None where steps are not to be captured.

    wanted: True, False, None for where there is a GPU, or the recorder itself. Raises
    ``InputError`` for True without a GPU, ``TypeError`` for anything else.
    """
    if wanted is False or (wanted is None and not is_gpu(device)):
        return None
    if wanted is None or wanted is True:
        if not is_gpu(device):
            raise InputError(
                f"cuda_graphs = True: needs a pipeline on a GPU, this one is on {device}"
            )
        return CudaRecorder(device)
    if not callable(getattr(wanted, "record", None)):
        raise TypeError(f"cuda_graphs must be True, False, None or a recorder, got {wanted!r}")
    return wanted


def _signature(value: Any) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    return value


class Captured:
    """A function of tensors and constants to a named tuple of tensors, replayed from its capture.

    One signature (shapes, strides, dtypes, devices, constants) is held; another one releases it and
    captures anew. Where a capture fails the function runs eagerly from then on, and ``reason`` says
    why.

    Args:
        function: reads nothing on the host and allocates what it returns.
        watched: the tensors that the function closes over and whose addresses may change.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        recorder: Recorder,
        *,
        watched: Callable[[], Iterable[Tensor]] = tuple,
        name: str = "step",
    ) -> None:
        self.function = function
        self.recorder = recorder
        self.watched = watched
        self.name = name
        self.reason: str | None = None
        self.captures = 0
        self._signature: tuple[object, ...] | None = None
        self._addresses: tuple[int, ...] = ()
        self._buffers: list[Any] = []
        self._sources: list[tuple[Tensor, int] | None] = []
        self._recording: Recording | None = None

    def __call__(self, *inputs: Any) -> Any:
        """Returns fresh outputs, equal to ``function(*inputs)``; inputs are only read."""
        if self.reason is not None:
            return self.function(*inputs)
        signature = tuple(map(_signature, inputs))
        if self._recording is None or signature != self._signature:
            try:
                self._capture(signature, inputs)
            except Exception as error:
                self.close()
                if is_out_of_memory(error):
                    raise
                self.reason = f"{type(error).__name__}: {first_line(error)}"
                log.warning(
                    "the capture of the %s failed, it runs eagerly from here on: %s",
                    self.name,
                    self.reason,
                )
                return self.function(*inputs)
        else:
            self._fill(inputs)
        assert self._recording is not None
        self._recording.replay()
        outputs: Any = self._recording.outputs
        return outputs._make(None if value is None else value.clone() for value in outputs)

    def _capture(self, signature: tuple[object, ...], inputs: tuple[Any, ...]) -> None:
        self.close()
        self._buffers = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
        self._sources = [None] * len(inputs)
        self._addresses = self._watched_addresses()
        self._recording = self.recorder.record(lambda: self.function(*self._buffers))
        self._signature = signature
        self.captures += 1
        log.info("captured the %s, for the %d. time", self.name, self.captures)

    def _fill(self, inputs: tuple[Any, ...]) -> None:
        """Copies what differs from the last call: tables and labels stay, the state and the step's
        index change.
        """
        for at, (buffer, value) in enumerate(zip(self._buffers, inputs, strict=True)):
            if not isinstance(value, Tensor):
                continue
            # an inference tensor counts no versions
            source = None if value.is_inference() else (value, value._version)
            known = self._sources[at]
            if (
                known is None
                or source is None
                or known[0] is not source[0]
                or known[1] != source[1]
            ):
                buffer.copy_(value)
            self._sources[at] = source

    def _watched_addresses(self) -> tuple[int, ...]:
        return tuple(tensor.data_ptr() for tensor in self.watched())

    def refresh(self) -> None:
        """Releases the capture if a watched tensor has moved since. Costs a microsecond a tensor:
        once a batch.
        """
        if self._recording is not None and self._addresses != self._watched_addresses():
            log.info("weights of the %s have moved to another address: capturing anew", self.name)
            self.close()

    def close(self) -> None:
        """Releases the capture and its buffers. The next call captures anew."""
        if self._recording is not None:
            self._recording.reset()
        self._recording = None
        self._signature = None
        self._buffers = []
        self._sources = []
