"""discounted_returns: against float64, a sum written from the definition, and laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ISAS, assert_as_good, pf
from hypothesis import given
from scan_cases import carried_cases, double, rate, steps_of_column, transposed

from ppo_fast import reference
from ppo_fast.ops.discounted_returns import _op


def call(function, case):
    return function(**{k: v for k, v in case.items() if k not in ("log_rhos", "values", "mask_mode", "lam")})


def by_definition(case):
    """R_t = Σ_k γ^k r_{t+k} up to the end of the episode, and γ^K times the value found there."""
    returns = np.zeros(case["rewards"].shape)
    for n in range(returns.shape[1]):
        gamma = rate(case["gamma"], n)
        steps = steps_of_column(case, n)
        for i, first in enumerate(steps):
            total, weight = 0.0, 1.0
            for s in steps[i:]:
                total += weight * s["rewards"]
                weight *= gamma
                if not s["goes_on"]:
                    total += weight * s["next"]
                    break
            returns[first["t"], n] = total
    return torch.from_numpy(returns)


@given(carried_cases())
def test_values(case):
    truth, eager = call(reference.discounted_returns, double(case)), call(reference.discounted_returns, case)
    assert_as_good(call(pf.discounted_returns, case), eager, truth, "time-major")
    assert_as_good(call(pf.discounted_returns, transposed(case)).t(), eager, truth, "batch-major")


@given(carried_cases())
def test_definition(case):
    assert_as_good(call(pf.discounted_returns, double(case)), None, by_definition(case), ulps=64)


@pytest.mark.parametrize("shape", [(1, 1), (1100, 1), (66, 8), (67, 33)])
def test_same_bits_everywhere(shape):
    r, done, last = torch.randn(shape), torch.rand(shape) < 0.05, torch.randn(shape[1])
    expected = pf.discounted_returns(r, last, terminated=done)
    for isa in ISAS:
        pf._C.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(pf.discounted_returns(r, last, terminated=done), expected)
            by_row = pf.discounted_returns(r.t(), last, terminated=done.t(), time_dim=1)
            assert torch.equal(by_row.t(), expected), isa
            alone = pf.discounted_returns(r[:, -1], last[-1], terminated=done[:, -1])
            assert torch.equal(alone, expected[:, -1]), isa


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nothing_leaks_across_an_end(poison):
    r, done = torch.randn(70, 3), torch.zeros(70, 3)
    done[33] = 1
    clean = pf.discounted_returns(r, terminated=done)
    r[34:] = poison
    assert torch.equal(pf.discounted_returns(r, terminated=done)[:34], clean[:34])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), (1,), (2, 3, 4)])
def test_shapes(shape):
    x = torch.randn(shape)
    y = pf.discounted_returns(x, time_dim=-1)
    assert y.shape == x.shape and torch.allclose(y, reference.discounted_returns(x, time_dim=-1), atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"rewards": None}, TypeError, "discounted_returns: "),
        ({"mask": torch.zeros(4)}, ValueError, r"discounted_returns: mask must be \[T, N\] = \[4, 2\], got \[4\]"),
        ({"gamma": 2.0}, ValueError, r"discounted_returns: gamma must be in \[0, 1\], got 2"),
        ({"truncated": torch.ones(4, 2)}, ValueError, "discounted_returns: final_values must be given with truncated"),
    ],
)
def test_errors(backend, wrong, kind, message):
    with pf.use_backend(backend), pytest.raises(kind, match=message):
        pf.discounted_returns(**{"rewards": torch.zeros(4, 2)} | wrong)


def test_compiled_and_differentiable():
    r = torch.randn(12, 3)
    compiled = torch.compile(lambda r: pf.discounted_returns(r, gamma=0.9), fullgraph=True)
    assert torch.equal(compiled(r), pf.discounted_returns(r, gamma=0.9))
    torch.library.opcheck(_op, (r, None, None, None, None, None, None, 0.9, None, 0))
    r.requires_grad_()
    assert not pf.discounted_returns(r).requires_grad
    pf.discounted_returns(r, differentiable=True).sum().backward()
    assert r.grad is not None
