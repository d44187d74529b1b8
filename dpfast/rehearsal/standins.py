"""The stand-ins of a rehearsal for a GPU's own parts, all of them here.

A stand-in does nothing but what the account needs: streams and events order nothing (all operations
run at once, in the order of the host), kernels that are not registered with torch write nothing,
chunks of the pool have a size and no bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import adam

from dpfast.hardware import device as devices
from dpfast.ops import chunk_rows, crop
from dpfast.ops.dispatch import CPU
from dpfast.pool import snapshot
from dpfast.pool.memory_tiers import MemoryTiers
from dpfast.rehearsal.autocast import MetaAutocast
from dpfast.rehearsal.device import META, FakeDevice

FREE = 1 << 40  # so that nothing adapts within a walk: what fits was settled before


class _Stream:
    """A stream and an event in one: whoever waits for it has what it waits for."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def record_event(self, *_: object) -> _Stream:
        return self

    def record(self, *_: object) -> None: ...

    def wait_event(self, *_: object) -> None: ...

    def wait_stream(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...


class _Kernel:
    """A Triton kernel that is launched and writes nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_, **__: None


@contextlib.contextmanager
def put(values: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Puts ``value`` under ``name`` of each ``owner`` within a ``with`` block, for ``values`` of
    (owner, name, value).
    """
    before = []
    try:
        for owner, name, value in values:
            getattr(owner, name)  # what is not there any more must not be stood in for
            before.append((owner, name, vars(owner).get(name, _MISSING)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            delattr(owner, name) if value is _MISSING else setattr(owner, name, value)


_MISSING = object()


@contextlib.contextmanager
def stand_ins(device: FakeDevice, *, gpu: bool = True) -> Iterator[None]:
    """Lets the meta device be taken, within a ``with`` block, for a GPU with ``FREE`` bytes, or
    without ``gpu`` for a CPU.

    Nothing of it outlives the context.
    """
    autocast = torch.autocast

    def cast(
        kind: str, dtype: Any = None, enabled: bool = True, cache_enabled: bool | None = None
    ) -> Any:
        if kind != "meta":
            return autocast(kind, dtype, enabled, cache_enabled)
        return (
            MetaAutocast(cache_enabled=cache_enabled is not False)
            if enabled
            else contextlib.nullcontext()
        )

    def allocate(tiers: MemoryTiers, name: str, size: int) -> Tensor:
        if name == "device":
            with device.kind("pool"):
                return torch.empty(size, dtype=torch.uint8, device=META)
        return torch.empty(size, dtype=torch.uint8, device=META)

    take = chunk_rows.take_rows

    def taken(table: chunk_rows.ChunkTable, indices: Tensor, total: int, **options: Any) -> Tensor:
        """Returns the bytes that a thread that saves samples reads out of the device's memory:
        zeros, without an operation there.
        """
        if "meta" not in table.kinds or options.get("device", CPU) != CPU:
            return take(table, indices, total, **options)
        return torch.zeros(len(indices), options.get("width") or table.stride, dtype=torch.uint8)

    values: list[tuple[Any, str, Any]] = [
        (devices, "GPUS", {"cuda", "meta"} if gpu else set()),
        (torch, "autocast", cast),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "Event", _Stream),
        (torch.cuda, "current_stream", _Stream),
        (torch.cuda, "stream", lambda _: contextlib.nullcontext()),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", lambda *_: None),
        (torch.cuda, "mem_get_info", lambda *_: (FREE, FREE)),
        (torch.cuda, "max_memory_allocated", lambda *_: device.total),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "get_device_name", lambda *_: "a rehearsed GPU"),
        (Tensor, "record_stream", lambda *_: None),
        (adam, "_device_dtype_check_for_fused", lambda *_, **__: None),
        (chunk_rows, "chunk_rows_kernel", _Kernel()),
        (crop, "crop_kernel", _Kernel()),
        (chunk_rows.ChunkTable, "read_by", lambda table, where: where.type == "meta"),
        (snapshot, "take_rows", taken),
        (MemoryTiers, "allocate", allocate),
    ]
    with put(values):
        yield
