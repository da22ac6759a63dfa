"""What surrounds a call: torch's global settings, Python threads, forked and spawned processes, the environment."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from conftest import same_bits

import ppo_fast as pf


def streams(n=40):
    return torch.randn(3, n).unbind()


def same(actual, expected):
    assert same_bits([actual.loss, actual.stats.vector], [expected.loss, expected.stats.vector])


# --- global settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_set_num_threads_changes_no_bit(threads):
    xs = streams(70_001)
    torch.set_num_threads(1)
    expected = pf.ppo_loss(*xs)
    torch.set_num_threads(threads)
    same(pf.ppo_loss(*xs), expected)


def test_default_dtype_and_device_have_no_effect():
    x, old, advantages = streams()
    expected = pf.ppo_loss(x, old, advantages)
    torch.set_default_dtype(torch.float64)
    try:
        out = pf.ppo_loss(x, old, advantages)
        same(out, expected)
        assert out.loss.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")
    try:
        same(pf.ppo_loss(x, old, advantages), expected)
    finally:
        torch.set_default_device(None)


# --- threads and processes --------------------------------------------------------------------------------------------


def test_eight_python_threads():
    inputs = [streams(n) for n in (1, 33, 5_000, 20_001)]
    expected = [pf.ppo_loss(*xs) for xs in inputs]
    failures = []

    def work(seed):
        for i in range(40):
            k = (seed + i) % len(inputs)
            x, old, advantages = inputs[k]
            leaf = x.clone().requires_grad_()
            out = pf.ppo_loss(leaf, old, advantages)
            out.loss.backward()
            if not torch.equal(out.loss.detach(), expected[k].loss) or not leaf.grad.isfinite().all():
                failures.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert not any(t.is_alive() for t in threads) and not failures


def _in_a_fresh_process(code, timeout=120):
    code = textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_fork_after_use():
    """A forked child has no OpenMP threads left: it computes on its own one, with the same bits, and ends.

    Torch's own parallel loops would hang there, so the child runs nothing but our op and its backward.
    """
    out = _in_a_fresh_process("""
        import os, signal, torch, ppo_fast as pf
        torch.set_num_threads(4)
        new, old, advantages = torch.randn(3, 200_000)
        x, y = new.clone().requires_grad_(), new.clone().requires_grad_()
        expected = pf.ppo_loss(x, old, advantages).loss
        expected.backward()
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            loss = pf.ppo_loss(y, old, advantages).loss
            loss.backward()
            os._exit(0 if loss.item() == expected.item() and (y.grad.numpy() == x.grad.numpy()).all() else 3)
        status = os.waitpid(pid, 0)[1]
        print(status, pf.ppo_loss(x, old, advantages).loss.item() == expected.item())  # the parent is as it was
    """)
    assert out.split() == ["0", "True"]


def test_fork_before_use():
    out = _in_a_fresh_process("""
        import os, signal, torch, ppo_fast as pf
        torch.manual_seed(0)
        xs = torch.randn(3, 200_000)
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            os._exit(0 if pf.ppo_loss(*xs).loss.isfinite() else 3)
        print(os.waitpid(pid, 0)[1])
    """)
    assert out.strip() == "0"


def _loss_of(xs):
    return pf.ppo_loss(*xs).loss.item()


def test_spawned_processes():
    xs = torch.randn(3, 5_000)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map_async(_loss_of, [xs, xs]).get(120) == [_loss_of(xs)] * 2


def test_imports_and_runs_alone():
    """Without a GPU, without Triton, with torch imported by nobody before."""
    out = _in_a_fresh_process("""
        import sys
        sys.modules["triton"] = None
        import ppo_fast as pf, torch
        print(pf.ppo_loss(*torch.zeros(3, 4)).loss.item(), "gymnasium" in sys.modules, "matplotlib" in sys.modules)
    """)
    assert out.split() == ["0.0", "False", "False"] or out.split() == ["-0.0", "False", "False"]


@pytest.mark.parametrize("variable", ["PPO_FAST_CPU", "PPO_FAST_BACKEND", "PPO_FAST_KEPT_BLOCKS"])
def test_environment_variables_are_checked(variable):
    code = f"import os; os.environ['{variable}'] = 'fpga'; import ppo_fast as pf; print(pf.explain())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert variable in done.stdout + done.stderr and "fpga" in done.stdout + done.stderr, done.stdout + done.stderr
