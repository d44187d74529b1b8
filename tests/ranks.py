"""Processes as torchrun starts them, for tests: ``spawned(2, work, folder)`` calls ``work(ranks,
folder)`` in each.
"""

import contextlib
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dpfast.parallel import process_group

AGENT = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
PORTS = iter(range(10_000 + os.getpid() % 1000 * 20, 32_000))  # of one process, of a thousand


def spawned(size, function, *arguments):
    """Raises what one of the processes raised."""
    # outlives a rank, as torchrun's does
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(_rank, (size, agent.port, function, arguments), nprocs=size)


def free_port():
    """A port that stays free until a rank listens there: each is given once, and lies below those
    that the system gives to connections of other processes.
    """
    for port in PORTS:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("", port))
            return port
    raise RuntimeError("no port is free")


def environment(rank, size, port):
    """What torchrun tells a process."""
    here = {
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return {key: str(value) for key, value in {"RANK": rank, "WORLD_SIZE": size, **here}.items()}


def _rank(rank, size, port, function, arguments):
    os.environ |= environment(rank, size, port) | AGENT
    torch.set_num_threads(1)
    with process_group(cuda=False, timeout=60) as ranks:
        function(ranks, *arguments)
