"""A process that forks children, each of which appends and saves until it is killed.

Forked children have torch imported already: a life of one costs milliseconds. Reads folders from
stdin, one a line; forks a child for each, prints its pid, and, once that has died, a line "dead".
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from dpfast.pool.pool import SamplePool
from dpfast.pool.reader import open_pool
from dpfast.pool.saver import Saver
from tests.pool.helpers import ORIGIN, batch


def live(folder: Path) -> None:
    """Continues the pool in ``folder``; ``promised`` counts the samples that ``wait`` has reported
    as saved.
    """
    pool = (
        open_pool(folder, chunk_bytes=4096) if (folder / "manifest.json").exists() else SamplePool()
    )
    promised = os.open(folder / "promised", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    saver = Saver(pool, folder, shard_samples=64)
    while True:
        pool.append(batch(len(pool), 50), round=0, **ORIGIN)
        saver.save()
        os.write(promised, f"{saver.wait()}\n".encode())


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            live(Path(line.strip()))
        print(child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)
