"""Who writes a folder: one process, known by host, number and start, on file systems that have no
``flock``.
"""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dpfast.pool import owner
from dpfast.pool.owner import OwnedError, Owner, owner_of
from dpfast.pool.pool import SamplePool
from dpfast.pool.saver import Saver
from tests.pool.helpers import ORIGIN, batch

HOLD = """
import sys, time
from pathlib import Path
from dpfast.pool.owner import Owner
print(Owner(Path(sys.argv[1])).number, flush=True)
time.sleep(600)
"""


def held(folder):
    """A process that writes ``folder``, once it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def elsewhere(folder, beats=False, number=0):
    """The owner's file of a process on another host, which gives signs of life or none."""
    folder.mkdir(exist_ok=True)
    path = folder / f".owner-{number:06d}"
    state = {**owner._process(os.getpid()), "host": "other", "name": "node-7"}

    def write(count):  # whole, as one pwrite of an owner is
        path.with_suffix(".new").write_text(json.dumps({**state, "beat": count, "ended": False}))
        path.with_suffix(".new").replace(path)

    write(0)
    if not beats:
        return lambda: None
    ended = threading.Event()

    def beat():
        count = 0
        while not ended.wait(0.02):
            count += 1
            write(count)

    thread = threading.Thread(target=beat)
    thread.start()
    return lambda: (ended.set(), thread.join())


def test_a_second_process_is_refused_by_name_and_a_killed_one_is_succeeded_at_once(tmp_path):
    process = held(tmp_path)
    with pytest.raises(OwnedError, match=rf"process {process.pid} on \S+ writes in"):
        Owner(tmp_path)
    process.kill()  # a zombie until somebody waits for it
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    started = time.monotonic()
    ours = Owner(tmp_path)
    assert time.monotonic() - started < owner.STALE / 2
    assert ours.number == 1
    assert [path.name for path in tmp_path.iterdir()] == [".owner-000001"]
    process.communicate()
    ours.close()
    assert owner_of(tmp_path) is None


def test_another_process_of_the_same_number_is_not_taken_for_the_one_that_ended(tmp_path):
    """After a reboot, or 4 million processes later."""
    state = owner._process(os.getpid())
    (tmp_path / ".owner-000004").write_text(
        json.dumps({**state, "start": "1", "beat": 0, "ended": False})
    )
    with_the_number = Owner(tmp_path)
    assert with_the_number.number == 5
    with_the_number.close()


def test_on_another_host_only_a_beat_that_stands_still_counts_as_death(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "STALE", 3.0)  # a busy machine's threads stand still for 1
    end = elsewhere(tmp_path / "lives", beats=True)
    with pytest.raises(OwnedError, match=r"process \d+ on node-7 writes in"):
        Owner(tmp_path / "lives")
    end()
    elsewhere(tmp_path / "dead")
    started = time.monotonic()
    Owner(tmp_path / "dead").close()
    assert time.monotonic() - started >= 3.0


def test_one_of_two_newcomers_gets_the_folder_of_a_dead_owner(tmp_path, monkeypatch):
    """Both find the same file stale; the next number is given once."""
    lives, barrier, results = owner._lives, threading.Barrier(8), []
    elsewhere(tmp_path)
    monkeypatch.setattr(owner, "STALE", 0.1)

    def together(path):
        alive = lives(path)
        barrier.wait()
        return alive

    def claim():
        try:
            results.append(Owner(tmp_path))
        except OwnedError as error:
            results.append(error)

    monkeypatch.setattr(owner, "_lives", together)
    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (ours,) = [result for result in results if isinstance(result, Owner)]
    ours.check()
    ours.close()


def test_an_owner_that_was_taken_for_dead_promises_nothing_more(tmp_path):
    pool = SamplePool()
    saver = Saver(pool, tmp_path)
    elsewhere(tmp_path, number=7)
    pool.append(batch(0, 5), round=0, **ORIGIN)
    saver.save()
    with pytest.warns(
        UserWarning, match=r"has been taken over by process \d+ on node-7; nothing more is written"
    ):
        saver.wait(20)
    assert not (tmp_path / "manifest.json").exists()
    saver.close()


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_flock_is_good_enough(tmp_path, monkeypatch, error):
    def refused(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(fcntl, "lockf", refused)
    with Saver(SamplePool(), tmp_path), pytest.raises(OwnedError, match="writes in"):
        Saver(SamplePool(), tmp_path)


def test_what_the_file_system_refuses_is_said_in_its_own_words(tmp_path, monkeypatch):
    opened = os.open

    def read_only(path, flags, *mode, **named):
        if ".owner-" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *mode, **named)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match="Read-only file system"):
        Saver(SamplePool(), Path(tmp_path))


def test_files_that_are_no_owners_count_for_nothing_and_stay(tmp_path):
    names = [".owner-x", ".owner-", ".owner-000007 (copy)", ".owner-9.bak", ".owner-12", "owner-3"]
    for name in names:
        (tmp_path / name).write_text("{}")
    Owner(tmp_path).close()
    assert owner_of(tmp_path) is None
    second = Owner(tmp_path)
    assert second.number == 1
    second.close()
    assert {path.name for path in tmp_path.iterdir()} == {*names, ".owner-000001"}


def test_the_highest_owner_is_so_by_its_number_and_not_by_its_name(tmp_path):
    for number in (999_999, 1_000_000):
        (tmp_path / f".owner-{number:06d}").write_text('{"ended": true}')
    owner = Owner(tmp_path)
    assert owner.number == 1_000_001
    owner.close()
    assert [path.name for path in tmp_path.iterdir()] == [".owner-1000001"]
