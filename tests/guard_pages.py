"""Every tensor of a kernel's call, inputs and outputs, between two pages that nobody may touch: reading or writing one byte
outside of it ends the process. What no parity test sees, a read past the end whose value is not used, this does.

    python -m pytest -p guard_pages tests/test_gae.py        (PYTHONPATH=tests): any test file that way
    python tests/guard_pages.py gae                          every tail of 1 to 64 elements, every instruction set
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from typing import Any, ClassVar

import torch
from torch import Tensor

from ppo_fast import _backend

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


class Region:
    """Pages of memory with a forbidden one on either side; never unmapped: they are used again."""

    free: ClassVar[dict[int, list[Region]]] = {}

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.map = mmap.mmap(-1, (pages + 2) * PAGE)
        whole = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        for page in (whole, whole + (pages + 1) * PAGE):
            if _libc.mprotect(ctypes.c_void_p(page), PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.start = whole + PAGE

    @classmethod
    def of(cls, size: int) -> Region:
        pages = -(-size // PAGE)
        kept = cls.free.setdefault(pages, [])
        return kept.pop() if kept else cls(pages)

    def give_back(self) -> None:
        self.free[self.pages].append(self)


def span(x: Tensor) -> tuple[int, int]:
    """From where to where in memory a tensor's elements lie."""
    length = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + length * x.element_size()


class Guarded:
    """The raw calls of a backend on copies between forbidden pages, copied back after; tensors that share memory still do.

    `at_end`: elements end where the page behind them begins, else they begin where the page ahead of them ends.
    """

    calls = 0

    def __init__(self, ops: Any) -> None:
        self.ops, self.at_end = ops, True

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.ops, name)
        if not callable(function):
            return function

        def call(*args: Any) -> Any:
            tensors = [x for x in args if isinstance(x, Tensor) and x.numel() and x.device.type == "cpu"]
            groups: list[list[int]] = []  # spans of memory that no two tensors share
            for start, end in sorted(map(span, tensors)):
                if groups and start < groups[-1][1]:
                    groups[-1][1] = max(groups[-1][1], end)
                else:
                    groups.append([start, end])
            there = []
            for start, end in groups:
                region = Region.of(end - start)
                at = region.start + (region.pages * PAGE - (end - start) if self.at_end else 0)
                ctypes.memmove(at, start, end - start)
                there.append((start, end, at, region))

            def guarded(x: Any) -> Any:
                if not (isinstance(x, Tensor) and x.numel() and x.device.type == "cpu"):
                    return x
                start, end = span(x)
                at = next(at + start - first for first, last, at, _ in there if first <= start and end <= last)
                memory = (ctypes.c_char * (end - start)).from_address(at)
                return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, x.stride())

            try:
                found = function(*map(guarded, args))
            finally:
                for start, end, at, region in there:
                    ctypes.memmove(start, at, end - start)
                    region.give_back()
            Guarded.calls += 1
            return found

        return call


def install() -> Guarded:
    assert _backend._cpu is not None
    guarded = Guarded(_backend._cpu.ops)
    _backend._cpu.ops = guarded
    return guarded


def pytest_configure(config: Any) -> None:
    install()


# --- every tail -------------------------------------------------------------------------------------------------------


def tails(op: str, n: int) -> Any:
    """Calls of which some dimension has n elements: everything optional given, dtypes in turn."""
    from gpu import cases

    r, dtype = cases._Numbers(n), cases.DTYPES[n % 4]
    if op in cases.SCANS:
        steps = [cases._steps(r, shape, dim, dtype) for shape, dim in (((n, 3), 0), ((3, n), 0), ((3, n), 1))]
        masked = [s | {"mask": r.flags(*s["rewards"].shape, p=0.7)} for s in steps]
        for case in steps + masked + [cases._steps(r, (n,), 0, dtype, ends=False)]:
            if op == "vtrace":
                case["log_rhos"] = r.normal(*case["rewards"].shape, scale=0.5, dtype=dtype)
            if op == "discounted_returns":
                case = {k: v for k, v in case.items() if k != "values"}
            names = [k for k in ("log_rhos", "rewards", "values") if k in case]
            yield cases.Call(op, {k: case.pop(k) for k in names}, case)
    elif op == "whiten":
        yield cases.Call(op, {"x": r.normal(n, dtype=dtype)}, {"mask": r.flags(n, p=0.8)})
        yield cases.Call(op, {"x": r.normal(3, n, dtype=dtype)})
    elif op == "categorical_log_prob":
        for rows, width in ((3, n), (n, 5)):
            labels = r.labels(width, rows)
            allowed = r.flags(rows, width).scatter_(-1, labels[:, None], True)
            logits = {"logits": r.normal(rows, width, dtype=dtype)}
            yield cases.Call(op, logits, {"actions": labels, "temperature": r.uniform(rows, low=0.5)})
            yield cases.Call(op, logits, {"actions": labels, "action_mask": allowed})
    elif op == "multi_categorical_log_prob":
        actions = torch.stack([r.labels(n, 3), r.labels(2, 3)], -1)
        yield cases.Call(op, {"logits": r.normal(3, n + 2, dtype=dtype)}, {"actions": actions, "nvec": (n, 2)})
    elif op == "bernoulli_log_prob":
        for shape in ((3, n), (n, 2)):
            yield cases.Call(op, {"logits": r.normal(*shape, dtype=dtype)}, {"actions": r.flags(*shape)})
    elif op == "normal_log_prob":
        for shape, scales in (((3, n), (n,)), ((n, 2), (n, 2))):
            inputs = {"mean": r.normal(*shape, dtype=dtype), "log_std": r.normal(*scales, scale=0.3, dtype=dtype)}
            yield cases.Call(op, inputs, {"actions": r.normal(*shape, dtype=dtype)})
    elif op == "beta_log_prob":
        for shape in ((3, n), (n, 2)):
            inputs = {k: r.uniform(*shape, low=0.4, high=6.0).to(dtype) for k in ("alpha", "beta")}
            yield cases.Call(op, inputs, {"actions": r.uniform(*shape, low=0.1, high=0.9).to(dtype)})
    else:
        for shape in ((n,), (3, n)) if op == "ppo_loss" else ((n,),):
            stored = cases._only(cases._rollout(r, shape, dtype=dtype), cases.FULL) | {"config": cases.FULL}
            values = {"values": r.normal(*shape, dtype=dtype)}
            if op == "ppo_loss":
                inputs = {"log_prob": r.normal(*shape, scale=0.3, dtype=dtype), "entropy": r.uniform(*shape).to(dtype)}
                yield cases.Call(op, inputs | values, stored | {"mask": r.flags(*shape, p=0.8)})
                yield cases.Call(op, inputs | values, stored)
                continue
            few = {k: v[:3] if isinstance(v, Tensor) else v for k, v in stored.items()}
            for rows, width, kept in ((n, 3, stored), (min(n, 3), n, few)):
                v = {"values": values["values"][:rows]}
                if op == "categorical_ppo_loss":
                    inputs = {"logits": r.normal(rows, width, dtype=dtype)}
                    yield cases.Call(op, inputs | v, kept | {"actions": r.labels(width, rows)})
                else:
                    inputs = {k: r.normal(rows, width, scale=0.3, dtype=dtype) for k in ("mean", "log_std")}
                    yield cases.Call(op, inputs | v, kept | {"actions": r.normal(rows, width, dtype=dtype)})


def main(op: str) -> None:
    """The results must be those of memory that torch gives, bit for bit; the last line printed says what crashed."""
    from conftest import ISAS
    from gpu import cases

    import ppo_fast as pf
    from ppo_fast import _C

    function, plain = getattr(pf, op), _backend._cpu.ops
    calls = [(f"small {i}", call) for i, call in enumerate(cases.small(op))]
    calls += [(f"tail {n}.{i}", call) for n in range(1, 65) for i, call in enumerate(tails(op, n))]
    guarded = install()
    for isa in ISAS:
        _C.set_isa(isa)
        for name, call in calls:
            _backend._cpu.ops = plain
            expected = cases.outcome(call, function)
            _backend._cpu.ops = guarded
            for guarded.at_end in (True, False):
                print(f"\r{op} on {isa}, {name}, {'end' if guarded.at_end else 'start'}", end="", flush=True)
                if different := cases.same(cases.outcome(call, function), expected):
                    sys.exit(f"\n{', '.join(different)} differ")
    print(f"\n{len(calls)} calls, {len(ISAS)} instruction sets, {Guarded.calls} guarded kernels")


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))
    main(sys.argv[1])
