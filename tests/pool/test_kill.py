"""kill -9 at random moments of appending and saving: what the manifest promised is there, and
nothing else.
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from dpfast.pool.reader import open_pool
from tests.pool.helpers import check_prefix

KILLS = int(os.environ.get("DPFAST_KILLS", "60"))  # more on request


@pytest.fixture
def nursery():
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.pool.kill_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.communicate(timeout=20)


@pytest.mark.filterwarnings("error")
def test_reopening_after_kill_9_gives_a_consistent_prefix(nursery, tmp_path):
    """Each child continues where the one before it was killed; every ten kills a new folder."""
    moments, grown, before = random.Random(0), 0, 0
    for kill in range(KILLS):
        folder = tmp_path / str(kill // 10)
        folder.mkdir(exist_ok=True)
        before = before if kill % 10 else 0
        nursery.stdin.write(f"{folder}\n")
        nursery.stdin.flush()
        child = int(nursery.stdout.readline())
        size = (folder / "promised").stat().st_size if (folder / "promised").exists() else 0
        while kill % 2 and (
            not (folder / "promised").exists() or (folder / "promised").stat().st_size == size
        ):
            time.sleep(0.001)  # every second child gets to finish a save, however slow the machine
        time.sleep(moments.uniform(0.0, 0.08))
        os.kill(child, signal.SIGKILL)
        assert nursery.stdout.readline() == "dead\n"
        promises = (folder / "promised").read_text() if (folder / "promised").exists() else ""
        promised = int(promises.splitlines()[-1]) if promises else 0
        if not (folder / "manifest.json").exists():
            assert promised == 0
            continue
        pool = open_pool(folder, chunk_bytes=4096)
        assert len(pool) >= promised
        check_prefix(pool, len(pool))
        assert len(pool) >= before
        grown, before = grown + (len(pool) > before), len(pool)
    assert grown >= KILLS // 2
