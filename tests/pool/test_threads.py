"""The pool's own threads beside the learner's."""

import subprocess
import sys

import pytest

COUNT = """
import os, sys, torch
from dpfast.pool.pool import SamplePool
from dpfast.pool.saver import Saver
from tests.pool.helpers import ORIGIN, batch

torch.set_num_threads(2)
torch.ones(1 << 22).mul_(2)  # torch's team is there
pool = SamplePool("pixels", shape=(3, 6, 6), chunk_bytes=8 << 20)
before = set(os.listdir("/proc/self/task"))
with Saver(pool, sys.argv[1]) as saver:
    pool.reserve(40_000)
    pool.append(batch(0, 40_000), round=0, **ORIGIN)
    saver.save()
    assert saver.wait() == 40_000
    print(len(set(os.listdir("/proc/self/task")) - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_chunks_and_saving_bring_no_second_team_of_openmp_threads(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 3  # the one that makes chunks, the saver, and its signs of life
