"""The processes that torchrun started: who they are, and how they find each other."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from importlib import metadata

import torch
import torch.distributed as dist

from dpfast import launch
from dpfast.parallel.groups import Group
from dpfast.parallel.heartbeat import TIMEOUT, Heartbeat, Presence
from dpfast.parallel.ranks import Ranks, patience, side_groups
from dpfast.parallel.rendezvous import meet
from dpfast.version import __version__


def versions() -> dict[str, str]:
    """Returns the versions of the packages that make images and weights, which all ranks need the
    same.
    """
    return {
        "dpfast": __version__,
        **{name: metadata.version(name) for name in ("torch", "diffusers", "transformers")},
    }


@contextlib.contextmanager
def process_group(*, cuda: bool | None = None, timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """Gives the ranks that torchrun started, as process groups within a ``with`` block; without
    torchrun one process alone.

    cuda: whether the run is on GPUs; None: where there are any. timeout: seconds without progress
    after which a rank counts as dead.
    """
    rank, size = launch.rank(), launch.world_size()
    if size == 1:
        yield Ranks(restarted=launch.restarts() > 0)
        return
    cuda = torch.cuda.is_available() if cuda is None else cuda
    local = launch.local_rank()
    if cuda:
        torch.cuda.set_device(local)
    wait = datetime.timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", timeout=wait))
    store.set_timeout(wait)
    start = meet(
        dist.PrefixStore("rendezvous", store), rank, size, timeout, failures=launch.restarts()
    )
    store = dist.PrefixStore(start.name, store)
    ranks = Ranks(
        rank=rank,
        size=size,
        local_rank=local,
        local_size=launch.local_world_size(),
        heartbeat=Heartbeat(dist.PrefixStore("progress", store), rank, size, timeout),
        store=dist.PrefixStore("said", store),
        restarted=start.again,
    )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("groups", store),
        rank=rank,
        world_size=size,
        timeout=patience(timeout, cuda),
    )
    ranks.learn = Group("learn")
    ranks.control, ranks.feed = side_groups(range(size), timeout, ranks.learn, cuda)
    presence = Presence(ranks.heartbeat)
    if cuda:
        presence.start()
    try:
        yield ranks
    except BaseException as error:
        ranks.heartbeat.leave(error)
        raise
    finally:
        presence.stop()
    ranks.heartbeat.leave(None)
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone
