"""The Slurm script: ``bash`` in place of ``sbatch``, Slurm's variables set, its commands played,
two "nodes".
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "slurm" / "dpfast.sbatch"
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys

command, nodes = sys.argv[1:], []
signal.signal(signal.SIGTERM, lambda *_: [node.terminate() for node in nodes])
while command[0].startswith("--"):
    command.pop(0)
for number in range(int(os.environ["SLURM_NNODES"])):
    nodes.append(subprocess.Popen(command, env=os.environ | {{"SLURM_NODEID": str(number)}}))
sys.exit(max(abs(node.wait()) for node in nodes))
"""
SCONTROL = """#!/bin/bash
echo "$@" >> scontrol
if [ "$1" = show ]; then printf 'localhost\\nsecond\\n'; fi
"""
TORCHRUN = """#!/bin/bash
echo "$@" > "torchrun-$SLURM_NODEID"
trap 'exit 1' TERM
while [ -f busy ]; do sleep 0.05; done
exit "${CODE:-0}"
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts the script; Slurm's commands are those above, torchrun is the real one without
    ``fake``.
    """
    folder = tmp_path / "bin"
    folder.mkdir()

    def start(*arguments, fake=True, **variables):
        played = {"srun": SRUN, "scontrol": SCONTROL, **({"torchrun": TORCHRUN} if fake else {})}
        for name, text in played.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        job = {
            "SLURM_JOB_ID": "17",
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "node[1-2]",
            **variables,
        }
        path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
        paths = {"PATH": path, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            ["bash", SCRIPT, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, **paths, **job},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def of_torchrun(folder, node):
    return (folder / f"torchrun-{node}").read_text().split()


def test_every_node_starts_torchrun_with_one_rendezvous(slurm, tmp_path):
    job = slurm("fashion", "run", "--seed", 3, SLURM_GPUS_ON_NODE="8")
    assert job.wait(30) == 0
    first, second = of_torchrun(tmp_path, 0), of_torchrun(tmp_path, 1)
    assert first == second
    options = dict(zip(first[:14:2], first[1:14:2], strict=True))
    assert options["--rdzv-endpoint"] == "localhost:29500"
    assert (options["--nnodes"], options["--nproc-per-node"], options["--rdzv-id"]) == (
        "2",
        "8",
        "17-0",
    )
    assert first[-8:] == ["-m", "dpfast", "run", "fashion", "--out", "run", "--seed", "3"]


def test_a_run_that_is_there_is_continued(slurm, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").touch()
    assert slurm("fashion", "run", SLURM_RESTART_COUNT="1").wait(30) == 0
    assert of_torchrun(tmp_path, 0)[-3:] == ["--out", "run", "--resume"]
    assert "17-1" in of_torchrun(tmp_path, 0)


@pytest.mark.parametrize("code", ["0", "1"])
def test_the_job_ends_as_the_run_does_and_is_not_queued_again(code, slurm, tmp_path):
    assert slurm("fashion", "run", CODE=code).wait(30) == int(code)
    assert "requeue" not in (tmp_path / "scontrol").read_text()


def test_before_the_time_limit_the_run_is_stopped_and_queued_again(slurm, tmp_path):
    (tmp_path / "busy").touch()
    job = slurm("fashion", "run")
    deadline = time.monotonic() + 30
    while not all((tmp_path / f"torchrun-{node}").is_file() for node in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)  # until bash waits
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 0
    assert "requeue 17" in (tmp_path / "scontrol").read_text()


@pytest.mark.slow
def test_two_nodes_of_one_process_each_make_a_run(slurm, tmp_path):
    small = {
        "initial-samples": 40,
        "maximum-samples": 60,
        "round-samples": 20,
        "iterations": 12,
        "evaluate-every": 4,
        "generator.batch-size": 20,
        "steps": 2,
        "sources": "dp",
    }
    options = [text for name, value in small.items() for text in (f"--{name}", value)]
    job = slurm(
        "fashion",
        "run",
        "--quiet",
        *options,
        fake=False,
        PORT=str(free_port()),
        SLURM_GPUS_ON_NODE="1",
    )
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said
    lines = [
        (tmp_path / "run" / "logs" / f"rank-{rank:05d}.jsonl").read_text().splitlines()
        for rank in (0, 1)
    ]
    assert [json.loads(part[-1])["event"] for part in lines] == ["end", "end"]
    assert said.count("Run folder with metrics") == 1
