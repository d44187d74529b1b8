"""Builds the native extension where a compiler is present; dpfast installs and runs without it."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = [
    f"csrc/{name}.cpp"
    for name in ("module", "entropy", "guided_step", "noise", "gather", "chunk_rows", "permutation")
]
HEADERS = [f"csrc/{name}.hpp" for name in ("kernels", "memory", "simd", "parallel", "philox")]
FLAGS = [
    "-std=c++17",
    "-O3",
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
            extra_link_args=["-pthread", *extra],
            language="c++",
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuild})
