"""Builds ppo_fast._C with CMake and ninja. Needs a C++20 compiler and pybind11, never torch."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def dlpack_include() -> str:
    """Folder that holds dlpack/dlpack.h: the apache-tvm-ffi wheel's, found without importing it."""
    import importlib.util

    spec = importlib.util.find_spec("tvm_ffi")
    for root in spec.submodule_search_locations or () if spec else ():
        include = Path(root) / "include"
        if (include / "dlpack" / "dlpack.h").exists():
            return str(include)
    raise SystemExit("ppo_fast: dlpack/dlpack.h not found; install the build dependency apache-tvm-ffi")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDLPACK_INCLUDE_DIR={dlpack_include()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('PPO_FAST_BUILD_TYPE', 'Release')}",
        ]  # fmt: skip
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        print(f"ppo_fast: built {target.name} ({target.stat().st_size // 1024} KiB)")


setup(ext_modules=[Extension("ppo_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
