"""The CUDA kernels, run as fibers on the CPU under AddressSanitizer and UBSan (tests/simt), held to every op's own tests.

Each op's test file runs in a process of its own, which has the sanitizer's runtime loaded before everything else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = ROOT / os.environ.get("PPO_FAST_BUILD_DIR", "build/venv") / "simt"
pytestmark = pytest.mark.skipif(
    not (ROOT / "csrc").exists() or sys.platform != "linux", reason="needs the repository, on Linux"
)

#: Test files, and for each a seed of the order in which blocks and threads run, and how many blocks run at a time.
FILES = [
    ("gae", 1, 3), ("scan_tiles", 1, 3), ("scan_tiles", 2, 5), ("vtrace", 3, 2), ("discounted_returns", 4, 3),
    ("whiten", 1, 3), ("ppo_loss", 2, 3), ("sequence_policies", 1, 3), ("categorical_log_prob", 1, 3),
    ("multi_categorical_log_prob", 2, 3), ("normal_log_prob", 1, 3), ("bernoulli_log_prob", 2, 3), ("beta_log_prob", 1, 3),
    ("categorical_ppo_loss", 1, 3), ("normal_ppo_loss", 2, 3),
]  # fmt: skip


def runtime(name: str) -> str:
    compiler = shutil.which("g++") or "g++"
    return subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    assert list(BUILD.glob("_C_simt*.so")), f"make test builds the harness into {BUILD}: run make simt"
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(ROOT / "tests"),
        "PF_SIMT_MODULE": str(next(BUILD.glob("_C_simt*.so"))),
        "HYPOTHESIS_PROFILE": "short",
        **variables,
    }
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=1200)  # fmt: skip


@pytest.mark.parametrize(("op", "seed", "blocks"), FILES, ids=lambda x: str(x))
def test_the_ops_tests_pass_on_the_cuda_kernels(op, seed, blocks):
    done = run("-m", "pytest", "-p", "simt.plugin", "-p", "no:cacheprovider", "-vv", f"tests/test_{op}.py",
               PF_SIMT_SEED=str(seed), PF_SIMT_BLOCKS=str(blocks))  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert done.stdout.count(" PASSED") >= 6, done.stdout[-2000:]


def test_a_label_out_of_range_is_said_and_gives_its_row_0():
    body = (
        "import simt.plugin as plugin, torch, ppo_fast as pf\n"
        "plugin.pytest_configure(None)\n"
        "logits = torch.zeros(3, 5)\n"
        "try:\n    pf.categorical_log_prob(logits, torch.tensor([0, 7, 1]))\n"
        "except ValueError as error:\n    print(error)\n"
        "print(pf.categorical_log_prob(logits, torch.tensor([0, 1, 1]))[0].exp())\n"
    )
    done = run("-c", body)
    assert "categorical_log_prob: actions must be in range, got 7 at 1" in done.stdout, done.stdout + done.stderr
    assert "0.2000, 0.2000, 0.2000" in done.stdout, done.stdout + done.stderr


def test_moments_have_the_same_bits_in_any_order_of_blocks():
    body = (
        "import simt.plugin as plugin, torch, ppo_fast as pf\n"
        "plugin.pytest_configure(None)\n"
        "x = torch.randn(2, 600, 40)\n"
        "def found(seed, blocks):\n"
        "    plugin.module.set_schedule(seed, blocks)\n"
        "    grids = [pf.gae(*x, time_dim=d, moments=True)[2] for d in (0, 1)]\n"
        "    bounds = torch.arange(2101)  # more blocks than one joins\n"
        "    packed = pf.gae(*x.view(2, -1)[:, :2100], cu_seqlens=bounds, moments=True)\n"
        "    return torch.stack([*grids, packed[2]])\n"
        "first = found(1, 3)\n"
        "print(*(torch.equal(first, found(*s)) for s in ((2, 3), (5, 2), (8, 7))), int(first[0, 0]))\n"
    )
    done = run("-c", body)
    assert "True True True 24000" in done.stdout, done.stdout + done.stderr


FAULT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_simt_faults", sys.argv[1])
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)
import ctypes
out = (ctypes.c_float * 64)()
at = ctypes.addressof(out)
{body}
"""


def fault(body: str) -> subprocess.CompletedProcess:
    return run("-c", FAULT.format(body=body), str(next(BUILD.glob("_simt_faults*.so"))))


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("print(repr(faults.sums_of_warps(at)), out[0], out[63])", "'' 496.0 1520.0"),
        ("print(faults.barrier_for_some(at))", "not all of its threads reach"),
        ("print(faults.shuffle_for_some(at))", "not all of its threads reach"),
        ("faults.set_schedule(1, 2); print(faults.waits_for_a_later_block(at, 8))", "wait for one another for ever"),
        ("faults.set_schedule(1, 2); print(repr(faults.waits_for_a_later_block(at, 2)))", "''"),
        ("faults.reads_shared(at); print(all(x != x for x in out))", "True"),
    ],
)
def test_the_harness_finds_what_is_wrong(body, found):
    done = fault(body)
    assert found in done.stdout, done.stdout + done.stderr


def test_the_harness_stops_at_a_write_past_the_end():
    body = (
        "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.malloc.restype = ctypes.c_void_p\n"
        "faults.writes_past_the_end(libc.malloc(ctypes.c_size_t(256)), 8)\nprint('went on')"
    )
    done = fault(body)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
    assert "went on" not in done.stdout
