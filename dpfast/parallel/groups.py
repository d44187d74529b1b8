"""Every collective of this package: tensors that the ranks of a group send each other.

Which collectives may be in flight together is settled here, for torch warns: "When using multiple
process groups with the NCCL backend, the user must ensure a globally consistent execution order of
collectives across ranks", and "once one or more async ops have been issued on one process group,
they must be synchronized with other cuda streams by calling work.wait() before using another
process group" (``torch.distributed.new_group``). A kernel of NCCL holds its part of the GPU until
all ranks have come. If one GPU runs communicator A and waits, while another runs communicator B and
waits, both may wait forever. So:

- A process uses one NCCL communicator, that of the gradients. The loader's exchange of samples goes
  through it, too (``Ranks.feed``). A communicator runs its operations one after the other on one
  stream, in the order of their issue.
- The main thread issues them: the loader's exchange within ``next``, then those of the step's
  forward and backward pass, each of which is waited for within its step. That order is a function
  of the recipe, and so the same on all ranks. The exchange starts behind the last step's
  all-reduces, and the next step's wait for it; between the two lies a forward pass beside which it
  goes on. (Derived: no GPU has run it with several ranks.)
- All else is on the host, through gloo: what the loop says, JPEG files, and the weights and samples
  of ranks that only generate. A group of gloo has connections and threads of its own, waits for no
  GPU and may overlap any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Work(Protocol):
    """An operation in flight."""

    def wait(self) -> Any: ...


@dataclass(frozen=True, eq=False)
class Group:
    """Some ranks, and the collectives that they call together.

    name: what a recorder calls it; one communicator has one name. handle: torch's process group,
    None for that of all processes. Ranks are numbered as in the whole run. A recorder or a
    simulation overrides the methods.
    """

    name: str
    handle: Any = None

    def all_gather(self, value: Tensor) -> list[Tensor]:
        """Returns every rank's ``value``; all have one shape and dtype."""
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size(self.handle))]
        dist.all_gather(parts, value, group=self.handle)
        return parts

    def all_reduce(self, value: Tensor, *, wait: bool = True) -> Work | None:
        """Writes the sum over ranks into ``value``; without ``wait`` in the background."""
        return _waited(dist.all_reduce(value, group=self.handle, async_op=True), wait)

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Returns (sum(received), ...) rows: of rank r ``received[r]``, which gets the next
        ``sent[r]`` of this rank's.
        """
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(
            out, rows.contiguous(), list(received), list(sent), group=self.handle
        )
        return out

    def broadcast(self, value: Tensor, source: int, *, wait: bool = True) -> Work | None:
        """Fills ``value`` with that of rank ``source``; without ``wait`` in the background."""
        return _waited(dist.broadcast(value, source, group=self.handle, async_op=True), wait)

    def send(self, value: Tensor, rank: int) -> None:
        dist.send(value.contiguous(), rank, group=self.handle)

    def receive(self, value: Tensor, rank: int) -> None:
        """Fills ``value`` with what ``rank`` sends."""
        dist.recv(value, rank, group=self.handle)


def _waited(work: Work | None, wait: bool) -> Work | None:
    if not wait or work is None:
        return work
    work.wait()
    return None
