"""The division of work among the ranks of a run, and their agreement.

What is short they say through torchrun's store, tensors through gloo once all are ready:
``dpfast.parallel.heartbeat``.

Batches are dealt before they are made, evenly: who holds a sample is then arithmetic, in the pool,
in a checkpoint and on another number of ranks. The price is that all wait for the slowest. With one
GPU 10 % slower than the others (it takes 1/0.9 of their time) they are idle for (W - 1)/W * 10 % of
a round, 8.8 % of the GPU hours of 8 ranks and 9.7 % of 32; dealing each batch to whoever is free
would leave 0 to one batch a rank, and cost a table of who made which batch in pool and checkpoint.
It would not help the training steps, which wait for that GPU alike. So a slow rank is named in the
log after each round (``dpfast.sources.costs``), to be replaced, and dealing stays even.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpfast.errors import InputError, RecipeError, first_line
from dpfast.parallel.groups import Group
from dpfast.parallel.heartbeat import AHEAD, Heartbeat, RankError, silent

ANSWER = 5.0  # seconds, after a failure, in which a rank that lives says so
FAILURES = (  # no request to stop
    ArithmeticError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
INPUT = {kind.__name__: kind for kind in (InputError, RecipeError)}
# in the errors of a broken collective
LOST = (
    "gloo",
    "NCCL",
    "Connection",
    "connection",
    "Timed out",
    "timed out",
)


@dataclass(eq=False)
class Ranks:
    """This process among those of a run. The default is one process alone.

    Attributes:
        rank: Number of this process among all of the run.
        size: Number of all processes.
        local_rank: Number of this process among those of its machine.
        local_size: Number of processes of this machine.
        learn: Group of gradients.
        control: Group of what the loop says on the CPU.
        feed: Groups of the loaders, by the device of what is sent. On a GPU it is ``learn`` itself
            (``dpfast.parallel.groups``).
        heartbeat: Progress of this process among all of the run.
        store: Store for what these ranks say.
        members: Numbers of these ranks among all processes; None: the same.
        restarted: True where torchrun has started the processes again.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    learn: Group = field(repr=False, default_factory=lambda: Group("learn"))
    control: Group = field(repr=False, default_factory=lambda: Group("control"))
    feed: dict[str, Group] = field(repr=False, default_factory=dict)
    heartbeat: Heartbeat = field(repr=False, default_factory=Heartbeat)
    store: Any = field(default=None, repr=False)
    members: tuple[int, ...] | None = field(default=None, repr=False)
    restarted: bool = field(default=False, repr=False)
    _asked: int = field(default=0, init=False, repr=False)

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def first(self) -> bool:
        """True for the rank that writes and shows progress."""
        return self.rank == 0

    @property
    def timeout(self) -> float:
        """The seconds without progress after which a rank counts as dead."""
        return self.heartbeat.timeout

    def process(self, rank: int) -> int:
        """Returns the number of ``rank`` among all processes of the run."""
        return rank if self.members is None else self.members[rank]

    def beat(self) -> None:
        """Tells the others that this rank has completed something: whoever waits for it goes on."""
        self.heartbeat.beat()

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def batches(
        self, count: int, batch: int, *, turn: int = 0, done: int = 0, rank: int | None = None
    ) -> Iterator[range]:
        """Yields the indices in [0, count) that belong to this rank, or to ``rank``, a batch at a
        time.

        turn: the rank of the first batch; done: so many of the rank's own indices are left out.
        """
        first = ((self.rank if rank is None else rank) - turn) % self.size
        for start in range(first * batch, count, self.size * batch):
            indices = range(start, min(start + batch, count))
            if done < len(indices):
                yield indices[done:]
            done = max(done - len(indices), 0)

    def share(self, count: int, batch: int, *, turn: int = 0, rank: int | None = None) -> int:
        """Counts the indices that ``batches`` gives."""
        first = ((self.rank if rank is None else rank) - turn) % self.size
        whole, rest = divmod(count, batch)
        mine = max(-(-(whole - first) // self.size), 0) * batch
        return mine + (rest if whole % self.size == first else 0)

    def indices(
        self, count: int, batch: int, *, turn: int = 0, done: int = 0, rank: int | None = None
    ) -> Tensor:
        """Returns (n,) int64, what ``batches`` gives, as one tensor."""
        parts = [
            torch.arange(p.start, p.stop)
            for p in self.batches(count, batch, turn=turn, done=done, rank=rank)
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def part(self, count: int, rank: int | None = None) -> Tensor:
        """Returns (count / size,) indices of a training batch of ``count`` that this rank, or
        ``rank``, learns from.

        A stretch of the first half and its mirror image of the second: sample i is mixed with
        sample count - 1 - i, and so both are on one rank, in mirrored positions of its part.
        """
        rank = self.rank if rank is None else rank
        half = count // (2 * self.size)
        if self.alone:
            return torch.arange(count)
        front = torch.arange(rank * half, (rank + 1) * half)
        return torch.cat([front, count - 1 - front.flip(0)])

    def gather(self, values: Tensor, count: int, batch: int, *, turn: int = 0) -> Tensor:
        """Returns (count, ...) on the CPU, in order: each rank gives the rows of its own
        ``indices``. The bits are kept.
        """
        if self.alone:
            return values.cpu()
        owned = [self.indices(count, batch, turn=turn, rank=rank) for rank in range(self.size)]
        most = max(map(len, owned))
        padded = torch.zeros(most, *values.shape[1:], dtype=values.dtype)
        padded[: len(values)] = values.cpu()
        self.ready()
        parts = self.control.all_gather(padded)
        every = torch.empty(count, *values.shape[1:], dtype=values.dtype)
        for indices, part in zip(owned, parts, strict=True):
            every[indices] = part[: len(indices)]
        return every

    def all_gather(self, value: Tensor) -> Tensor:
        """Returns (size, ...) on the CPU: every rank's ``value``, all of one shape."""
        if self.alone:
            return value.cpu()[None]
        self.ready()
        return torch.stack(self.control.all_gather(value.detach().cpu().contiguous()))

    def total(self, number: float) -> float:
        """Returns the sum over ranks of a number; exact for integers below 2^53."""
        return number if self.alone else float(sum(self.all_gather_object(number)))

    def most(self, number: float) -> float:
        """Returns the largest of the ranks' numbers."""
        return number if self.alone else float(max(self.all_gather_object(number)))

    def any(self, flag: bool) -> bool:
        """Returns True on every rank if ``flag`` is true on any."""
        return any(self.all_gather_object(flag))

    def ready(self) -> None:
        """Returns when all ranks have come here, as late as they may. Raises ``RankError`` that
        names who is dead.
        """
        self.all_gather_object(None)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Returns every rank's ``value``, which JSON can hold. Raises ``RankError`` that names a
        rank which is dead.
        """
        if self.alone:
            return [value]
        self._asked += 1
        keys = [f"{self._asked}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], json.dumps(value))
        self.heartbeat.wait(
            lambda: self.store.check(keys),
            lambda: [
                self.process(rank) for rank, key in enumerate(keys) if not self.store.check([key])
            ],
        )
        said = [json.loads(words) for words in self.store.multi_get(keys)]
        if self._asked > 2:  # all have come here, so all have read what was said two times ago
            self.store.delete_key(f"{self._asked - 2}/{self.rank}")
        return said

    def broadcast_object(self, value: Any) -> Any:
        """Returns rank 0's ``value`` on every rank; JSON can hold it."""
        return self.all_gather_object(value if self.first else None)[0]

    def same(self, what: str, value: Any) -> None:
        """Raises ``InputError`` on every rank unless all have the same ``value``, which JSON can
        hold.
        """
        values = self.all_gather_object(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise InputError(
                    f"{what}: rank {rank} has {other}, "
                    f"rank 0 has {values[0]}; all ranks need the same"
                )

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Lets all ranks succeed, or none: an ``InputError`` on one of them is raised on all, with
        the same words.

        Another error is raised where it was, and named by a ``RankError`` elsewhere.
        """
        failure: BaseException | None = None
        try:
            yield
        except FAILURES as error:
            failure = error
            if self.alone:
                raise
        kind = next((name for name in reversed(INPUT) if isinstance(failure, INPUT[name])), None)
        said = self.all_gather_object(None if failure is None else [kind, str(failure)])
        for rank, words in enumerate(said):
            if words is None:
                continue
            kind, message = words
            where = "" if rank == 0 else f"rank {rank}: "
            if kind is not None:
                raise INPUT[kind](f"{where}{message}") from failure
            raise failure or RankError(f"rank {rank} of {self.size}: {message}")

    def absent(self, given_up: Callable[[], bool] = lambda: False) -> list[int]:
        """Returns a roll call after a failure: the ranks that do not answer. Ends early when
        ``given_up`` says so.
        """
        self.store.set(f"here/{self.rank}", "1")
        clock, missing = self.heartbeat.clock, list(range(self.size))
        deadline = clock.now() + ANSWER
        while missing and clock.now() < deadline and not given_up():
            missing = [rank for rank in missing if not self.store.check([f"here/{rank}"])]
            clock.sleep(0.05)
        return missing

    @contextlib.contextmanager
    def watched(self, given_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Turns the error of a broken collective into a ``RankError``: who is missing, or who left
        and why.
        """
        try:
            yield
        except RuntimeError as error:
            if (
                self.alone
                or isinstance(error, RankError)
                or not any(word in str(error) for word in LOST)
            ):
                raise
            words = f"{self}: a collective broke off: {first_line(error)}"
            with contextlib.suppress(RuntimeError):  # the store may be gone as well
                words = self._lost(given_up) or words
            raise RankError(words) from error

    def _lost(self, given_up: Callable[[], bool]) -> str:
        """Returns the reason why a collective broke: what a rank said when it ended, or who does
        not answer; empty where nobody knows.
        """

        def left() -> str:
            return next(
                filter(
                    None, (self.heartbeat.left(self.process(rank)) for rank in range(self.size))
                ),
                "",
            )

        missing = self.absent(lambda: given_up() or bool(left()))
        return left() or silent(
            [self.process(rank) for rank in missing], self.heartbeat.processes, self.timeout
        )

    def parted(self, makers: int) -> tuple[Ranks, Ranks, Group]:
        """Returns the ranks but the last ``makers``, those, and the group of rank 0 and those. All
        ranks call it together.

        A rank has its number in the part that it is of, and 0 in the other.
        """
        cut, cuda = self.size - makers, "cuda" in self.feed
        parts = []
        for name, members in (("others", range(cut)), ("makers", range(cut, self.size))):
            learn = Group(
                f"{name}/learn", dist.new_group(list(members), timeout=patience(self.timeout, cuda))
            )
            control, feed = side_groups(members, self.timeout, learn, cuda)
            rank = members.index(self.rank) if self.rank in members else 0
            part = replace(
                self,
                rank=rank,
                size=len(members),
                learn=learn,
                control=control,
                feed=feed,
                store=dist.PrefixStore(name, self.store),
                members=tuple(members),
            )
            parts.append(part)
        speaks = dist.new_group(
            [0, *range(cut, self.size)], timeout=patience(self.timeout, False), backend="gloo"
        )
        return parts[0], parts[1], Group("weights", speaks)


ALONE = Ranks()


def patience(timeout: float, cuda: bool) -> datetime.timedelta:
    """Returns the seconds that a collective waits: on a GPU longer than those on the CPU beside it,
    whose errors say more.
    """
    return datetime.timedelta(seconds=timeout + (AHEAD if cuda else 0))


def side_groups(
    members: Iterable[int], timeout: float, learn: Group, cuda: bool
) -> tuple[Group, dict[str, Group]]:
    """Returns ``control`` and ``feed`` of ``Ranks``. Each is told how long to wait: torch's own
    choice is half an hour.
    """

    def group(name: str) -> Group:
        return Group(
            name, dist.new_group(list(members), timeout=patience(timeout, False), backend="gloo")
        )

    return group("control"), feeds(group("feed"), learn, "cuda" if cuda else None)


def feeds(host: Group, learn: Group, device: str | None) -> dict[str, Group]:
    """Returns ``feed`` of ``Ranks``: what lies on a device goes through the communicator of the
    gradients, in one order.
    """
    return {"cpu": host} if device is None else {"cpu": host, device: learn}
