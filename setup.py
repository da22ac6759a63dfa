"""Builds ppo_fast._C, ppo_fast._C_cuda where there are CUDA sources and nvcc, and ppo_fast._C_xla where there are jaxlib's
headers, with CMake and ninja.

Needs a C++20 compiler and the build dependencies of pyproject.toml, never torch. Variables: docs/environment.md.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def folder_of(module: str) -> Path:
    """Where an installed package lies, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"ppo_fast: the build dependency {module} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def dlpack_include() -> Path:
    """Folder that holds dlpack/dlpack.h: PPO_FAST_DLPACK_INCLUDE, else the apache-tvm-ffi wheel's."""
    given = os.environ.get("PPO_FAST_DLPACK_INCLUDE")
    include = Path(given).resolve() if given else folder_of("tvm_ffi") / "include"
    if not (include / "dlpack" / "dlpack.h").exists():
        source = "PPO_FAST_DLPACK_INCLUDE" if given else "the build dependency apache-tvm-ffi"
        raise SystemExit(f"ppo_fast: expected dlpack/dlpack.h in {include}, of {source}")
    return include


def tool(name: str) -> str:
    """cmake or ninja: that of the wheel among the build dependencies, which may not be on PATH, else the one on PATH."""
    spec = importlib.util.find_spec(name)
    found = None
    if spec is not None and spec.origin:  # <prefix>/lib/python3.x/site-packages/<name>/__init__.py
        found = shutil.which(name, path=str(Path(spec.origin).parents[4] / "bin"))
    found = found or shutil.which(name)
    if found is None:
        raise SystemExit(f"ppo_fast: {name} not found; install the build dependencies of pyproject.toml")
    return found


def cuda() -> tuple[str, str]:
    """(nvcc or "", the reason), from PPO_FAST_CUDA, csrc/cuda and nvcc."""
    word = os.environ.get("PPO_FAST_CUDA", "")
    if word not in ("", "0", "1"):
        raise SystemExit(f"ppo_fast: PPO_FAST_CUDA must be 0, 1 or unset, got {word!r}")
    if word == "0":
        return "", "switched off by PPO_FAST_CUDA=0"
    nvcc = shutil.which("nvcc")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if nvcc is None and os.environ.get(variable):
            nvcc = shutil.which("nvcc", path=str(Path(os.environ[variable]) / "bin"))
    missing = ""
    if not any((ROOT / "csrc" / "cuda").glob("*.cu")):
        missing = "no sources in this release"
    elif nvcc is None:
        missing = "no nvcc on PATH or in CUDA_HOME"
    if missing and word == "1":
        raise SystemExit(f"ppo_fast: PPO_FAST_CUDA=1, but {missing}")
    return ("", missing) if missing or nvcc is None else (nvcc, f"built with {nvcc}")


def architectures() -> str:
    """GPUs to compile for, as CMake has them: "80-real;90-real", "native" for those of this machine; "" for CMakeLists.txt's."""
    return os.environ.get("PPO_FAST_CUDA_ARCHITECTURES", "").replace(",", ";").replace(" ", "")


def xla() -> tuple[str, str]:
    """(folder that holds xla/ffi/api/ffi.h or "", the reason), from PPO_FAST_XLA and PPO_FAST_XLA_INCLUDE; else that of the
    jaxlib in the environment that is installed into, which pip's isolated builds do not import from."""
    word, given = os.environ.get("PPO_FAST_XLA", ""), os.environ.get("PPO_FAST_XLA_INCLUDE", "")
    if word not in ("", "0", "1"):
        raise SystemExit(f"ppo_fast: PPO_FAST_XLA must be 0, 1 or unset, got {word!r}")
    if word == "0":
        return "", "switched off by PPO_FAST_XLA=0"
    spec = importlib.util.find_spec("jaxlib")
    folders = [Path(x) for x in (spec.submodule_search_locations or [] if spec else [])]
    folders += [Path(sysconfig.get_path(name)) / "jaxlib" for name in ("purelib", "platlib")]
    for include in [Path(given).resolve()] if given else [folder / "include" for folder in folders]:
        if (include / "xla" / "ffi" / "api" / "ffi.h").exists():
            return str(include), f"built with {include}"
    missing = f"no xla/ffi/api/ffi.h in {given}" if given else "no jaxlib installed"
    if word == "1" or given:
        raise SystemExit(f"ppo_fast: PPO_FAST_XLA{'_INCLUDE' if given else ''}={given or word}, but {missing}")
    return "", missing


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / os.environ.get("PPO_FAST_BUILD_DIR", self.build_temp)
        nvcc, why = cuda()
        configure = [
            tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={folder_of('pybind11') / 'share' / 'cmake' / 'pybind11'}",
            f"-DDLPACK_INCLUDE_DIR={dlpack_include()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('PPO_FAST_BUILD_TYPE', 'Release')}",
            f"-DPPO_FAST_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DXLA_INCLUDE_DIR={xla()[0]}",
            *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
            *([f"-DCMAKE_CUDA_ARCHITECTURES={architectures()}"] if nvcc and architectures() else []),
        ]  # fmt: skip
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run([tool("cmake"), "--build", str(build), "--target", ext.name.rpartition(".")[2]], check=True)
        print(
            f"ppo_fast: built {target.name} ({target.stat().st_size // 1024} KiB); CUDA: {why}; XLA: {xla()[1]}",
            flush=True,
        )


#: Top-level folders that are installed as parts of the package.
PARTS = {
    package: folder
    for package, folder in {"ppo_fast.bench": "bench", "ppo_fast.kernels": "kernels"}.items()
    if any((ROOT / folder).glob("*.py"))
}
packages = find_packages(str(ROOT), include=["ppo_fast", "ppo_fast.*"])
for package, folder in PARTS.items():
    packages += [package, *(f"{package}.{name}" for name in find_packages(str(ROOT / folder)))]
extensions = ["ppo_fast._C", *(["ppo_fast._C_cuda"] if cuda()[0] else []), *(["ppo_fast._C_xla"] if xla()[0] else [])]
setup(
    packages=packages,
    package_dir=PARTS,
    ext_modules=[Extension(name, sources=[]) for name in extensions],
    cmdclass={"build_ext": CMakeBuild},
)
