"""What a process knows of its launch, of the environments that torchrun gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from dpfast import launch


def test_without_torchrun_a_process_is_alone() -> None:
    assert launch.rank({}) == launch.local_rank({}) == launch.restarts({}) == 0
    assert launch.world_size({}) == launch.local_world_size({}) == 1
    assert launch.max_restarts({}) == 0
    assert launch.launch_name({}) == ""


def test_a_call_of_torchrun_has_one_name_over_its_restarts() -> None:
    first = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
    again = first | {"TORCHELASTIC_RESTART_COUNT": "1"}
    assert launch.launch_name(first) == launch.launch_name(again)
    assert launch.launch_name(first) == f"{socket.gethostname()} {os.getppid()}"
    assert launch.launch_name(first | {"TORCHELASTIC_RUN_ID": "job 7"}) == "job 7"
    assert launch.restarts(again) == 1


def test_the_launch_is_known_without_torch() -> None:
    code = "import sys, dpfast.launch; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
