"""The loader's own threads beside the learner's."""

import subprocess
import sys

import pytest

COUNT = """
import os, sys, torch
from dpfast.feed.augment import Augment
from dpfast.feed import make_loader
from dpfast.pool.pool import SamplePool
from tests.pool.helpers import ORIGIN, batch, latents

torch.set_num_threads(2)
weight = torch.ones(64, 4, 3, 3)
torch.nn.functional.conv2d(torch.ones(64, 4, 64, 64), weight).mul_(2)  # torch's teams are there
made, codec, size = batch(0, 200), *sys.argv[1:]
made.latents = latents(torch.arange(200))
decode = lambda z: torch.nn.functional.conv2d(z.repeat(1, 1, 20, 20), weight).tanh()[:, :3]
pool = SamplePool(codec, decode=decode)
pool.append(made, round=0, **ORIGIN)
before = set(os.listdir("/proc/self/task"))
augment = Augment(shift=2, flip=True, size=(int(size), int(size)) if size != "0" else None)
loader = make_loader("torch", pool, batch_size=64, seed=0, augment=augment)
for _ in range(40 if loader.on_demand else 4):
    next(loader)
print(len(set(os.listdir("/proc/self/task")) - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize(
    ("codec", "size", "threads"),
    [("pixels", 0, 0), ("pixels", 300, 1), ("jpeg", 0, 1), ("latents", 0, 0)],
    ids=["bursts", "large batches", "files", "latents"],
)
def test_batches_bring_no_second_team_of_openmp_threads(codec, size, threads):
    done = subprocess.run(
        [sys.executable, "-c", COUNT, codec, str(size)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == threads
