"""A GPU without one: tensors on the meta device, and an account of what a GPU would hold and wait
for.

Everything that a run keeps on its GPU is a tensor of torch's meta device here: it has a shape and a
size and no numbers. ``FakeDevice`` sees every operation on them. It counts the bytes of their
storages by what they are kept for, remembers the largest sum of every phase, answers what the host
reads with ``scripted``, and records each such read and each blocking copy as a host wait: on a GPU
the host would stand still until the queue is empty.

What it does not see: workspaces inside a kernel, and the gaps of the caching allocator.
"""

from __future__ import annotations

import contextlib
import math
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LARGE = 1 << 26  # elements
META = torch.device("meta")
aten = torch.ops.aten
BESIDE = ("/rehearsal/device.py", "/rehearsal/autocast.py", "/hardware/flops.py")


def scripted(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """Returns the values that the host reads from a device without numbers: zeros, on the CPU;
    large ones without memory of their own.

    So every accuracy is 0, no evaluation but the first is a new best, every loss is finite, and no
    gradient is skipped.
    """
    shape = tuple(shape)
    return torch.zeros(shape if math.prod(shape) <= LARGE else (), dtype=dtype).expand(shape)


@dataclass(frozen=True)
class Wait:
    """One moment at which the host waited for the device.

    operation: what it asked for; where: "file:line function" of dpfast's caller; in_step: amid a
    step of training or sampling, whose kernels should follow each other without a gap.
    """

    phase: str
    in_step: bool
    operation: str
    where: str


@dataclass
class PhaseMemory:
    """The memory of a phase. peak: the most bytes of a phase at one moment; kinds: what they were
    kept for then.
    """

    peak: int = 0
    kinds: dict[str, int] = field(default_factory=dict)


class FakeDevice(TorchDispatchMode):
    """An account of operations on meta tensors within a ``with`` block.

    phases: name -> ``PhaseMemory``; waits: all host waits. ``phase`` and ``kind`` are context
    managers that name what happens within them; new storages are of the innermost kind, until
    ``claim`` says better.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.phases: dict[str, PhaseMemory] = {}
        self.waits: list[Wait] = []
        self._kind = "other"
        self._phase = "start"
        self._in_step = False
        self._total = 0
        self._prefix = ""
        self._known: dict[int, _Held] = {}
        self._watermarks: list[PhaseMemory] = []

    @property
    def total(self) -> int:
        """The bytes that are held now."""
        return self._total

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self._phase = self._phase, self._prefix + name
        self._note()
        try:
            yield
        finally:
            self._phase = before

    @contextlib.contextmanager
    def after_a_restart(self) -> Iterator[None]:
        """Counts phases within a ``with`` block as those of a run that goes on."""
        self._prefix = "restarted: "
        try:
            yield
        finally:
            self._prefix = ""

    @contextlib.contextmanager
    def kind(self, name: str) -> Iterator[None]:
        before, self._kind = self._kind, name
        try:
            yield
        finally:
            self._kind = before

    @contextlib.contextmanager
    def watermark(self) -> Iterator[PhaseMemory]:
        """Gives an object whose ``peak`` is the most bytes that were held at one moment of the
        ``with`` block.
        """
        top = PhaseMemory(self._total)
        self._watermarks.append(top)
        try:
            yield top
        finally:
            self._watermarks.remove(top)

    def step(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        """Returns ``function``, whose new storages are of a kind, as a step of a GPU: what waits
        within it is ``in_step``.
        """

        def run(*args: Any, **kwargs: Any) -> Any:
            before, self._in_step = self._in_step, True
            try:
                with self.kind(kind):
                    return function(*args, **kwargs)
            finally:
                self._in_step = before

        return run

    def claim(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Says what the storages of ``tensors`` are kept for."""
        for tensor in tensors:
            if tensor.device.type == "meta":
                held = self._hold(tensor)
                self.live[held.kind] -= held.size
                self.live[kind] += held.size
                held.kind = kind

    def claim_module(self, module: nn.Module, kind: str) -> None:
        """Claims the parameters and buffers of a module."""
        self.claim((*module.parameters(), *module.buffers()), kind)

    def reserve(self, kind: str, size: int) -> None:
        """Accounts for ``size`` bytes more (or fewer) that no tensor here stands for."""
        self.live[kind] += size
        self._total += size
        self._note()

    @contextlib.contextmanager
    def held(self, kind: str, size: int) -> Iterator[None]:
        """Reserves bytes as ``reserve`` does, within a ``with`` block."""
        self.reserve(kind, size)
        try:
            yield
        finally:
            self.reserve(kind, -size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            self._wait("a value")
            return scripted((), args[0].dtype).item()
        if func is aten._to_copy.default:
            target, source = kwargs.get("device"), args[0].device.type
            if target is not None and target.type != source:
                if not kwargs.get("non_blocking"):
                    self._wait(
                        f"a copy of {tuple(args[0].shape)} from {_side(source)} to "
                        f"{_side(target.type)}"
                    )
                if source == "meta":
                    return scripted(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and args[0].device.type != args[1].device.type:
            if not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
                self._wait(f"a copy of {tuple(args[1].shape)} to {_side(args[0].device.type)}")
            if args[1].is_meta:
                return args[0].zero_()
        out = func(*args, **kwargs)
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._hold(leaf)
        return out

    def _hold(self, tensor: Tensor) -> _Held:
        storage = tensor.untyped_storage()
        key = storage._cdata
        held = self._known.get(key)
        if held is None:

            def freed(_: object) -> None:
                gone = self._known.pop(key)
                self.live[gone.kind] -= gone.size
                self._total -= gone.size

            held = self._known[key] = _Held(
                self._kind, storage.nbytes(), weakref.ref(storage, freed)
            )
            self.live[held.kind] += held.size
            self._total += held.size
            self._note()
        return held

    def _note(self) -> None:
        memory = self.phases.setdefault(self._phase, PhaseMemory())
        if self._total > memory.peak:
            memory.peak = self._total
            memory.kinds = dict(self.live)
        for top in self._watermarks:
            top.peak = max(top.peak, self._total)

    def _wait(self, operation: str) -> None:
        self.waits.append(Wait(self._phase, self._in_step, operation, _caller()))


@dataclass
class _Held:
    kind: str
    size: int
    alive: Any


def _side(device: str) -> str:
    return "the device" if device == "meta" else "the host"


def _caller() -> str:
    """Returns the innermost line of dpfast on the stack, but for what only looks on."""
    for frame in reversed(traceback.extract_stack()):
        if "/dpfast/" in frame.filename and not frame.filename.endswith(BESIDE):
            return f"{frame.filename.rsplit('/dpfast/', 1)[1]}:{frame.lineno} {frame.name}"
    return "outside of dpfast"
