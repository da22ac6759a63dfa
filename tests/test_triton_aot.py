"""Every Triton kernel compiles ahead of time for NVIDIA and AMD GPUs, without one, and keeps its numbers in registers."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

WORKERS = 2


def compile_examples(worker: int) -> None:
    """In a process of its own, where kernels are compiled and not interpreted: a line of JSON an example and target."""
    import triton
    from triton.backends.compiler import GPUTarget

    from ppo_fast import kernels

    # every example for the two that are common; the first of a module for what lies around them
    common = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
    others = {"sm_80": GPUTarget("cuda", 80, 32), "sm_100": GPUTarget("cuda", 100, 32)}
    modules = sorted(m.name for m in pkgutil.iter_modules(kernels.__path__))
    found = {name: getattr(importlib.import_module(f"ppo_fast.kernels.{name}"), "AOT", []) for name in modules}
    examples = [(name, i, example) for name, entries in found.items() for i, example in enumerate(entries)]
    if worker == 0:
        print(json.dumps({"modules": {name: len(entries) for name, entries in found.items()}}))
    for name, i, (kernel, types, constants, options) in examples[worker::WORKERS]:
        for target, gpu in {**common, **(others if i == 0 else {})}.items():
            line = {"example": f"{name}[{i}] {kernel.fn.__name__} {target}"}
            try:
                if list(types) != kernel.arg_names:
                    raise ValueError(f"types of {list(types)}, the kernel takes {kernel.arg_names}")
                # as torch's allocator gives memory
                aligned = {(k,): [["tt.divisibility", 16]] for k, t in enumerate(types.values()) if t.startswith("*")}
                source = triton.compiler.ASTSource(kernel, types, constants, aligned)
                compiled = triton.compile(source, target=gpu, options=options)
                line["spilled"] = spilled(compiled)
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {error}"
            print(json.dumps(line), flush=True)


def spilled(compiled) -> int:
    """Bytes of stack a thread has on NVIDIA GPUs, registers a thread spills on AMD's."""
    if "amdgcn" in compiled.asm:
        return sum(int(n) for n in re.findall(r"\.vgpr_spill_count: *(\d+)", compiled.asm["amdgcn"]))
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


@pytest.fixture(scope="module")
def compiled(pytestconfig):
    """What the processes said: which modules there are, and of each example its target and how it went."""
    # Triton's own cache, by source and version: what has not changed is compiled once
    kept = pytestconfig.cache.mkdir("triton") if hasattr(pytestconfig, "cache") else Path(tempfile.mkdtemp())
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(kept)}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(k)], env=environment, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for k in range(WORKERS)
    ]  # fmt: skip
    said = [p.communicate(timeout=600) for p in processes]
    for p, (_, errors) in zip(processes, said, strict=True):
        assert p.returncode == 0, errors
    lines = [json.loads(line) for out, _ in said for line in out.splitlines()]
    return {"modules": lines[0]["modules"], "examples": lines[1:]}


@pytest.mark.xdist_group("triton-aot")
def test_every_example_compiles(compiled):
    failed = [f"{x['example']}: {x['error']}" for x in compiled["examples"] if "error" in x]
    assert not failed, "\n".join(failed)


@pytest.mark.xdist_group("triton-aot")
def test_every_op_has_examples(compiled):
    assert not [m for m, n in compiled["modules"].items() if n == 0 and m != "raw" and not m.startswith("_")]


@pytest.mark.xdist_group("triton-aot")
def test_nothing_spills(compiled):
    """But for a few bytes, which ptxas gives away for one more warp."""
    spilling = [f"{x['example']}: {x['spilled']}" for x in compiled["examples"] if x.get("spilled", 0) > 32]
    assert not spilling, "\n".join(spilling)


if __name__ == "__main__":
    compile_examples(int(sys.argv[1]))
