"""What nvcc made of csrc/cuda, read without a GPU: registers, stack and the width of memory accesses, per architecture."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ppo_fast as pf

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ppo_fast._C_cuda") is None,
    reason="_C_cuda is not built here: no nvcc, or PPO_FAST_CUDA=0",
)


def cuobjdump() -> str:
    """From the toolkit, or from Triton's wheel, which carries it."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin:
        tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(tool) if tool.exists() else None
    if found is None:
        pytest.skip("no cuobjdump: neither the CUDA toolkit's nor Triton's")
    return found


@pytest.fixture(scope="module")
def library() -> str:
    return importlib.util.find_spec("ppo_fast._C_cuda").origin


@pytest.fixture(scope="module")
def usage(library) -> list[tuple[str, str, dict[str, int]]]:
    """(architecture, kernel, resources) of every kernel."""
    text = subprocess.run([cuobjdump(), "--dump-resource-usage", library], capture_output=True, text=True).stdout
    found, architecture, kernel = [], "", ""
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            architecture = match.group(1)
        elif match := re.search(r"Function (\S+):", line):
            kernel = match.group(1)
        elif "REG:" in line:
            found.append((architecture, kernel, {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}))
    return found


#: What ptxas makes of V-trace with c̄ > 1 (a product of ratios may overflow, so segments wait for one another): rare, and
#: sm_80 and sm_90 hold it in registers.
SPILLS_ON_SM_100 = r"VtraceI[fd]E\w[fd]?Lb1E|VtraceI[fd]EE[fd]Lb1E"


def test_no_kernel_spills_or_has_a_stack(usage):
    assert len(usage) >= 3 * 30
    bad = [f"{arch} {kernel}: {r}" for arch, kernel, r in usage
           if (r["STACK"] > 0 or r["LOCAL"] > 0) and not (arch == "sm_100" and re.search(SPILLS_ON_SM_100, kernel))]  # fmt: skip
    assert not bad, "\n".join(bad)


def test_every_architecture_has_every_kernel(usage):
    by_architecture: dict[str, set[str]] = {}
    for architecture, kernel, _ in usage:
        by_architecture.setdefault(architecture, set()).add(
            re.sub(r"_GLOBAL__N__\w{8}_\d+_\w+_cu_\w{8}_\d*", "", kernel)
        )
    sizes = {arch: len(kernels) for arch, kernels in by_architecture.items()}
    assert len(set(sizes.values())) == 1, sizes


#: Kernels that stream, by a part of their mangled names, and the widest load and store that they must have.
STREAMS = {
    "ppo_loss_kernelIfLb1E": (128, 128),
    "moments_kernelIfLb1E": (128, 0),
    "apply_kernelIfLb1E": (128, 128),
    "along_kernelINS0_3GaeIfEEfLb0ELi1ELb0ELb1E": (128, 128),  # without moments, and with them
    "along_kernelINS0_3GaeIfEEfLb0ELi1ELb1ELb1E": (128, 128),
}


def test_streaming_kernels_move_sixteen_bytes_at_a_time(library, usage):
    names = {n: part for arch, n, _ in usage for part in STREAMS if arch == "sm_90" and part in n}
    assert set(names.values()) == set(STREAMS)
    done = subprocess.run([cuobjdump(), "-sass", "-arch", "sm_90", "-fun", ",".join(names), library],
                          capture_output=True, text=True)  # fmt: skip
    kernel, widths = "", {part: {"LDG": 0, "STG": 0} for part in STREAMS}
    for line in done.stdout.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            kernel = names[match.group(1)]
        elif match := re.search(r"\b(LDG|STG)\.\S*", line):
            wide = int((re.search(r"\.(64|128)\b", match.group(0)) or [0, 32])[1])
            widths[kernel][match.group(1)] = max(widths[kernel][match.group(1)], wide)
    for part, (load, store) in STREAMS.items():
        assert widths[part]["LDG"] >= load and widths[part]["STG"] >= store, (part, widths[part])


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
def test_nothing_of_cuda_or_torch_is_linked(library):
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    assert not {n for n in needed if re.search("torch|c10|cuda|nvrtc|python", n)}, needed
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic, dynamic


def test_it_imports_without_a_gpu():
    module = importlib.import_module("ppo_fast._C_cuda")
    assert re.fullmatch(r"sm_\d+(, sm_\d+)*", module.ARCHITECTURES)
    assert module.STATS == pf._C.STATS
    assert {n for n in dir(pf._C) if not n.startswith("_")} - {"isa", "set_isa"} <= set(dir(module))
