"""The Triton kernels of gae, vtrace and discounted_returns, run by Triton's interpreter, against the specification."""

from __future__ import annotations

import math
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import numpy as np
import pytest
import torch
from conftest import assert_as_good
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import carried_cases, cases, double, transposed

from ppo_fast import reference

pytest.importorskip("triton")
import triton
import triton.language as tl
from ppo_fast.kernels import _scan
from ppo_fast.kernels import discounted_returns as _returns
from ppo_fast.kernels import gae as _gae
from ppo_fast.kernels import vtrace as _vtrace
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

pytestmark = pytest.mark.skipif(
    not isinstance(_scan.scan_rows, InterpretedFunction), reason="kernels were imported without TRITON_INTERPRET"
)


def extents(tensors):
    """(starts, ends) of the memory that the tensors' elements lie in, in order, joined where they overlap."""
    found = []
    for x in tensors:
        if isinstance(x, torch.Tensor) and x.numel():
            last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            found.append([x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize])
    joined = []
    for start, end in sorted(found):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(end, joined[-1][1])
        else:
            joined.append([start, end])
    return np.array(joined, dtype=np.uint64).reshape(-1, 2).T


@pytest.fixture(autouse=True)
def strict_interpreter(monkeypatch):
    """A kernel may touch no memory but its arguments'; and it is quicker: the language is patched once a kernel."""
    known = np.zeros((2, 0), dtype=np.uint64)

    def start(self, *args, original=interpreter.GridExecutor.__call__, **kwargs):
        nonlocal known
        known = extents(args)
        original(self, *args, **kwargs)

    def checked(original, mask):
        def access(self, pointers, *rest):
            at = pointers.data[np.broadcast_to(rest[mask].data != 0, pointers.data.shape)]
            element = np.uint64(interpreter._get_np_dtype(pointers.get_element_ty()).itemsize)
            nearest = np.searchsorted(known[0], at, side="right") - 1
            inside = (nearest >= 0) & (at + element <= known[1][nearest]) if known.size else at != at
            assert inside.all(), "a kernel reads or writes outside of its arguments"
            return original(self, pointers, *rest)

        return access

    for name, module in list(sys.modules.items()):
        if name.startswith("ppo_fast.kernels."):
            monkeypatch.setattr(module, "_core", tl.core, raising=False)
    monkeypatch.setattr(InterpretedFunction, "__call__", lambda self, *args, **kw: self.rewrite()(*args, **kw))
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", start)
    for name, mask in (("create_masked_load", 0), ("create_masked_store", 1)):
        original = getattr(interpreter.InterpreterBuilder, name)
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, checked(original, mask))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Short inputs have block borders too."""
    monkeypatch.setattr(_scan, "BLOCK_T", 16)


def _outputs(count, *inputs):
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    return tuple(torch.full(inputs[0].shape, torch.nan, dtype=dtype) for _ in range(count))


def gae(
    rewards, values, last_values=None, *, terminated=None, truncated=None, final_values=None, mask=None,
    mask_mode="carry", cu_seqlens=None, gamma=0.99, lam=0.95, time_dim=0, log_rhos=None,
):  # fmt: skip
    out = _outputs(2, rewards, values)
    _gae.gae(
        rewards, values, last_values, terminated, truncated, final_values, mask, mask_mode, cu_seqlens, gamma, lam,
        time_dim, out[0].dtype == torch.float64, *out, None,
    )  # fmt: skip
    return out


def vtrace(
    log_rhos, rewards, values, last_values=None, *, terminated=None, truncated=None, final_values=None, mask=None,
    gamma=0.99, lam=1.0, rho_clip=1.0, c_clip=1.0, time_dim=0, mask_mode="carry",
):  # fmt: skip
    out = _outputs(2, rewards, log_rhos, values)
    _vtrace.vtrace(
        log_rhos, rewards, values, last_values, terminated, truncated, final_values, mask, gamma, lam, rho_clip, c_clip,
        time_dim, out[0].dtype == torch.float64, *out, None,
    )  # fmt: skip
    return out


def discounted_returns(
    rewards, last_values=None, *, terminated=None, truncated=None, final_values=None, mask=None, gamma=0.99,
    time_dim=0, **_,
):  # fmt: skip
    out = _outputs(1, rewards)
    _returns.discounted_returns(
        rewards, last_values, terminated, truncated, final_values, mask, gamma, time_dim,
        out[0].dtype == torch.float64, *out, None,
    )  # fmt: skip
    return out


OPS = {"gae": gae, "vtrace": vtrace, "discounted_returns": discounted_returns}
SPECIFICATIONS = {
    "gae": lambda log_rhos, **case: reference.gae(**case),
    "vtrace": lambda mask_mode, **case: reference.vtrace(**case),
    "discounted_returns": lambda log_rhos, values, mask_mode, lam, **case: (reference.discounted_returns(**case),),
}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_right(name, case, ulps=8.0):
    """Both layouts against float64, beside the eager formula."""
    truth, eager = SPECIFICATIONS[name](**double(case)), SPECIFICATIONS[name](**case)
    for layout, case_ in (("time-major", case), ("batch-major", transposed(case))):
        ours = OPS[name](**case_)
        ours = [x.t() for x in ours] if "time_dim" in case_ else ours
        for i, (a, e, t) in enumerate(zip(ours, eager, truth, strict=True)):
            assert a.dtype == e.dtype
            assert_as_good(a, e, t, f"{name} {layout} {i}", ulps)


def short(case, most=37):
    """The first steps only: the interpreter takes its time."""
    case = {k: v[:most] if isinstance(v, torch.Tensor) and v.ndim == 2 else v for k, v in case.items()}
    if isinstance(case["final_values"], tuple):
        index, value = case["final_values"]
        there = index < case["rewards"].numel()
        case["final_values"] = index[there], value[there]
    return case


@settings(max_examples=30)
@given(cases())
def test_gae(case):
    assert_right("gae", short(case))


@settings(max_examples=15)
@given(carried_cases())
def test_discounted_returns(case):
    assert_right("discounted_returns", short(case))


@settings(max_examples=20)
@given(carried_cases(), *[st.sampled_from((0.5, 1.0, 2.0, math.inf))] * 2)
def test_vtrace(case, rho_clip, c_clip):
    assert_right("vtrace", short(case) | {"rho_clip": rho_clip, "c_clip": c_clip}, ulps=16)


def rollout(steps, columns, dtype=torch.float32):
    names = ("rewards", "values", "log_rhos", "final_values")
    case = {name: torch.randn(steps, columns, dtype=dtype) for name in names}
    flags = {
        name: torch.rand(steps, columns) < p for name, p in (("terminated", 0.1), ("truncated", 0.1), ("mask", 0.8))
    }
    return (
        case
        | flags
        | {"last_values": torch.randn(columns, dtype=dtype), "mask_mode": "carry", "gamma": 0.9, "lam": 0.8}
    )


BORDERS = [
    (1, 1),
    (1, 33),
    (7, 3),
    (8, 31),
    (9, 32),
    (16, 33),
    (17, 2),
    (33, 1),
]  # of GROUP = 8, BLOCK_T = 16, BLOCK_N = 32


@pytest.mark.parametrize("shape", BORDERS)
@pytest.mark.parametrize("name", OPS)
def test_around_the_borders_of_blocks(name, shape):
    assert_right(name, rollout(*shape))


@pytest.mark.parametrize("time_dim", [0, 1, -2])
@pytest.mark.parametrize("name", OPS)
def test_a_column_does_not_see_the_others(name, time_dim):
    """The same bits alone as in the batch, in the same layout."""
    case = rollout(18, 34)
    case = case if time_dim in (0, -2) else transposed(case)
    case |= {"time_dim": time_dim, "gamma": torch.rand(34), "lam": torch.rand(34)}
    columns = 1 - time_dim % 2
    whole = OPS[name](**case)
    for n in (0, 33):
        alone = {}
        for k, v in case.items():
            alone[k] = v.narrow(columns if v.ndim == 2 else 0, n, 1) if isinstance(v, torch.Tensor) else v
        assert same(OPS[name](**alone), [x.narrow(columns, n, 1) for x in whole])


@pytest.mark.parametrize("bounds_type", [torch.int32, torch.int64])
def test_packed_equals_padded(bounds_type):
    lengths = torch.tensor([5, 0, 16, 1, 40, 17, 3])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(bounds_type)
    m, s = int(lengths.sum()), len(lengths)
    r, v, last, gamma, lam = torch.randn(m), torch.randn(m), torch.randn(s), torch.rand(s), torch.rand(s)
    ends, cuts, final, seen = torch.rand(m) < 0.1, torch.rand(m) < 0.1, torch.randn(m), torch.rand(m) < 0.8
    rest = {"gamma": gamma, "lam": lam}

    def padded(x, fill):
        out = torch.full((s, 41), fill)
        out[torch.arange(41) < lengths[:, None]] = x
        return out

    for mask in (None, seen):
        packed = gae(
            r, v, last, terminated=ends, truncated=cuts, final_values=final, mask=mask, cu_seqlens=bounds, **rest
        )
        there = padded(True, False)
        wide = gae(
            padded(r, torch.nan), padded(v, torch.nan), last, terminated=padded(ends, True), truncated=padded(cuts, True),
            final_values=padded(final, torch.nan), mask=there if mask is None else padded(mask, False), time_dim=1, **rest,
        )  # fmt: skip
        assert same(packed, [x[there] for x in wide])
        assert not any(bool(x[~there].any()) for x in wide)
        options = {"terminated": ends, "truncated": cuts, "final_values": final, "mask": mask, "cu_seqlens": bounds}
        truth = reference.gae(r, v, last, **options, **rest)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(packed, truth, strict=True))
    for mode in ("carry", "zero"):  # borders are those of sequences: nothing comes from behind one
        dirty = torch.where(torch.arange(m) < bounds[3], r, torch.nan)
        ours = gae(dirty, v, last, mask=seen, mask_mode=mode, cu_seqlens=bounds, gamma=gamma, lam=lam)
        clean = gae(r, v, last, mask=seen, mask_mode=mode, cu_seqlens=bounds, gamma=gamma, lam=lam)
        assert same([x[: bounds[3]] for x in ours], [x[: bounds[3]] for x in clean])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("name", OPS)
def test_nothing_leaks(name, time_dim, poison):
    """Behind a terminal step, behind a mask, and in final values where no step is truncated, anything may stand."""
    case = rollout(35, 3)
    case["terminated"][20] = True
    case["mask"][20] = True
    clean = case
    dirty = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    read = case["truncated"] & ~case["terminated"] & case["mask"]
    dirty["final_values"][~read] = poison
    for k in ("rewards", "values", "log_rhos"):
        dirty[k][21:] = poison
        dirty[k][~case["mask"]] = poison
    results = []
    for x in (clean, dirty):
        ours = OPS[name](**(transposed(x) if time_dim else x))
        results.append([(y.t() if time_dim else y)[:21] for y in ours])
    assert same(*results)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (0,), (1,), (1, 1), (20,)])
@pytest.mark.parametrize("time_dim", [0, -1])
def test_shapes(shape, time_dim):
    r, v, rho = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    for ours, truth in (
        (gae(r, v, time_dim=time_dim), reference.gae(r, v, time_dim=time_dim)),
        (vtrace(rho, r, v, time_dim=time_dim), reference.vtrace(rho, r, v, time_dim=time_dim)),
        (discounted_returns(r, time_dim=time_dim), (reference.discounted_returns(r, time_dim=time_dim),)),
    ):
        assert all(a.shape == r.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, truth, strict=True))
    empty = gae(torch.empty(0), torch.empty(0), torch.randn(2), cu_seqlens=torch.zeros(3, dtype=torch.int64))
    assert empty[0].shape == (0,)


@pytest.mark.parametrize("last", [torch.tensor(2.0), torch.tensor([2.0])])
def test_one_trajectory(last):
    """[T] takes [] and [1] where [T, N] takes [N]."""
    r, v, rho, done = torch.randn(20), torch.randn(20), torch.randn(20), torch.rand(20) < 0.2
    rate = torch.full_like(last, 0.9)
    for ours, truth in (
        (gae(r, v, last, terminated=done, gamma=rate, lam=rate), reference.gae(r, v, last, terminated=done, gamma=0.9, lam=0.9)),
        (vtrace(rho, r, v, last, terminated=done, gamma=rate), reference.vtrace(rho, r, v, last, terminated=done, gamma=0.9)),
    ):  # fmt: skip
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, truth, strict=True))


@pytest.mark.parametrize("time_dim", [0, 1])
def test_rates_of_any_stride(time_dim):
    r, v = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    last = torch.randn(10, dtype=torch.float64)[::2]
    gamma, lam = torch.rand(10, dtype=torch.float64)[1::2], torch.rand((), dtype=torch.float64).expand(5)
    x = (r, v) if time_dim == 0 else (r.t(), v.t())
    for g, k in ((gamma, lam), (gamma, 0.3), (torch.tensor(0.97), lam)):
        ours = gae(*x, last, gamma=g, lam=k, time_dim=time_dim)
        truth = reference.gae(*x, last, gamma=g, lam=k, time_dim=time_dim)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-13) for a, b in zip(ours, truth, strict=True))


@pytest.mark.parametrize("time_dim", [0, 1])
def test_all_masked(time_dim):
    r = torch.full((19, 3) if time_dim == 0 else (3, 19), torch.nan)
    for mode in ("carry", "zero"):
        a, ret = gae(r, r, torch.randn(3), mask=torch.zeros_like(r), mask_mode=mode, time_dim=time_dim)
        assert not bool(a.any()) and not bool(ret.any())


def test_sparse_final_values():
    """Of equal positions the last counts; one out of range is no one's; a truncated step without an entry is NaN."""
    r, v = torch.randn(20, 3), torch.randn(20, 3)
    cut = torch.zeros(20, 3, dtype=torch.bool)
    cut[4, 1] = cut[17, 2] = cut[9, 0] = cut[0, 0] = cut[19, 2] = True
    dense = torch.where(cut, torch.nan, 0.0)
    dense[4, 1], dense[17, 2], dense[0, 0], dense[19, 2] = 5.0, 7.0, 2.0, 3.0
    index = torch.tensor([53, 13, 59, 0, 60, 13, -1, 10**12])
    value = torch.tensor([7.0, 1.0, 3.0, 2.0, 9.0, 5.0, 9.0, 9.0])
    ours = gae(r, v, truncated=cut, final_values=(index, value))
    truth = gae(r, v, truncated=cut, final_values=dense)
    assert all(torch.equal(a.nan_to_num(99.0), b.nan_to_num(99.0)) for a, b in zip(ours, truth, strict=True))
    assert (
        bool(ours[0][1:10, 0].isnan().all())
        and not bool(ours[0][10:].isnan().any())
        and ours[0][:, 1:].isfinite().all()
    )
    none = gae(r, v, truncated=cut, final_values=(index[:0].int(), value[:0]))
    assert none[0][4, 1].isnan()


def test_large_ratios_meet_a_zero_step_by_step():
    zero = torch.zeros(9, 2)
    for time_dim, x in ((0, zero), (1, zero.t())):
        targets, _ = vtrace(torch.full_like(x, 60.0), x, x, c_clip=math.inf, time_dim=time_dim)
        assert not bool(targets.any())


@pytest.mark.parametrize("name", OPS)
def test_a_gap_longer_than_a_block(name):
    case = rollout(60, 3)
    case["mask"][3:50, 1] = False
    case["mask"][20:, 2] = False
    assert_right(name, case)


_core = tl.core  # as strict_interpreter has it


@triton.jit
def _compose_three(a, b, cut, early_first, late_first):
    """Steps 0, 1, 2 as one, in both orders."""
    a0, b0, c0 = tl.load(a), tl.load(b), tl.load(cut)
    a1, b1, c1 = tl.load(a + 1), tl.load(b + 1), tl.load(cut + 1)
    a2, b2, c2 = tl.load(a + 2), tl.load(b + 2), tl.load(cut + 2)
    x, y, z = _scan.compose(a1, b1, c1, a0, b0, c0)
    x, y, z = _scan.compose(a2, b2, c2, x, y, z)
    tl.store(early_first, x), tl.store(early_first + 1, y), tl.store(early_first + 2, z)
    x, y, z = _scan.compose(a2, b2, c2, a1, b1, c1)
    x, y, z = _scan.compose(x, y, z, a0, b0, c0)
    tl.store(late_first, x), tl.store(late_first + 1, y), tl.store(late_first + 2, z)


@pytest.mark.parametrize("cuts", range(8))
def test_steps_compose_in_any_order(cuts):
    """The interpreter goes through a scan one by one; a GPU does not."""
    cut = torch.tensor([cuts & 1, cuts >> 1 & 1, cuts >> 2 & 1], dtype=torch.int32)
    for a in (torch.randn(3), torch.tensor([0.5, torch.nan, 1.0]), torch.tensor([0.5, 1.0, torch.nan])):
        found = torch.full((2, 3), torch.nan)
        _compose_three[(1,)](a, torch.rand(3), cut, *found)
        torch.testing.assert_close(*found, equal_nan=True)
        expected = 1.0 if cuts else 0.0
        assert found[0, 2] == expected


def test_borders_are_held():
    r, v = torch.randn(20), torch.randn(20)
    good = gae(r, v, cu_seqlens=torch.tensor([0, 7, 20]))
    assert same(good, gae(r, v, cu_seqlens=torch.tensor([-9, 7, 10**9])))
    gae(r, v, cu_seqlens=torch.tensor([0, 20, 3, 20]))
