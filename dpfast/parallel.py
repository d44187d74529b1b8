"""Several processes as one run: torchrun's ranks, what each of them makes, and how they agree.

    torchrun --nproc-per-node 8 -m dpfast run imagenet1k-sd15 --generator DIR --validation DIR

Work is dealt in batches: batch k of a round, or of a set of real images, belongs to rank (turn + k) mod ranks. A batch
holds the same samples on any number of ranks, so the images are the same bits. Everything that decides (accuracies,
patience, the order of training) is a function of what all ranks know, and every rank decides alike.

NCCL moves what lies on GPUs, gloo what lies on a CPU. One process alone has no group, and nothing here costs it time.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import dpfast
from dpfast.config import RecipeError

TIMEOUT = (
    600.0  # seconds that ranks wait for each other; the slowest thing that they wait for is a compiled first batch
)
ANSWER = 5.0  # seconds, after a failure, in which a rank that lives says so
AHEAD = 60.0  # seconds by which a lost rank is noticed before NCCL's watchdog would end the process without a word
POLL = 0.005  # seconds between two looks at what others have said
FAILURES = (
    ArithmeticError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)  # no request to stop
LOST = ("gloo", "NCCL", "Connection", "connection", "Timed out", "timed out")  # in the errors of a broken collective


class RankError(RuntimeError):
    """A rank does not answer; the message names it."""


@dataclass(eq=False)
class Ranks:
    """This process among those of a run. The default is one process alone.

    rank, size: of all processes; local_rank, local_size: of those on this machine; timeout: seconds. learn: the group
    of gradients, None for all processes; control, feed: groups beside it, for what the loop says on the CPU and, by the
    device of what is sent, for the loaders, whose threads talk meanwhile.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    timeout: float = TIMEOUT
    learn: Any = None
    control: Any = None
    feed: dict[str, Any] = field(default_factory=dict)
    store: Any = None
    _asked: int = field(default=0, init=False)

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and shows progress."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def batches(
        self, count: int, batch: int, *, turn: int = 0, done: int = 0, rank: int | None = None
    ) -> Iterator[range]:
        """The places in [0, count) that belong to this rank, or to ``rank``, a batch at a time.

        turn: the rank of the first batch; done: so many of the rank's own places are left out.
        """
        first = ((self.rank if rank is None else rank) - turn) % self.size
        for start in range(first * batch, count, self.size * batch):
            places = range(start, min(start + batch, count))
            if done < len(places):
                yield places[done:]
            done = max(done - len(places), 0)

    def share(self, count: int, batch: int, *, turn: int = 0, rank: int | None = None) -> int:
        """How many places ``batches`` gives."""
        first = ((self.rank if rank is None else rank) - turn) % self.size
        whole, rest = divmod(count, batch)
        mine = max(-(-(whole - first) // self.size), 0) * batch
        return mine + (rest if whole % self.size == first else 0)

    def places(self, count: int, batch: int, *, turn: int = 0, done: int = 0, rank: int | None = None) -> Tensor:
        """(n,) int64, what ``batches`` gives, as one tensor."""
        parts = [torch.arange(p.start, p.stop) for p in self.batches(count, batch, turn=turn, done=done, rank=rank)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def part(self, count: int, rank: int | None = None) -> Tensor:
        """(count / size,) places of a training batch of ``count`` that this rank, or ``rank``, learns from.

        A stretch of the first half and its mirror image of the second: sample i is mixed with sample count - 1 - i, and
        so both are on one rank, in the mirrored places of its part.
        """
        rank = self.rank if rank is None else rank
        half = count // (2 * self.size)
        if self.alone:
            return torch.arange(count)
        front = torch.arange(rank * half, (rank + 1) * half)
        return torch.cat([front, count - 1 - front.flip(0)])

    def gather(self, values: Tensor, count: int, batch: int, *, turn: int = 0) -> Tensor:
        """(count, ...) on the CPU, in order: each rank gives the rows of its own ``places``. The bits are kept."""
        if self.alone:
            return values.cpu()
        owned = [self.places(count, batch, turn=turn, rank=rank) for rank in range(self.size)]
        most = max(map(len, owned))
        padded = torch.zeros(most, *values.shape[1:], dtype=values.dtype)
        padded[: len(values)] = values.cpu()
        parts = [torch.empty_like(padded) for _ in owned]
        dist.all_gather(parts, padded, group=self.control)
        every = torch.empty(count, *values.shape[1:], dtype=values.dtype)
        for places, part in zip(owned, parts, strict=True):
            every[places] = part[: len(places)]
        return every

    def each(self, value: Tensor) -> Tensor:
        """(size, ...) on the CPU: every rank's ``value``, all of one shape."""
        if self.alone:
            return value.cpu()[None]
        parts = [torch.empty(value.shape, dtype=value.dtype) for _ in range(self.size)]
        dist.all_gather(parts, value.detach().cpu().contiguous(), group=self.control)
        return torch.stack(parts)

    def total(self, number: float) -> float:
        """The sum over ranks of a number; exact for integers below 2^53."""
        return number if self.alone else float(self.each(torch.tensor(number, dtype=torch.float64)).sum())

    def most(self, number: float) -> float:
        """The largest of the ranks' numbers."""
        return number if self.alone else float(self.each(torch.tensor(number, dtype=torch.float64)).max())

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank."""
        if self.alone:
            return flag
        flags = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return bool(flags)

    def everyone(self, value: Any) -> list[Any]:
        """Every rank's ``value``, which JSON can hold. Raises ``RankError`` that names a rank which does not answer."""
        if self.alone:
            return [value]
        self._asked += 1
        self.store.set(f"{self._asked}/{self.rank}", json.dumps(value))
        deadline, said = time.monotonic() + self.timeout, []
        for rank in range(self.size):
            while not self.store.check([f"{self._asked}/{rank}"]):  # not a wait of the store's: signals get through
                if time.monotonic() > deadline:
                    raise RankError(f"rank {rank} of {self.size} did not answer within {self.timeout:g} s (--timeout)")
                time.sleep(POLL)
            said.append(json.loads(self.store.get(f"{self._asked}/{rank}")))
        return said

    def of_first(self, value: Any) -> Any:
        """What rank 0 says; JSON can hold it."""
        return self.everyone(value if self.first else None)[0]

    def same(self, what: str, value: Any) -> None:
        """Raises ``RecipeError`` on every rank unless all have the same ``value``, which JSON can hold."""
        values = self.everyone(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise RecipeError(f"{what}: rank {rank} has {other}, rank 0 has {values[0]}; all ranks need the same")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All ranks succeed, or none: a ``RecipeError`` on one of them is raised on all, after the same words.

        Another error is raised where it was, and named by a ``RankError`` elsewhere.
        """
        failure: BaseException | None = None
        try:
            yield
        except FAILURES as error:
            failure = error
            if self.alone:
                raise
        said = self.everyone(None if failure is None else [isinstance(failure, RecipeError), str(failure)])
        for rank, words in enumerate(said):
            if words is None:
                continue
            usable, message = words
            where = "" if rank == 0 else f"rank {rank}: "
            if usable:
                raise RecipeError(f"{where}{message}") from failure
            raise failure or RankError(f"rank {rank} of {self.size}: {message}")

    def absent(self, given_up: Callable[[], bool] = lambda: False) -> list[int]:
        """A roll call after a failure: the ranks that do not answer. Ends early when ``given_up`` says so."""
        self.store.set(f"here/{self.rank}", "1")
        deadline, missing = time.monotonic() + ANSWER, list(range(self.size))
        while missing and time.monotonic() < deadline and not given_up():
            missing = [rank for rank in missing if not self.store.check([f"here/{rank}"])]
            time.sleep(0.05)
        return missing

    @contextlib.contextmanager
    def watched(self, given_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Turns the error of a broken collective into a ``RankError`` that names who is missing."""
        try:
            yield
        except RuntimeError as error:
            if self.alone or isinstance(error, RankError) or not any(word in str(error) for word in LOST):
                raise
            missing = self.absent(given_up)
            if not missing:
                raise
            named = ", ".join(map(str, missing))
            raise RankError(
                f"rank{'s' if len(missing) > 1 else ''} {named} of {self.size} did not answer: dead, or hung for "
                f"{self.timeout:g} s (--timeout)"
            ) from error

    def parted(self, makers: int) -> tuple[Ranks, Ranks, Any]:
        """The ranks but the last ``makers``, those, and the group of rank 0 and those. All ranks call it together.

        A rank has its number in the part that it is of, and 0 in the other.
        """
        cut, cuda = self.size - makers, "cuda" in self.feed
        wait, parts = _wait(self.timeout, cuda), []
        for name, members in (("others", range(cut)), ("makers", range(cut, self.size))):
            learn = dist.new_group(list(members), timeout=wait)
            control, feed = _groups(members, self.timeout, cuda)
            rank = members.index(self.rank) if self.rank in members else 0
            store = dist.PrefixStore(name, self.store)
            part = replace(self, rank=rank, size=len(members), learn=learn, control=control, feed=feed, store=store)
            parts.append(part)
        return parts[0], parts[1], dist.new_group([0, *range(cut, self.size)], timeout=wait)


ALONE = Ranks()


def versions() -> dict[str, str]:
    """Of what all ranks need the same: the packages that make images and weights."""
    return {
        "dpfast": dpfast.__version__,
        **{name: metadata.version(name) for name in ("torch", "diffusers", "transformers")},
    }


def launched() -> tuple[int, int]:
    """(rank, ranks) as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def restarts() -> int:
    """How often torchrun has started this group again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch() -> str:
    """A name for one call of torchrun, over its restarts; empty without torchrun."""
    return f"{socket.gethostname()} {os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else ""


def _wait(timeout: float, cuda: bool) -> datetime.timedelta:
    """How long a collective waits: on a GPU longer than those on the CPU beside it, whose errors say more."""
    return datetime.timedelta(seconds=timeout + (AHEAD if cuda else 0))


def _groups(members: Iterable[int], timeout: float, cuda: bool) -> tuple[Any, dict[str, Any]]:
    """``control`` and ``feed`` of ``Ranks``. Each is told how long to wait: torch's own choice is half an hour."""

    def group(backend: str) -> Any:
        return dist.new_group(list(members), timeout=_wait(timeout, backend == "nccl"), backend=backend)

    return group("gloo"), {"cpu": group("gloo"), **({"cuda": group("nccl")} if cuda else {})}


@contextlib.contextmanager
def joined(*, cuda: bool | None = None, timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """The ranks that torchrun started, within it as process groups; without torchrun one process alone.

    cuda: whether the run is on GPUs; None: where there are any. timeout: seconds that ranks wait for each other.
    """
    rank, size = launched()
    if size == 1:
        yield Ranks()
        return
    cuda = torch.cuda.is_available() if cuda is None else cuda
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local)
    wait = datetime.timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", timeout=wait))
    store.set_timeout(wait)
    store = dist.PrefixStore(f"start-{restarts()}", store)  # torchrun's store still knows what the last start said
    ranks = Ranks(
        rank=rank,
        size=size,
        local_rank=local,
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        timeout=timeout,
        store=dist.PrefixStore("said", store),
    )
    ranks.everyone("here")  # names who is not; what follows would not
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("groups", store),
        rank=rank,
        world_size=size,
        timeout=_wait(timeout, cuda),
    )
    ranks.control, ranks.feed = _groups(range(size), timeout, cuda)
    yield ranks
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone
