"""Builds `mtlora_kernels._C` by driving CMake; sources, flags and options live in CMakeLists.txt."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name):
    # The interpreter's own folder as well: a virtual environment need not be activated.
    path = shutil.which(name) or shutil.which(name, path=Path(sys.executable).parent)
    if path is None:
        raise SystemExit(f"{name} was not found: install it with `python3 -m pip install {name}`.")
    return path


def pybind11_dir():
    try:
        import pybind11
    except ImportError:
        return ""  # CMake then looks for one installed on the system
    return pybind11.get_cmake_dir()


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        cmake = find_tool("cmake")
        # A fixed folder keeps rebuilds incremental; setuptools' own is temporary in editable installs.
        build_dir = str(ROOT / "build" / sys.implementation.cache_tag)
        target_dir = str(Path(self.get_ext_fullpath(ext.name)).resolve().parent)
        # Each option is passed even when empty, so that no value cached by an earlier build survives.
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11_dir(),
            "MTLORA_CUDA": os.environ.get("MTLORA_CUDA", ""),
            "CMAKE_CUDA_ARCHITECTURES": os.environ.get("CMAKE_CUDA_ARCHITECTURES", ""),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []

        self.spawn([cmake, "-G", "Ninja", "-S", str(ROOT), "-B", build_dir, *defines, *extra])
        self.spawn([cmake, "--build", build_dir, *jobs])
        self.spawn([cmake, "--install", build_dir, "--prefix", target_dir])


setup(ext_modules=[Extension("mtlora_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
