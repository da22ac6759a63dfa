"""gae: against float64, a sum written from the definition, and the laws that any right estimate obeys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ISAS, assert_as_good, pf, same_bits
from hypothesis import given
from scan_cases import assert_moments, cases, double, rate, steps_of_column, transposed

from ppo_fast import reference
from ppo_fast.ops.gae import _op


def call(function, case):
    return function(**{k: v for k, v in case.items() if k != "log_rhos"})


def by_definition(case):
    """A_t = Σ_k (γλ)^k δ_{t+k} up to the end of the episode."""
    shape = case["rewards"].shape
    advantages, returns = np.zeros(shape), np.zeros(shape)
    for n in range(shape[1]):
        gamma, lam = rate(case["gamma"], n), rate(case["lam"], n)
        steps = steps_of_column(case, n)
        for i, first in enumerate(steps):
            total = 0.0
            for k, s in enumerate(steps[i:]):
                total += (gamma * lam) ** k * (s["rewards"] + gamma * s["next"] - s["values"])
                if not s["goes_on"]:
                    break
            if not first["masked"]:
                advantages[first["t"], n] = total
                returns[first["t"], n] = total + first["values"]
    return torch.from_numpy(advantages), torch.from_numpy(returns)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@given(cases())
def test_values(case):
    truth = call(reference.gae, double(case))
    eager = call(reference.gae, case)
    for name, case_ in (("time-major", case), ("batch-major", transposed(case))):
        ours = call(pf.gae, case_)
        assert all(x.is_contiguous() for x in ours)
        ours = tuple(x.t() for x in ours) if "time_dim" in case_ else ours
        for what, a, e, t in zip(("advantages", "returns"), ours, eager, truth, strict=True):
            assert a.dtype == e.dtype
            assert_as_good(a, e, t, f"{name} {what}")


@given(cases())
def test_definition(case):
    for what, a, t in zip(("advantages", "returns"), call(pf.gae, double(case)), by_definition(case), strict=True):
        assert_as_good(a, None, t, what, ulps=64)


def rollout(steps, columns, dtype=torch.float32):
    return {
        "rewards": torch.randn(steps, columns, dtype=dtype),
        "values": torch.randn(steps, columns, dtype=dtype),
        "last_values": torch.randn(columns, dtype=dtype),
        "terminated": torch.rand(steps, columns) < 0.05,
    }


SHAPES = [(1, 1), (5, 1), (257, 1), (2100, 1), (70, 8), (64, 16), (67, 33), (9, 2050), (3, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_everywhere(shape, dtype):
    """Instruction sets, threads, layouts, columns alone, sequences packed."""
    case = rollout(*shape, dtype)
    steps, columns = shape
    case |= {"truncated": torch.rand(shape) < 0.05, "final_values": torch.randn(shape, dtype=dtype)}
    expected = pf.gae(**case)
    for isa in ISAS:
        pf._C.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert same(pf.gae(**case), expected), (isa, threads)
            by_row = {k: v.t() if v.ndim == 2 else v for k, v in case.items()}
            assert same([x.t() for x in pf.gae(**by_row, time_dim=1)], expected), isa
            n = columns - 1
            alone = pf.gae(**{k: v[:, n] if v.ndim == 2 else v[n] for k, v in case.items()})
            assert same(alone, [x[:, n] for x in expected]), isa
            packed = {k: v.t().reshape(-1) if v.ndim == 2 else v for k, v in case.items()}
            packed = pf.gae(**packed, cu_seqlens=torch.arange(columns + 1) * steps)
            assert same([x.view(columns, steps).t() for x in packed], expected), isa


def test_large_outputs_past_the_caches():
    for shape, time_dim in (((131, 20_003), 0), ((20_003, 131), 1)):
        r, v = torch.randn(shape), torch.randn(shape)
        a, ret = pf.gae(r, v, time_dim=time_dim)
        pick = (slice(None), slice(5, 8)) if time_dim == 0 else (slice(5, 8), slice(None))
        assert same(pf.gae(r[pick], v[pick], time_dim=time_dim), (a[pick], ret[pick]))
        assert not bool(a.isnan().any() | ret.isnan().any())


def test_packed_equals_padded():
    lengths = torch.tensor([5, 0, 64, 1, 130, 3])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    m, s = int(lengths.sum()), len(lengths)
    r, v, last, gamma, lam = torch.randn(m), torch.randn(m), torch.randn(s), torch.rand(s), torch.rand(s)
    packed = pf.gae(r, v, last, cu_seqlens=bounds, gamma=gamma, lam=lam)
    padded_r, padded_v = torch.full((s, 130), torch.nan), torch.full((s, 130), torch.nan)
    mask = torch.arange(130) < lengths[:, None]
    padded_r[mask], padded_v[mask] = r, v
    padded = pf.gae(padded_r, padded_v, last, mask=mask, gamma=gamma, lam=lam, time_dim=1)
    assert same(packed, [x[mask] for x in padded])
    assert all(bool((x[~mask] == 0).all()) for x in padded)
    truth = reference.gae(r, v, last, cu_seqlens=bounds, gamma=gamma, lam=lam)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(packed, truth, strict=True))


def test_lambda_one_is_monte_carlo_and_lambda_zero_the_td_error():
    case = rollout(60, 5, torch.float64)
    case |= {"truncated": torch.rand(60, 5) < 0.1, "final_values": torch.randn(60, 5, dtype=torch.float64)}
    _, returns = pf.gae(**case, lam=1.0)
    monte_carlo = pf.discounted_returns(**{k: v for k, v in case.items() if k != "values"})
    assert torch.allclose(returns, monte_carlo, atol=1e-12)
    advantages, _ = pf.gae(**case, lam=0.0)
    after = torch.cat([case["values"][1:], case["last_values"][None]])
    after = torch.where(case["truncated"], case["final_values"], after).masked_fill(case["terminated"], 0.0)
    assert torch.allclose(advantages, case["rewards"] + 0.99 * after - case["values"], atol=1e-12)


def test_linear_in_rewards():
    case = rollout(40, 6, torch.float64)
    other = torch.randn(40, 6, dtype=torch.float64)
    zero = pf.gae(**case | {"rewards": torch.zeros_like(other)})[0]
    a, b = pf.gae(**case)[0] - zero, pf.gae(**case | {"rewards": other})[0] - zero
    both = pf.gae(**case | {"rewards": 2 * case["rewards"] - other})[0] - zero
    assert torch.allclose(both, 2 * a - b, atol=1e-12)


@pytest.mark.parametrize("cut", ["terminated", "truncated"])
def test_an_episode_cut_is_two_episodes(cut):
    r, v, last, final = (torch.randn(s, dtype=torch.float64) for s in ((30, 4), (30, 4), (4,), (30, 4)))
    done = torch.zeros(30, 4, dtype=torch.bool)
    done[12] = True
    whole = pf.gae(r, v, last, **{cut: done}, **({"final_values": final} if cut == "truncated" else {}))
    first = pf.gae(r[:13], v[:13], final[12] if cut == "truncated" else None)
    second = pf.gae(r[13:], v[13:], last)
    for w, a, b in zip(whole, first, second, strict=True):
        assert torch.allclose(w, torch.cat([a, b]), atol=1e-12)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("columns", [1, 3, 20])
def test_nothing_leaks_across_an_end(poison, columns):
    """Behind a terminal step, and in final values where the step was not truncated, anything may stand."""
    r, v = torch.randn(70, columns), torch.randn(70, columns)
    done = torch.zeros(70, columns, dtype=torch.bool)
    done[33] = True
    clean = pf.gae(r, v, terminated=done)
    r[34:], v[34:] = poison, poison
    dirty = pf.gae(r, v, terminated=done, truncated=done, final_values=torch.full_like(r, poison))
    assert same([x[:34] for x in clean], [x[:34] for x in dirty])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (0,), (1,), (1, 1), (0, 2, 2)])
def test_empty_and_tiny(shape):
    r, v = torch.randn(shape), torch.randn(shape)
    a, ret = pf.gae(r, v)
    assert a.shape == ret.shape == r.shape
    assert torch.equal(a, r - v) and torch.equal(ret, (r - v) + v)


def test_all_masked():
    r = torch.full((9, 3), torch.nan)
    for mode in ("carry", "zero"):
        a, ret = pf.gae(r, r, torch.randn(3), mask=torch.zeros(9, 3), mask_mode=mode)
        assert not bool(a.any()) and not bool(ret.any())


@pytest.mark.parametrize("time_dim", [0, 1, 2, -1])
def test_more_dimensions(time_dim):
    r, v, final = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    shape = list(r.shape)
    del shape[time_dim]
    last, cut = torch.randn(shape), torch.rand(3, 4, 5) < 0.3
    index = cut.flatten().nonzero()[:, 0]
    ours = pf.gae(r, v, last, truncated=cut, final_values=(index, final.flatten()[index]), time_dim=time_dim)
    truth = reference.gae(r, v, last, truncated=cut, final_values=final, time_dim=time_dim)
    assert all(x.is_contiguous() for x in ours)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, truth, strict=True))


def test_gradients_are_off_unless_asked_for():
    r, v = torch.randn(8, 2), torch.randn(8, 2, requires_grad=True)
    assert not any(x.requires_grad for x in pf.gae(r, v))
    pf.gae(r, v, differentiable=True)[0].sum().backward()
    assert v.grad is not None and bool(v.grad.any())
    with pf.use_backend("reference"):
        assert not any(x.requires_grad for x in pf.gae(r, v))


# --- moments of the advantages ------------------------------------------------------------------------------------------


@given(cases())
def test_moments(case):
    for case_ in (case, transposed(case)):
        advantages, returns, moments = call(pf.gae, case_ | {"moments": True})
        assert same_bits((advantages, returns), call(pf.gae, case_))
        assert_moments(moments, advantages, case_["mask"])


#: (steps, columns): within a tile, and across tiles and blocks of every walker.
WHOLES = [(1, 1), (5, 3), (100, 33), (2100, 1), (1040, 3), (300, 20), (1, 400)]


@pytest.mark.parametrize("shape", WHOLES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_of_every_layout(shape, masked, dtype):
    case = rollout(*shape, dtype)
    case["rewards"] += 50.0
    if masked:
        case["mask"] = torch.rand(shape) < 0.7
        case["rewards"][~case["mask"]] = torch.nan
    by_row = {k: v.t() if v.ndim == 2 else v for k, v in case.items()}
    as_rows = {k: v.contiguous() for k, v in by_row.items()}
    flat = {k: v.reshape(-1) for k, v in as_rows.items()} | {"cu_seqlens": torch.arange(shape[1] + 1) * shape[0]}
    for layout in (case, by_row | {"time_dim": 1}, as_rows | {"time_dim": 1}, flat):
        advantages, returns, moments = pf.gae(**layout, moments=True)
        assert same((advantages, returns), pf.gae(**layout))
        assert_moments(moments, advantages, layout.get("mask"))
        white = pf.whiten(advantages, mask=layout.get("mask"), moments=moments)
        eager = pf.whiten(advantages, mask=layout.get("mask"))
        truth = reference.whiten(advantages.double(), mask=layout.get("mask"))
        assert_as_good(white, eager, truth, ulps=32)


def test_moments_of_more_blocks_than_are_joined_at_once():
    r, v = torch.randn(2100) + 7.0, torch.randn(2100)
    advantages, _, moments = pf.gae(r, v, cu_seqlens=torch.arange(2101), moments=True)
    assert_moments(moments, advantages, None)


@pytest.mark.parametrize(("shape", "time_dim"), [((2, 70_000), 0), ((50, 3000), 0), ((66, 17_000), 1), ((3000, 50), 1)])
def test_moments_have_the_same_bits_for_any_threads(shape, time_dim):
    """And those that whiten finds for itself."""
    r, v, mask = torch.randn(shape), torch.randn(shape), torch.rand(shape) < 0.8
    bounds = torch.arange(0, r.numel() + 1, r.numel() // 50)
    results = []
    for isa in ISAS:
        pf._C.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            plain = pf.gae(r, v, time_dim=time_dim, moments=True)[2]
            masked = pf.gae(r, v, mask=mask, time_dim=time_dim, moments=True)[2]
            packed = pf.gae(r.flatten(), v.flatten(), cu_seqlens=bounds, moments=True)[2]
            results.append((plain, masked, packed))
    assert all(same(results[0], x) for x in results)
    for keep, moments in zip((None, mask), results[0], strict=False):
        advantages, _ = pf.gae(r, v, mask=keep, time_dim=time_dim)
        assert_moments(moments, advantages, keep)
        assert torch.equal(pf.whiten(advantages, mask=keep, moments=moments), pf.whiten(advantages, mask=keep))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_moments_of_nothing_are_zero(backend):
    with pf.use_backend(backend):
        for shape in ((0, 3), (3, 0), (0,), (5, 4), (30, 3)):
            for time_dim in (0, -1):
                r = torch.full(shape, torch.nan)
                moments = pf.gae(r, r, mask=torch.zeros(shape), time_dim=time_dim, moments=True)[2]
                assert torch.equal(moments, torch.zeros(3, dtype=torch.float64))
        empty = torch.empty(0)
        assert not bool(pf.gae(empty, empty, cu_seqlens=torch.zeros(3, dtype=torch.int64), moments=True)[2].any())


def test_moments_do_not_cancel():
    """Advantages a million from 0 that differ by one."""
    shape = (40, 600)
    r = 1e6 + torch.randint(0, 2, shape).float()
    for time_dim in (0, 1):
        advantages, _, moments = pf.gae(r, torch.zeros(shape), lam=0.0, time_dim=time_dim, moments=True)
        assert torch.equal(advantages, r)
        torch.testing.assert_close(moments, reference.moments_of(r), rtol=1e-6, atol=0)


def test_moments_show_what_is_not_finite():
    r, v = torch.randn(70, 20), torch.randn(70, 20)
    r[3, 4] = torch.nan
    for time_dim in (0, 1):
        count, mean, m2 = pf.gae(r, v, time_dim=time_dim, moments=True)[2]
        assert count == r.numel() and mean.isnan() and m2.isnan()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_moments_beside_other_options(backend):
    r, v, mask = torch.randn(6, 5, 4), torch.randn(6, 5, 4), torch.rand(6, 5, 4) < 0.5
    with pf.use_backend(backend):
        for time_dim in (0, 1, 2):
            out = torch.empty_like(r), torch.empty_like(r)
            results = pf.gae(r, v, mask=mask, time_dim=time_dim, out=out, moments=True)
            assert results[0] is out[0] and results[1] is out[1] and not results[2].requires_grad
            assert_moments(results[2], out[0], mask)
            assert_moments(pf.gae(r, v, mask=mask, time_dim=time_dim, moments=True)[2], out[0], mask)


def test_moments_can_be_differentiated():
    def white(v, moments):
        advantages, _, *known = pf.gae(r, v, mask=mask, differentiable=True, moments=moments)
        return pf.whiten(advantages, mask=mask, differentiable=True, moments=known[0] if known else None)

    r, v, mask = torch.randn(8, 3).double(), torch.randn(8, 3).double().requires_grad_(), torch.rand(8, 3) < 0.8
    upstream = torch.randn(8, 3).double()
    gradients = [torch.autograd.grad(white(v, moments), v, upstream)[0] for moments in (False, True)]
    assert bool(gradients[0].any())
    torch.testing.assert_close(*gradients)


def test_moments_compiled():
    @torch.compile(fullgraph=True)
    def f(r, v, mask):
        advantages, returns, moments = pf.gae(r * 2, v, mask=mask, moments=True)
        return pf.whiten(advantages, mask=mask, moments=moments), returns

    r, v, mask = torch.randn(20, 3), torch.randn(20, 3), torch.rand(20, 3) < 0.8
    advantages, returns, moments = pf.gae(r * 2, v, mask=mask, moments=True)
    assert same(f(r, v, mask), (pf.whiten(advantages, mask=mask, moments=moments), returns))


ERRORS = [
    ({"values": torch.zeros(8, 4)}, ValueError, r"gae: values must be \[T, N\] = \[4, 8\], got \[8, 4\]"),
    ({"values": torch.zeros(4, 8), "time_dim": 1, "terminated": torch.zeros(4, 7)}, ValueError,
     r"gae: terminated must be \[N, T\] = \[4, 8\], got \[4, 7\]"),
    ({"values": None}, TypeError, "gae: values must be a tensor, got None"),
    ({"values": [1.0]}, TypeError, "gae: values must be a tensor, got list"),
    ({"rewards": torch.zeros(4, 8).int()}, TypeError, "gae: rewards must be float32, .* got int32"),
    ({"rewards": torch.tensor(1.0)}, ValueError, r"gae: rewards must have a time dimension.* got \[\]"),
    ({"last_values": torch.zeros(8, 1)}, ValueError, r"gae: last_values must be \[N\] = \[8\], got \[8, 1\]"),
    ({"last_values": torch.zeros(4)}, ValueError, r"gae: last_values must be \[N\] = \[8\], got \[4\]"),
    ({"time_dim": 2}, ValueError, r"gae: time_dim must be in \[-2, 2\), got 2"),
    ({"truncated": torch.ones(4, 8)}, ValueError, "gae: final_values must be given with truncated"),
    ({"gamma": 1.5}, ValueError, r"gae: gamma must be in \[0, 1\], got 1.5"),
    ({"lam": float("nan")}, ValueError, r"gae: lam must be in \[0, 1\], got nan"),
    ({"lam": torch.full((8,), 2.0)}, ValueError, r"gae: lam must be in \[0, 1\], got 2 at 0"),
    ({"lam": torch.zeros(4)}, ValueError, r"gae: lam must be \[N\] = \[8\], got \[4\]"),
    ({"gamma": "x"}, TypeError, "gae: gamma must be a number, got str"),
    ({"mask_mode": "skip"}, ValueError, "gae: mask_mode must be 'carry' or 'zero', got 'skip'"),
    ({"truncated": torch.eye(8)[:4], "final_values": (torch.tensor([0, 9]), torch.zeros(2))}, ValueError,
     "gae: final_values must have an entry for every truncated step, got none for flat index 18"),
    ({"final_values": (torch.tensor([32]), torch.zeros(1))}, ValueError, r"final_values\[0\] must be in \[0, 32\)"),
    ({"final_values": (torch.tensor([1]), torch.zeros(2))}, ValueError, r"final_values\[1\] must be \[K\] = \[1\]"),
    ({"final_values": (torch.tensor([1.0]), torch.zeros(1))}, TypeError, r"final_values\[0\] must be an integer"),
    ({"final_values": (torch.tensor([1]),)}, ValueError, "got a tuple of 1"),
    ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, r"gae: rewards must be packed, \[M\], with cu_seqlens"),
]  # fmt: skip
PACKED_ERRORS = [
    ([1, 6], ValueError, "cu_seqlens must go from 0 to M = 6, got 1 to 6"),
    ([0, 5], ValueError, "cu_seqlens must go from 0 to M = 6, got 0 to 5"),
    ([0, 4, 2, 6], ValueError, "cu_seqlens must not decrease, got 4 before 2"),
    ([[0, 6]], ValueError, r"cu_seqlens must be \[S \+ 1\], got \[1, 2\]"),
    ([0.0, 6.0], TypeError, "cu_seqlens must be int32 or int64, got float32"),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_errors(backend):
    good = {"rewards": torch.zeros(4, 8), "values": torch.zeros(4, 8)}
    with pf.use_backend(backend):
        for wrong, kind, message in ERRORS:
            with pytest.raises(kind, match=message):
                pf.gae(**good | wrong)
        for bounds, kind, message in PACKED_ERRORS:
            with pytest.raises(kind, match=message):
                pf.gae(torch.zeros(6), torch.zeros(6), cu_seqlens=torch.tensor(bounds))


def test_compiled_with_changing_rates():
    @torch.compile(fullgraph=True)
    def f(r, v, last, done, gamma, lam):
        return pf.gae(r * 2, v, last, terminated=done, gamma=gamma, lam=lam)

    case = rollout(20, 3)
    r, v, last, done = case.values()
    for gamma, lam in ((0.9, 0.8), (0.95, 0.7), (0.99, 0.95), (1.0, 0.0)):
        assert same(f(r, v, last, done, gamma, lam), pf.gae(r * 2, v, last, terminated=done, gamma=gamma, lam=lam))


def test_registered_op():
    case = rollout(6, 3)
    rest = (None, None, None, None, "carry", None, 0.9, None, 0.0, torch.rand(3), 0)
    torch.library.opcheck(_op, (*case.values(), *rest))
    torch.library.opcheck(_op, (*case.values(), *rest, True))


def test_vmap_goes_to_the_reference():
    r, v = torch.randn(4, 6, 2), torch.randn(4, 6, 2)
    ours = torch.vmap(lambda a, b: pf.gae(a, b)[0])(r, v)
    assert torch.allclose(ours, pf.gae(r, v, time_dim=1)[0], atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(9,), (5, 7), (4, 3, 2)])
def test_out_is_written_and_returned(shape, backend):
    rewards, values = torch.randn(shape), torch.randn(shape)
    out = torch.empty(shape), torch.empty(shape)
    version = out[0]._version
    with pf.use_backend(backend):
        result = pf.gae(rewards, values, out=out)
        wanted = pf.gae(rewards, values)
    assert all(a is b for a, b in zip(result, out, strict=True)) and out[0]._version > version
    assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda r: torch.empty(5, 7), TypeError, "out must be a tuple of two tensors"),
        (
            lambda r: (torch.empty(5, 7), torch.empty(7, 5)),
            ValueError,
            r"out\[1\] must be the shape of rewards = \[5, 7\]",
        ),
        (
            lambda r: (torch.empty(5, 7).double(), torch.empty(5, 7)),
            TypeError,
            r"out\[0\] must be float32, got float64",
        ),
        (lambda r: (torch.empty(7, 5).t(), torch.empty(5, 7)), ValueError, r"out\[0\] must be contiguous"),
        (lambda r: (r, torch.empty(5, 7)), ValueError, r"out\[0\] must have memory of its own"),
        (lambda r: (torch.empty(5, 7),) * 2, ValueError, r"out\[1\] must have memory of its own"),
    ],
)
def test_out_of_the_wrong_kind(make, error, message):
    rewards = torch.randn(5, 7)
    with pytest.raises(error, match=message):
        pf.gae(rewards, torch.randn(5, 7), out=make(rewards))
