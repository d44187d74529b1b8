"""One rank of many, without the others: a store in which they answer at once, groups whose
collectives they join.

What the others would say is what this rank says: they run the same loop. Every collective is
written down in its order (``dpfast.parallel.recorder``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dpfast.parallel import Ranks
from dpfast.parallel.groups import Group, Work
from dpfast.parallel.heartbeat import Heartbeat
from dpfast.parallel.ranks import feeds
from dpfast.parallel.recorder import CollectiveRecorder
from dpfast.rehearsal.device import META


class _Done:
    """An operation that has ended."""

    def wait(self) -> None: ...


@dataclass(frozen=True, eq=False)
class RehearsedGroup(Group):
    """A group of ``size`` ranks, this one in it; the others' tensors have the sizes of its own and
    no numbers.

    carried: the names of all groups that have moved what lies on the device.
    """

    size: int = 1
    carried: set[str] = field(default_factory=set)

    def all_gather(self, value: Tensor) -> list[Tensor]:
        self._note(value)
        return [value.clone() for _ in range(self.size)]

    def all_reduce(self, value: Tensor, *, wait: bool = True) -> Any:
        self._note(value)
        return value if wait else _Done()

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        self._note(rows)
        return rows.new_zeros(sum(received), *rows.shape[1:])

    def broadcast(self, value: Tensor, source: int, *, wait: bool = True) -> Work | None:
        self._note(value)
        return None if wait else _Done()

    def send(self, value: Tensor, rank: int) -> None:
        self._note(value)

    def receive(self, value: Tensor, rank: int) -> None:
        self._note(value)

    def _note(self, value: Tensor) -> None:
        if value.is_meta:
            self.carried.add(self.name)


class EchoStore:
    """A store in which every rank has said what this one says (``Ranks.all_gather_object``)."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self._said[key.split("/")[0]] = value

    def check(self, keys: Collection[str]) -> bool:
        return all(key.split("/")[0] in self._said for key in keys)

    def get(self, key: str) -> bytes:
        return self._said[key.split("/")[0]].encode()

    def multi_get(self, keys: Collection[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def delete_key(self, key: str) -> bool:
        return True


def ranks_of(
    count: int, rank: int, node: int, recorder: CollectiveRecorder, carried: set[str]
) -> Ranks:
    """Returns rank ``rank`` of ``count``, ``node`` of them on a machine; its collectives go to
    ``recorder``.

    carried: filled with the names of the groups that move what lies on the device.
    """
    if count == 1:
        return Ranks()

    def group(name: str) -> RehearsedGroup:
        return RehearsedGroup(name, size=count, carried=carried)

    ranks = Ranks(
        rank=rank,
        size=count,
        local_rank=rank % node,
        local_size=min(node, count),
        learn=group("learn"),
        control=group("control"),
        heartbeat=Heartbeat(EchoStore(), rank, count),
        store=EchoStore(),
    )
    ranks.feed = feeds(group("feed"), ranks.learn, META.type)
    recorder.record(ranks)
    return ranks
