"""vtrace: against float64, sums written from the definition, and laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import ISAS, assert_as_good, pf
from hypothesis import given
from hypothesis import strategies as st
from scan_cases import carried_cases, double, rate, steps_of_column, transposed

from ppo_fast import reference
from ppo_fast.ops.vtrace import _op


def call(function, case):
    return function(**{k: v for k, v in case.items() if k != "mask_mode"})


@st.composite
def vtrace_cases(draw):
    case = draw(carried_cases())
    clips = st.sampled_from((0.5, 1.0, 2.0, math.inf))
    return case | {"rho_clip": draw(clips), "c_clip": draw(clips)}


def by_definition(case):
    """vs_t = V_t + Σ_k γ^k (Π_{i<k} c_i) δ_k up to the end of the episode."""
    shape = case["rewards"].shape
    targets, advantages = np.zeros(shape), np.zeros(shape)
    for n in range(shape[1]):
        gamma, lam = rate(case["gamma"], n), rate(case["lam"], n)
        steps = steps_of_column(case, n)
        for s in steps:
            ratio = math.exp(s["log_rhos"])
            s["rho"], s["c"] = min(case["rho_clip"], ratio), lam * min(case["c_clip"], ratio)
        vs = []
        for i, first in enumerate(steps):
            total, weight = first["values"], 1.0
            for s in steps[i:]:
                total += weight * s["rho"] * (s["rewards"] + gamma * s["next"] - s["values"])
                weight *= gamma * s["c"]
                if not s["goes_on"]:
                    break
            vs.append(total)
        for i, s in enumerate(steps):
            after = vs[i + 1] if s["goes_on"] else s["next"]
            targets[s["t"], n] = vs[i]
            advantages[s["t"], n] = s["rho"] * (s["rewards"] + gamma * after - s["values"])
    return torch.from_numpy(targets), torch.from_numpy(advantages)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@given(vtrace_cases())
def test_values(case):
    truth, eager = call(reference.vtrace, double(case)), call(reference.vtrace, case)
    for case_ in (case, transposed(case)):
        ours = call(pf.vtrace, case_)
        ours = tuple(x.t() for x in ours) if "time_dim" in case_ else ours
        for what, a, e, t in zip(("targets", "advantages"), ours, eager, truth, strict=True):
            assert_as_good(a, e, t, what, ulps=16)


@given(vtrace_cases())
def test_definition(case):
    for what, a, t in zip(("targets", "advantages"), call(pf.vtrace, double(case)), by_definition(case), strict=True):
        assert_as_good(a, None, t, what, ulps=256)


def rollout(steps, columns):
    names = ("log_rhos", "rewards", "values")
    return {name: torch.randn(steps, columns) for name in names} | {"terminated": torch.rand(steps, columns) < 0.05}


@pytest.mark.parametrize("shape", [(1, 1), (130, 1), (1100, 2), (66, 8), (67, 33)])
def test_same_bits_everywhere(shape):
    case = rollout(*shape)
    expected = pf.vtrace(**case)
    for isa in ISAS:
        pf._C.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert same(pf.vtrace(**case), expected), isa
            by_row = pf.vtrace(**{k: v.t() for k, v in case.items()}, time_dim=1)
            assert same([x.t() for x in by_row], expected), isa
            alone = pf.vtrace(**{k: v[:, -1] for k, v in case.items()})
            assert same(alone, [x[:, -1] for x in expected]), isa


def test_on_policy_is_gae():
    """ρ = 1 and no clip at work: vs are the λ-returns."""
    case = rollout(50, 4)
    case["log_rhos"].zero_()
    returns = pf.gae(case["rewards"], case["values"], terminated=case["terminated"], lam=0.9)[1]
    assert torch.allclose(pf.vtrace(**case, lam=0.9)[0], returns, atol=1e-5)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nothing_leaks_across_an_end(poison):
    case = rollout(70, 3)
    case["terminated"].zero_()[33] = True
    clean = pf.vtrace(**case)
    for name in ("log_rhos", "rewards", "values"):
        case[name][34:] = poison
    assert same([x[:34] for x in clean], [x[:34] for x in pf.vtrace(**case)])


def test_large_ratios_meet_a_zero_step_by_step():
    zero = torch.zeros(9, 2)
    targets, _ = pf.vtrace(torch.full((9, 2), 60.0), zero, zero, c_clip=math.inf)
    assert torch.equal(targets, zero)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), (1,), (2, 3, 4)])
def test_shapes(shape):
    x = torch.randn(shape)
    for y, z in zip(pf.vtrace(x, x, x, time_dim=-1), reference.vtrace(x, x, x, time_dim=-1), strict=True):
        assert y.shape == x.shape and torch.allclose(y, z, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"log_rhos": torch.zeros(3, 2)}, ValueError, r"vtrace: log_rhos must be \[T, N\] = \[4, 2\], got \[3, 2\]"),
        ({"log_rhos": None}, TypeError, "vtrace: log_rhos must be a tensor, got None"),
        ({"rho_clip": 0.0}, ValueError, "vtrace: rho_clip must be > 0, got 0"),
        ({"c_clip": float("nan")}, ValueError, "vtrace: c_clip must be > 0, got nan"),
        ({"lam": -0.1}, ValueError, r"vtrace: lam must be in \[0, 1\], got -0.1"),
        ({"truncated": torch.ones(4, 2)}, ValueError, "vtrace: final_values must be given with truncated"),
    ],
)
def test_errors(backend, wrong, kind, message):
    zero = torch.zeros(4, 2)
    with pf.use_backend(backend), pytest.raises(kind, match=message):
        pf.vtrace(**{"log_rhos": zero, "rewards": zero, "values": zero} | wrong)


def test_compiled_and_differentiable():
    case = rollout(12, 3)
    compiled = torch.compile(lambda case: pf.vtrace(**case, gamma=0.9), fullgraph=True)
    assert same(compiled(case), pf.vtrace(**case, gamma=0.9))
    rest = (None, None, None, None, 0.9, None, 1.0, None, 1.0, 1.0, 0)
    torch.library.opcheck(_op, (case["log_rhos"], case["rewards"], case["values"], None, case["terminated"], *rest))
    case["values"].requires_grad_()
    assert not pf.vtrace(**case)[0].requires_grad
    pf.vtrace(**case, differentiable=True)[0].sum().backward()
    assert case["values"].grad is not None
