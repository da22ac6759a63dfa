"""What bench/gpu.sh asks of Python before anything is built: is there a GPU, where is dlpack.h, how does the checkout import.

A script of its own, without ppo_fast: python3 bench/gpu_setup.py facts | dlpack FOLDER | tree FOLDER.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What the bindings use of it (csrc/bind/tensor.h, call.h): DLPack 1.2 has them, earlier versions do not.
NEEDED = ("DLPackExchangeAPI", "dltensor_from_py_object_no_sync", "current_work_stream", "prev_api")


class Missing(Exception):
    """What this machine lacks, and the way out, in one line."""


# --- the GPU ----------------------------------------------------------------------------------------------------------


def facts() -> dict[str, str]:
    """What the shell needs to know about the GPU; raises where there is none that this torch can use."""
    try:
        import torch
    except ImportError as error:
        raise Missing(f"{sys.executable} cannot import torch ({error}); choose another one: PYTHON=...") from None
    built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda or 'no version'}"
    if torch.version.cuda is None:
        raise Missing(f"no NVIDIA GPU can be used: {built}, in {sys.executable}")
    if not torch.cuda.is_available():
        raise Missing(f"no NVIDIA GPU here: torch.cuda.is_available() is False ({built}; driver missing or too old?)")
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "devices": ",".join(map(str, range(torch.cuda.device_count()))),
        "architecture": f"{major}{minor}-real",
        "tag": str(sys.implementation.cache_tag),
    }


# --- dlpack.h ---------------------------------------------------------------------------------------------------------


def package_folder(name: str) -> Path | None:
    """Where an installed package lies, found without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def headers() -> Iterator[Path]:
    """Copies of dlpack.h that other packages carry, the build dependency's first."""
    for package, place in (
        ("tvm_ffi", "include/dlpack/dlpack.h"),
        ("torch", "include/ATen/dlpack.h"),
        ("torch", "include/dlpack/dlpack.h"),
        ("cupy", "_core/include/cupy/_dlpack/dlpack.h"),
    ):
        folder = package_folder(package)
        if folder is not None:
            yield folder / place


def why_not(header: Path) -> str:
    """Why a dlpack.h will not do, or ""."""
    if not header.is_file():
        return "not there"
    text = header.read_text(errors="replace")
    major = re.search(r"^#define DLPACK_MAJOR_VERSION (\d+)", text, re.M)
    minor = re.search(r"^#define DLPACK_MINOR_VERSION (\d+)", text, re.M)
    version = f"version {major[1]}.{minor[1]}" if major and minor else "no version"
    if not major or major[1] != "1":
        return f"{version}, not 1.x"
    lacks = [name for name in NEEDED if name not in text]
    return f"{version} without {', '.join(lacks)}" if lacks else ""


def dlpack_include(scratch: Path) -> Path:
    """Folder with a dlpack/dlpack.h that serves. A header that lies elsewhere is linked to under `scratch`."""
    given = os.environ.get("PPO_FAST_DLPACK_INCLUDE")
    if given:
        why = why_not(Path(given) / "dlpack" / "dlpack.h")
        if why:
            raise Missing(f"PPO_FAST_DLPACK_INCLUDE={given}: dlpack/dlpack.h in it: {why}")
        return Path(given)
    tried = []
    for header in headers():
        why = why_not(header)
        if not why and header.parent.name == "dlpack":
            return header.parents[1]
        if not why:
            link = scratch / "dlpack" / "dlpack.h"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(header)
            return scratch
        tried.append(f"{header}: {why}")
    raise Missing(
        "no dlpack.h of version 1.2 or later; put one (github.com/dmlc/dlpack, or include/dlpack of the wheel "
        "apache-tvm-ffi) into FOLDER/dlpack/ and set PPO_FAST_DLPACK_INCLUDE=FOLDER. Tried "
        + ("; ".join(tried) or "nothing: neither tvm_ffi, torch nor cupy is installed")
    )


# --- the checkout, importable -----------------------------------------------------------------------------------------


def tree(target: Path) -> None:
    """`target`/ppo_fast: the checkout as an installation has it, kernels/ and bench/ inside the package, all of it links.

    An editable installation would do the same and write into a Python environment that is not ours to change.
    """
    package = target / "ppo_fast"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in sorted((ROOT / "ppo_fast").iterdir()):
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for folder in ("kernels", "bench"):
        if (ROOT / folder).is_dir():
            (package / folder).symlink_to(ROOT / folder)


def main(args: list[str]) -> int:
    try:
        if args == ["facts"]:
            for name, value in facts().items():
                print(f"{name}={value}")
        elif args[:1] == ["dlpack"] and len(args) == 2:
            print(dlpack_include(Path(args[1]).resolve()))
        elif args[:1] == ["tree"] and len(args) == 2:
            tree(Path(args[1]).resolve())
        else:
            print(__doc__, file=sys.stderr)
            return 2
    except Missing as missing:
        print(f"gpu.sh: {missing}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    del sys.path[0]  # this folder's modules are not top-level ones
    sys.exit(main(sys.argv[1:]))
