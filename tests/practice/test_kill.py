"""kill -9 and SIGTERM of a real process: resumed, it ends in the bits of an undisturbed run
(DPFAST_KILLS=20).
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpfast.pool.reader import open_pool

KILLS = int(os.environ.get("DPFAST_KILLS", "0"))
pytestmark = pytest.mark.skipif(
    not KILLS, reason="takes minutes; DPFAST_KILLS=20 kills twenty times"
)
DEADLINE = 600  # seconds, generous: other work may have the machine
FIELDS = {
    "sources": "dp,static",
    "steps": 4,
    "initial_samples": 60,
    "round_samples": 30,
    "maximum_samples": 150,
    "generator.batch_size": 20,
    "iterations": 60,
    "evaluate_every": 5,
    "patience_growth": "fixed",
    "checkpoint_minutes": 0.0005,  # between evaluations as well
}


def start(folder: Path, *extra: str) -> subprocess.Popen:
    fields = [
        text
        for name, value in FIELDS.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    command = [
        sys.executable,
        "-m",
        "dpfast.cli.main",
        "run",
        "fashion",
        "--quiet",
        "--out",
        str(folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with said(folder).open("w") as file:  # not a pipe: nobody reads while the test waits
        return subprocess.Popen(
            [*command, *fields, *extra], stdout=file, stderr=file, env=environment
        )


def said(folder: Path) -> Path:
    return folder.with_suffix(".log")


def begun(process: subprocess.Popen, folder: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while process.poll() is None and not list(folder.glob("checkpoints_dp/checkpoint-*.json")):
        assert time.monotonic() < deadline, said(folder).read_text()
        time.sleep(0.02)


def ended(process: subprocess.Popen, folder: Path) -> None:
    code = process.wait(DEADLINE)
    assert code == 0, f"exit code {code}: {said(folder).read_text()}"


def same(folder: Path, whole: Path) -> None:
    assert (folder / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    for source in ("dp", "static"):
        a, b = (open_pool(path / f"pool_{source}") for path in (folder, whole))
        assert len(a) == len(b), source
        for column in a.records().dtype.names:
            assert a.records()[column].tobytes() == b.records()[column].tobytes(), (
                f"{source}: {column}"
            )
        rows = torch.arange(len(a))
        assert torch.equal(a.payload(rows), b.payload(rows)), f"{source}: pixels"
        mine, theirs = (
            load_file(path / f"learner_{source}.safetensors") for path in (folder, whole)
        )
        assert mine.keys() == theirs.keys(), source
        differing = [key for key in theirs if not torch.equal(mine[key], theirs[key])]
        assert not differing, f"{source}: {', '.join(differing)}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = start(folder)
    begun(process, folder)
    started = time.monotonic()
    ended(process, folder)
    return folder, time.monotonic() - started


@pytest.mark.parametrize("number", range(KILLS))
def test_kill_9_and_resume_gives_the_same_bits(whole, tmp_path, number):
    reference, seconds = whole
    process = start(tmp_path / "run")
    begun(process, tmp_path / "run")
    time.sleep(random.Random(number).uniform(0, seconds))
    process.kill()
    # 0: it was a little faster than the first one
    assert process.wait(DEADLINE) in (
        -signal.SIGKILL,
        0,
    )
    ended(start(tmp_path / "run", "--resume"), tmp_path / "run")
    same(tmp_path / "run", reference)


def test_sigterm_saves_and_exits_0(whole, tmp_path):
    reference, seconds = whole
    process = start(tmp_path / "run")
    begun(process, tmp_path / "run")
    time.sleep(0.3 * seconds)
    process.send_signal(signal.SIGTERM)
    ended(process, tmp_path / "run")
    assert "--resume" in said(tmp_path / "run").read_text()
    ended(start(tmp_path / "run", "--resume"), tmp_path / "run")
    same(tmp_path / "run", reference)
