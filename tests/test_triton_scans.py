"""The Triton kernels of gae, vtrace and discounted_returns, run by Triton's interpreter, against the specification."""

from __future__ import annotations

import math
import os
import sys
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import numpy as np
import pytest
import torch
from conftest import assert_as_good, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import assert_moments, carried_cases, cases, double, transposed

from ppo_fast import reference

pytest.importorskip("triton")
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
def few_lanes(monkeypatch):
    """Short inputs have borders too: 16 steps of a row, 2 columns."""
    monkeypatch.setattr(_scan, "LANES", 2)


def _outputs(count, *inputs):
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    return tuple(torch.full(inputs[0].shape, torch.nan, dtype=dtype) for _ in range(count))


def gae(
    rewards, values, last_values=None, *, terminated=None, truncated=None, final_values=None, mask=None,
    mask_mode="carry", cu_seqlens=None, gamma=0.99, lam=0.95, time_dim=0, log_rhos=None, moments=None,
):  # fmt: skip
    out = _outputs(2, rewards, values)
    _gae.gae(
        rewards, values, last_values, terminated, truncated, final_values, mask, mask_mode, cu_seqlens, gamma, lam,
        time_dim, out[0].dtype == torch.float64, *out, moments, None,
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


def by_both_walkers(name, case):
    """Time-major with a column in each lane, and with segments; batch-major. All as time-major."""
    results = []
    for columns in (0, 10**6):
        with mock.patch.object(_scan, "ENOUGH_COLUMNS", columns):
            results.append(OPS[name](**case))
    return [*results, tuple(x.t() for x in OPS[name](**transposed(case)))]


def assert_right(name, case, ulps=8.0):
    """Against float64, beside the eager formula; the same bits in every layout and by either walker."""
    truth, eager = SPECIFICATIONS[name](**double(case)), SPECIFICATIONS[name](**case)
    ours, *others = by_both_walkers(name, case)
    for i, (a, e, t) in enumerate(zip(ours, eager, truth, strict=True)):
        assert a.dtype == e.dtype
        assert_as_good(a, e, t, f"{name} {i}", ulps)
    for other in others:
        assert same_bits(ours, other)


def short(case, steps=21, columns=3):
    """The first steps of the first columns only: the interpreter takes its time."""
    wide = case["rewards"].shape[1]
    cut = {k: v[..., :columns][:steps] if isinstance(v, torch.Tensor) and v.ndim == 2 else v for k, v in case.items()}
    for k in ("last_values", "gamma", "lam"):
        cut[k] = case[k][:columns] if isinstance(case[k], torch.Tensor) else case[k]
    if isinstance(case["final_values"], tuple):
        index, value = case["final_values"]
        there = (index // max(wide, 1) < steps) & (index % max(wide, 1) < columns)
        index = index[there]
        cut["final_values"] = index // max(wide, 1) * min(wide, columns) + index % max(wide, 1), value[there]
    return cut


@settings(max_examples=30)
@given(cases())
def test_gae(case):
    assert_right("gae", short(case))


@settings(max_examples=15)
@given(cases())
def test_moments(case):
    """By every walker; the outputs do not change."""
    case = short(case)
    for layout in (case, transposed(case)):
        for columns in (0, 10**6):
            with mock.patch.object(_scan, "ENOUGH_COLUMNS", columns):
                moments = torch.full((3,), torch.nan, dtype=torch.float64)
                advantages, returns = gae(**layout, moments=moments)
                assert same_bits((advantages, returns), gae(**layout))
            assert_moments(moments, advantages, layout["mask"])


def test_moments_of_packed_sequences(monkeypatch):
    """More programs than are joined at once."""
    monkeypatch.setattr(_scan._reduce, "JOIN", 4)
    bounds = torch.tensor([0, 5, 5, 40, 41, 60, 63, 64, 80, 80, 80, 90, 91])
    r, v, mask = torch.randn(91) + 9.0, torch.randn(91), torch.rand(91) < 0.7
    r[~mask] = torch.nan
    moments = torch.full((3,), torch.nan, dtype=torch.float64)
    advantages, _ = gae(r, v, mask=mask, cu_seqlens=bounds, moments=moments)
    assert_moments(moments, advantages, mask)
    gae(r[:0], v[:0], moments=moments)
    assert not bool(moments.any())


@settings(max_examples=15)
@given(carried_cases())
def test_discounted_returns(case):
    assert_right("discounted_returns", short(case))


@settings(max_examples=15)
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


BORDERS = [(1, 1), (1, 3), (7, 2), (8, 2), (9, 1), (16, 1), (17, 2), (33, 3)]  # of 8 steps, of 16, of 2 columns


@pytest.mark.parametrize("shape", BORDERS)
@pytest.mark.parametrize("name", OPS)
def test_around_the_borders_of_blocks(name, shape):
    assert_right(name, rollout(*shape))


@pytest.mark.parametrize("shape", [(1, 1), (19, 3), (35, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPS)
def test_a_column_stands_alone(name, shape, dtype):
    """The same bits by itself, and with rates of its own."""
    steps, columns = shape
    case = rollout(steps, columns, dtype) | {"gamma": torch.rand(columns), "lam": torch.rand(columns)}
    whole = OPS[name](**case)
    for n in {0, columns - 1}:
        alone = {k: v[..., n] if isinstance(v, torch.Tensor) else v for k, v in case.items()}
        assert same_bits(OPS[name](**alone), [x[:, n] for x in whole])
    if name == "gae":
        flat = {k: v.t().reshape(-1) if isinstance(v, torch.Tensor) and v.ndim == 2 else v for k, v in case.items()}
        packed = gae(**flat, cu_seqlens=torch.arange(columns + 1) * steps)
        assert same_bits(packed, [x.t().reshape(-1) for x in whole])


@pytest.mark.parametrize("bounds_type", [torch.int32, torch.int64])
def test_packed_equals_padded(bounds_type):
    lengths = torch.tensor([5, 0, 16, 1, 35, 17])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(bounds_type)
    m, s = int(lengths.sum()), len(lengths)
    r, v, last, gamma, lam = torch.randn(m), torch.randn(m), torch.randn(s), torch.rand(s), torch.rand(s)
    ends, cuts, final, seen = torch.rand(m) < 0.1, torch.rand(m) < 0.1, torch.randn(m), torch.rand(m) < 0.8
    rest = {"gamma": gamma, "lam": lam}

    def padded(x, fill):
        out = torch.full((s, 36), fill)
        out[torch.arange(36) < lengths[:, None]] = x
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
        assert same_bits(packed, [x[there] for x in wide])
        assert not any(bool(x[~there].any()) for x in wide)
        options = {"terminated": ends, "truncated": cuts, "final_values": final, "mask": mask, "cu_seqlens": bounds}
        truth = reference.gae(r, v, last, **options, **rest)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(packed, truth, strict=True))
    for mode in ("carry", "zero"):  # borders are those of sequences: nothing comes from behind one
        dirty = torch.where(torch.arange(m) < bounds[3], r, torch.nan)
        ours = gae(dirty, v, last, mask=seen, mask_mode=mode, cu_seqlens=bounds, gamma=gamma, lam=lam)
        clean = gae(r, v, last, mask=seen, mask_mode=mode, cu_seqlens=bounds, gamma=gamma, lam=lam)
        assert same_bits([x[: bounds[3]] for x in ours], [x[: bounds[3]] for x in clean])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", OPS)
def test_nothing_leaks(name, poison):
    """Behind a terminal step, behind a mask, and in final values where no step is truncated, anything may stand."""
    case = rollout(30, 2)
    case["terminated"][20] = True
    case["mask"][20] = True
    clean = case
    dirty = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    read = case["truncated"] & ~case["terminated"] & case["mask"]
    dirty["final_values"][~read] = poison
    for k in ("rewards", "values", "log_rhos"):
        dirty[k][21:] = poison
        dirty[k][~case["mask"]] = poison
    for ours, others in zip(by_both_walkers(name, clean), by_both_walkers(name, dirty), strict=True):
        assert same_bits([x[:21] for x in ours], [x[:21] for x in others])


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
    """Where a segment as one map would multiply infinity by 0."""
    zero, large = torch.zeros(30, 2), torch.full((30, 2), 60.0)
    rewards = zero.clone()
    rewards[0] = 1.0
    for time_dim in (0, 1):
        x = [y.t() if time_dim else y for y in (large, rewards, zero)]
        for clips in ({}, {"rho_clip": math.inf}):
            targets, _ = vtrace(*x, c_clip=math.inf, **clips, time_dim=time_dim)
            expected = reference.vtrace(*x, c_clip=math.inf, **clips, time_dim=time_dim)[0]
            assert bool(targets.isfinite().all())
            torch.testing.assert_close(targets, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", OPS)
def test_a_gap_longer_than_a_block(name):
    case = rollout(45, 3)
    case["mask"][3:41, 1] = False
    case["mask"][20:, 2] = False
    assert_right(name, case)


def test_borders_are_held():
    r, v = torch.randn(20), torch.randn(20)
    good = gae(r, v, cu_seqlens=torch.tensor([0, 7, 20]))
    assert same_bits(good, gae(r, v, cu_seqlens=torch.tensor([-9, 7, 10**9])))
    gae(r, v, cu_seqlens=torch.tensor([0, 20, 3, 20]))
