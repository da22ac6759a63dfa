"""Every kernel once, forward and backward on small odd shapes, under NVIDIA's compute-sanitizer.

    python tests/gpu/sanitize.py                 all four tools, side by side; fails where the tool is missing
    python tests/gpu/sanitize.py calls           the calls alone, without a tool
    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py calls --backends cuda --ops gae

Memory comes from the driver, one allocation a tensor (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that memcheck sees every edge and
initcheck every byte that nobody wrote. A fifth run plants a write out of bounds: a tool that does not see it proves nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve()
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: What the sanitizer exits with where it found something; the calls themselves fail with 1.
FOUND = 99
OPTIONS = (
    "--error-exitcode", str(FOUND),
    "--target-processes", "application-only",  # compilers that Triton starts are not what is tested
    "--report-api-errors", "no",  # torch asks the driver about host pointers; our launchers check what they call
    "--print-limit", "20",
)  # fmt: skip


# --- the calls --------------------------------------------------------------------------------------------------------


def calls(backends: list[str], ops: list[str], device: str) -> int:
    """Runs them and compares with the CPU; the number of those that failed."""
    sys.path.insert(0, str(HERE.parents[1]))
    import torch

    import ppo_fast as pf
    from gpu import cases

    failed = 0
    for backend in backends:
        for op in ops or cases.OPS:
            for i, call in enumerate(cases.small(op)):
                try:
                    got = cases.outcome(call, cases.on(backend, device, op))
                    if device != "cpu":
                        torch.cuda.synchronize()
                    want = cases.outcome(call, getattr(pf, op))
                    for name, x in got.items():  # roughly: parity has tests of its own
                        size = want[name].double().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if x.numel() else 1.0
                        torch.testing.assert_close(x, want[name], rtol=0.05, atol=0.05 * size, equal_nan=True)
                except Exception as error:
                    failed += 1
                    line = str(error).strip().splitlines() or [""]
                    print(f"{backend} {op}[{i}]: {type(error).__name__}: {line[0]}", flush=True)
        print(f"{backend}: {len(ops or cases.OPS)} ops called, {failed} calls failed so far", flush=True)
    return failed


def planted() -> None:
    """A write past the end of an allocation."""
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def beyond(x, n, BLOCK: tl.constexpr):
        tl.store(x + n + tl.arange(0, BLOCK), 1.0)

    x = torch.zeros(1000, device="cuda")
    beyond[(1,)](x, 1000, BLOCK=64)
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize()


# --- the tools --------------------------------------------------------------------------------------------------------


def find_sanitizer() -> str | None:
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/opt/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        places.append(str(Path(nvcc).resolve().parents[1]))
    path = os.pathsep.join([os.environ.get("PATH", ""), *(str(Path(p) / "bin") for p in places if p)])
    return shutil.which("compute-sanitizer", path=path)


def verdict(tool: str, code: int | None, text: str) -> tuple[bool, str]:
    """Whether a run passed, and one line that says how it ended."""
    summaries = re.findall(r"=+ (\w+ SUMMARY: .*)", text)
    last = summaries[-1] if summaries else (text.strip().splitlines() or ["no output"])[-1]
    if code is None:
        return False, "took too long"
    if tool == "planted":
        seen = code == FOUND and "Invalid __global__ write" in text
        return seen, "the planted error was found" if seen else f"DID NOT FIND THE PLANTED ERROR (exit {code}): {last}"
    if code == 0 and summaries:
        return True, last
    if code == 0:
        return False, f"the tool said nothing: {last}"
    if code == FOUND:
        first = re.search(r"=+ ((?:Invalid|Error|Uninitialized|Barrier|Program hit|Race).*)", text)
        return False, f"{last}; first: {first[1] if first else 'see the log'}"
    return False, f"exit {code}: {last}"


def ended(process: subprocess.Popen, seconds: float) -> int | None:
    """Its exit code, or None where it had to be stopped."""
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def all_tools(sanitizer: str, logs: Path, limit: float, rest: list[str]) -> int:
    """Runs the calls alone, then every tool at once; 0 where all passed."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    python = [sys.executable, str(HERE)]
    started = time.monotonic()
    logs.mkdir(parents=True, exist_ok=True)
    alone = subprocess.Popen([*python, "calls", *rest], env=environment)  # compiles for Triton, too
    code = ended(alone, limit)
    if code != 0:
        print(
            f"calls      FAILED without a tool ({'too slow' if code is None else f'exit {code}'}): no tool was started"
        )
        return 1
    runs = {tool: [sanitizer, "--tool", tool, *OPTIONS, *python, "calls", *rest] for tool in TOOLS}
    runs["planted"] = [sanitizer, "--tool", "memcheck", *OPTIONS, *python, "planted"]
    processes = {}
    for name, command in runs.items():
        log = (logs / f"sanitize-{name}.log").open("w")
        processes[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT), log
    bad, lines = 0, []
    for name, (process, log) in processes.items():
        code = ended(process, limit - (time.monotonic() - started))
        log.close()
        text = (logs / f"sanitize-{name}.log").read_text(errors="replace")
        passed, how = verdict(name, code, text)
        bad += not passed
        lines.append(f"{name:<10} {'passed' if passed else 'FAILED'}  {how}")
        if not passed:
            print(f"--- {name}: the end of its log\n" + "\n".join(text.splitlines()[-25:]))
    print("\n".join(lines))
    return int(bad > 0)


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["tools", "calls", "planted"], default="tools")
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"])
    parser.add_argument("--ops", nargs="+", default=[])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--logs", type=Path, default=HERE.parents[2] / "build" / "gpu")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for all of it")
    options = parser.parse_args(args)
    if options.what == "calls":
        return int(calls(options.backends, options.ops, options.device) > 0)
    if options.what == "planted":
        planted()
        return 0
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print(
            "sanitize: compute-sanitizer is not on PATH, in CUDA_HOME/bin or beside nvcc; it comes with the CUDA toolkit"
        )
        return 1
    rest = ["--backends", *options.backends, "--device", options.device]
    return all_tools(sanitizer, options.logs, options.limit, [*rest, *(["--ops", *options.ops] if options.ops else [])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
