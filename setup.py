"""Build the C++ core `velopath._core`. Metadata lives in pyproject.toml; no torch header is included."""

import sys
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

FLAGS = ["-O3", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-fvisibility=hidden"]
FLAGS.append("-isystem" + pybind11.get_include())  # so that our warnings are for our code only
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]

ParallelCompile("VELOPATH_BUILD_JOBS", default=0).install()
here = Path(__file__).parent
setup(
    ext_modules=[
        Pybind11Extension(
            "velopath._core",
            sorted(str(p.relative_to(here)) for p in (here / "csrc").glob("*.cpp")),
            depends=sorted(str(p.relative_to(here)) for p in (here / "csrc").glob("*.h")),
            cxx_std=17,
            extra_compile_args=FLAGS + OPENMP,
            extra_link_args=OPENMP,
        )
    ],
    cmdclass={"build_ext": build_ext},
)
