"""No kernel of the CPU touches a byte outside of its tensors: every op, every tail and instruction set. See guard_pages.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gpu.cases import OPS

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mprotect by ctypes is written for Linux")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "OMP_NUM_THREADS": "2"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("op", OPS)
def test_kernels_stay_inside_their_tensors(op):
    done = run(str(HERE / "guard_pages.py"), op)
    assert done.returncode == 0, f"{done.returncode} at {done.stdout[-200:]} {done.stderr[-2000:]}"
    assert int(done.stdout.split()[-3]) > 300, done.stdout[-200:]  # the calls did go between the pages


HEAD = ["-m", "pytest", "-p", "guard_pages", "-p", "no:cacheprovider", "-x"]


def test_heads_stay_inside_their_tensors():
    files = [str(HERE / f"test_linear_{name}.py") for name in ("log_prob", "ppo_loss")]
    done = run(*HEAD, *files, "-k", "matches or shapes_views or empty or frozen or ignored")
    assert done.returncode == 0, done.stdout[-3000:]


OUTSIDE = """
import ctypes, sys, torch, guard_pages
class Ops:
    def reads(x, at): return ctypes.string_at(x.data_ptr() + at, 1)
    def writes(x, at): ctypes.memset(x.data_ptr() + at, 1, 1)
guarded = guard_pages.Guarded(Ops)
x = torch.arange(5.)
for guarded.at_end in (True, False):
    guarded.reads(x, 0), guarded.writes(x, 19)
assert x[4] != 4, "what is written is copied back"
guarded.at_end = sys.argv[2] == "20"
print("inside is allowed", flush=True)
getattr(guarded, sys.argv[1])(x, int(sys.argv[2]))
print("nothing happened")
"""


@pytest.mark.parametrize("touch", ["reads", "writes"])
@pytest.mark.parametrize("at", [20, -1])
def test_one_byte_outside_ends_the_process(touch, at):
    done = run("-c", OUTSIDE, touch, str(at))
    assert done.returncode == -signal.SIGSEGV and done.stdout.split("\n")[:-1] == ["inside is allowed"], done.stderr
