"""The sdist and the wheel that `make wheel` builds, installed where no checkout is."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from dpfast.ops import dispatch
from tests.test_imports import ROOT

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(dispatch.INTERPRETED, reason="describes a process outside the interpreter"),
]
MOST = 25e6  # bytes of either file
SHORT = "--initial-samples 40 --round-samples 20 --maximum-samples 60 --iterations 12"
SHORT += " --evaluate-every 4"
# What an environment adds to the packages of this one, not taking what is editable here.
PATHS = "import sysconfig; print(sysconfig.get_path('purelib'))"


def ran(arguments: list[str], folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | changes
    return subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, encoding="utf-8"
    )


def build(folder: Path, source: Path, *options: str, **changes: str) -> str:
    """What a build prints, without the network: by the setuptools and pybind11 that are here."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    built = ran([*command, *options, str(source)], folder, **changes)
    assert built.returncode == 0, built.stdout + built.stderr
    return built.stdout + built.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that was built from it."""
    for module in ("build", "pybind11", "setuptools"):
        pytest.importorskip(module, reason="builds them")
    folder = tmp_path_factory.mktemp("dist")
    build(folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


class Installed(NamedTuple):
    bin: Path
    packages: Path
    user: Path  # an empty folder, in which commands are given

    def dpfast(self, words: str) -> str:
        """What a command prints. It names no file of the checkout, and leaves the package alone."""
        before = self.files()
        ended = ran([str(self.bin / "dpfast"), *shlex.split(words)], self.user)
        told = ended.stdout + ended.stderr
        assert ended.returncode == 0, (words, told)
        assert str(ROOT) not in told
        assert self.files() == before
        return told

    def files(self) -> dict[Path, int]:
        """The files of the package and when each was written, but what Python caches."""
        found = (path for path in (self.packages / "dpfast").rglob("*") if path.is_file())
        return {path: path.stat().st_mtime_ns for path in found if path.suffix != ".pyc"}


@pytest.fixture(scope="module")
def installed(files, tmp_path_factory) -> Installed:
    """A fresh environment with the wheel, which borrows the other packages from this one."""
    folder = tmp_path_factory.mktemp("installed")
    made = ran([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], folder)
    assert made.returncode == 0, made.stderr
    binaries = folder / "venv" / "bin"
    packages = Path(ran([str(binaries / "python"), "-c", PATHS], folder).stdout.strip())
    install = ["pip", "--python", str(binaries / "python"), "install", "--quiet", "--no-deps"]
    added = ran([sys.executable, "-m", *install, str(files[1])], folder)
    assert added.returncode == 0, added.stderr
    # after pip, which would find dpfast there; the .pth files in it, as that of an editable
    # checkout, Python leaves alone
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    user = folder / "user"
    user.mkdir()
    return Installed(binaries, packages, user)


def test_both_are_small_and_the_wheel_is_this_machines(files):
    sdist, wheel = files
    assert max(sdist.stat().st_size, wheel.stat().st_size) <= MOST
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert wheel.name.startswith(f"dpfast-0.1.0-{tag}-{tag}-linux_")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (library,) = (name for name in names if name.endswith(".so"))
        assert archive.getinfo(library).file_size < 1e6  # 7.7 MB with debug information
        assert b".symtab" not in archive.read(library)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dpfast"}
    left = ("tests/", "__pycache__", ".egg-info", "build/")
    assert not [name for name in names if any(each in name for each in left)]


def test_without_a_compiler_an_sdist_builds_a_wheel_for_every_machine_and_says_so(files, tmp_path):
    with tarfile.open(files[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    out = tmp_path / "out"
    out.mkdir()
    told = build(out, source, "--wheel", CC="false", CXX="false")
    assert told.count("dpfast: the native CPU kernels were not built (") == 1
    (pure,) = out.glob("*.whl")
    assert pure.name == "dpfast-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(pure) as ours, zipfile.ZipFile(files[1]) as native:
        missing = set(native.namelist()) - set(ours.namelist())
        assert [name for name in missing if "_native" not in name] == []
        assert not [name for name in ours.namelist() if "_native" in name]


def test_the_demo_runs_and_reports_from_the_wheel(installed):
    told = installed.dpfast(f"run fashion {SHORT} --out runs/short")
    assert "held-out test" in told
    assert (installed.user / "runs" / "short" / "metrics.jsonl").stat().st_size > 0
    told = installed.dpfast(
        "sample --labels Bag,Sandal --omega 0.05 --learner runs/short --steps 2 --out samples"
    )
    assert list((installed.user / "samples").iterdir())
    installed.dpfast("report runs/short --out report")
    assert "native" in installed.dpfast("doctor")
    assert "table4" in installed.dpfast("paper")
    # what was written lies where the user asked for it
    assert sorted(path.name for path in installed.user.iterdir()) == ["report", "runs", "samples"]


def test_the_benchmarks_measure_and_tell_from_the_wheel(installed, tmp_path):
    here = installed._replace(user=tmp_path)
    told = here.dpfast("bench ops --only '256 x 10' --rounds 1 --device cpu --record")
    assert "| entropy_and_grad: 256 x 10 fp32 | fresh | eager |" in told
    assert "the tests are part of a checkout and do not run" in told
    assert (tmp_path / "ops.jsonl").read_text(encoding="utf-8").count('"version": "0.1.0"') == 2
    for suite in ("study", "anchored", "evidence", "guidance"):
        assert "---" in here.dpfast(f"bench {suite} --tables")  # a table
    assert [path.name for path in tmp_path.iterdir()] == ["ops.jsonl"]
