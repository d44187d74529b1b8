"""The memory of captured CUDA graphs, without a GPU: a recorder for ``dpfast.generate.graphs``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpfast.rehearsal.device import FakeDevice


class RehearsedRecording:
    """A recording without a GPU. outputs: what the recorded call gave; a replay computes
    nothing.
    """

    def __init__(self, recorder: RehearsedRecorder, outputs: Any) -> None:
        self.recorder, self.outputs = recorder, outputs

    def replay(self) -> None:
        self.recorder.replays += 1

    def reset(self) -> None:
        self.outputs = ()
        self.recorder.forget()


class RehearsedRecorder:
    """Accounts for the private memory pool that the captures of one sampler share.

    A graph keeps all that its pool ever held, though its temporary tensors are gone: the pool is as
    large as the dearest capture beside the outputs of those before it, until the last graph is
    reset. The runs that warm a capture up come before it and do not find that pool: for a moment
    both are there.
    """

    def __init__(self, device: FakeDevice, name: str) -> None:
        self.device, self.kind = device, f"graphs of {name} steps"
        self.captures = self.replays = self.alive = 0
        self._pool = self._idle = 0  # bytes of the pool, and of those that no tensor stands for

    def record(self, call: Callable[[], Any]) -> RehearsedRecording:
        device = self.device
        before = self.device.total
        outputs_before = self._outputs
        with device.watermark() as top, device.kind(self.kind):
            outputs = call()
        self._pool = max(self._pool, outputs_before + top.peak - before)
        self._keep(max(self._pool - self._outputs, 0))
        self.captures += 1
        self.alive += 1
        return RehearsedRecording(self, outputs)

    def forget(self) -> None:
        """Forgets a recording that was reset."""
        self.alive -= 1
        if not self.alive:
            self._pool = 0
            self._keep(0)

    def close(self) -> None:
        """Does nothing: nothing is left when all recordings were reset."""

    @property
    def _outputs(self) -> int:
        return self.device.live[self.kind] - self._idle

    def _keep(self, idle: int) -> None:
        self.device.reserve(self.kind, idle - self._idle)
        self._idle = idle
