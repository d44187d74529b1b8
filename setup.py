"""Builds the native extension where a compiler is present; dpfast installs and runs without it.

A wheel also has the benchmarks, which are a folder beside the package in a checkout.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

SHIPPED = "dpfast.shipped.benchmarks"  # dpfast/cli/bench.py finds them there
RECORDS = [  # of benchmarks/results, those that a suite reads
    f"results/{suite}.jsonl"
    for suite in ("anchored", "evidence", "guidance", "inductor_blocks", "models", "study", "uses")
]

SOURCES = [
    f"csrc/{name}.cpp"
    for name in ("module", "entropy", "guided_step", "noise", "gather", "chunk_rows", "permutation")
]
HEADERS = [f"csrc/{name}.hpp" for name in ("kernels", "memory", "simd", "parallel", "philox")]
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",  # Python's own flags ask for debug information, ten times the code
    "-fvisibility=hidden",
    "-fopenmp-simd",  # honours `omp simd` and links no OpenMP runtime
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # vectors never cross a call: every function that takes one is inlined
    "-Wno-unknown-pragmas",
]

STRIPPED = ["-s"] if sys.platform == "linux" else []


class OptionalBuild(build_ext):
    """A build whose failure costs speed on a CPU, not the installation."""

    def run(self) -> None:
        built = [Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions]
        try:
            super().run()
        except Exception as error:
            for path in built:  # that of an earlier build would hide this failure
                path.unlink(missing_ok=True)
            print(
                f"dpfast: the native CPU kernels were not built ({error}). The package works "
                "without them, with slower "
                "operations on a CPU; install a C++17 compiler and reinstall to build them.",
                file=sys.stderr,
            )
            self.distribution.ext_modules = []


class PureWithoutExtension(bdist_wheel):
    """A wheel for every machine where the extension was not built, else for this one."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


class WithBenchmarks(build_py):
    """Ships the benchmarks under the package.

    They are no package of the distribution, so that an editable installation stays the checkout's
    folder on the path, which has both.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        found = find_packages(include=["benchmarks", "benchmarks.*"])
        self.packages = [*self.packages, *(f"dpfast.shipped.{name}" for name in found)]
        self.package_dir = {**self.package_dir, SHIPPED: "benchmarks"}
        self.package_data = {**self.package_data, SHIPPED: RECORDS}

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an earlier build leaves modules that there are no more
            built = {Path(name) for name in self.get_outputs(include_bytecode=False)}
            for path in Path(self.build_lib, "dpfast").rglob("*"):
                if path.is_file() and path not in built and path.suffix not in (".so", ".pyd"):
                    path.unlink()


def description() -> str:
    """README.md without the pictures and links to files of a checkout, which a page of an index
    does not have beside it.
    """
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


def extensions() -> list[Extension]:
    if os.environ.get("DPFAST_NO_NATIVE") == "1":
        print(
            "dpfast: DPFAST_NO_NATIVE=1, installing without the native CPU kernels.",
            file=sys.stderr,
        )
        return []
    import pybind11
    from pybind11.setup_helpers import ParallelCompile

    ParallelCompile(default=0).install()  # as many compilers as processors
    flags = FLAGS + (
        ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    )
    extra = os.environ.get("DPFAST_CXXFLAGS", "").split()
    return [
        Extension(
            "dpfast._native",
            SOURCES,
            depends=HEADERS,
            include_dirs=[pybind11.get_include()],
            extra_compile_args=flags + extra,
            # flags of one's own, as a sanitizer's or -g, keep the symbols
            extra_link_args=["-pthread", *(extra or STRIPPED)],
            language="c++",
        )
    ]


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    ext_modules=extensions(),
    cmdclass={
        "bdist_wheel": PureWithoutExtension,
        "build_ext": OptionalBuild,
        "build_py": WithBenchmarks,
    },
)
