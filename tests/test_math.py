"""exp, log, log1p, softplus and sigmoid of csrc/math, seen through ops that are little else, against mpmath in ulp."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import pytest
import torch
from conftest import pf

# fmt: off
POINTS = [0.0, 1e-30, 1e-12, 1e-8, 1e-5, 1e-3, 0.01, 0.1, 0.3466, 0.5, 0.6931, 1.0, 1.7, 3.0, 5.5, 9.9, 16.0, 20.0,
          35.0, 80.0]
# fmt: on


def spread(dtype):
    """Points of every size, and the same with noise, so that all mantissas come up."""
    x = torch.tensor(POINTS, dtype=torch.float64)
    x = torch.cat([x, -x, *(x * (0.5 + torch.rand(len(x), dtype=torch.float64)) for _ in range(4))])
    return torch.cat([x, -x]).to(dtype)


def ulps(actual, truth):
    """Largest error in units of the last place of the truth, or of the least normal number. What is below exp's floor may
    be 0: results are normal numbers or 0."""
    info, worst = torch.finfo(actual.dtype), 0.0
    floor = mpmath.exp(-86.5 if actual.dtype == torch.float32 else -707.5)
    for a, t in zip(actual.tolist(), truth, strict=True):
        if a == 0 and abs(t) <= floor:
            continue
        size = max(abs(t), mpmath.mpf(info.tiny))
        ulp = mpmath.mpf(2) ** mpmath.floor(mpmath.log(size, 2)) * info.eps
        worst = max(worst, float(abs(mpmath.mpf(a) - t) / ulp))
    return worst


@pytest.fixture(autouse=True)
def digits():
    with mpmath.workdps(50):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus(isa, dtype):
    """The log-prob of one bit is -softplus(∓z): exp and log1p."""
    z = spread(dtype)[:, None]
    for action, sign in ((0, 1), (1, -1)):
        log_prob, _ = pf.bernoulli_log_prob(z, torch.full_like(z, action), entropy=False)
        truth = [-mpmath.log1p(mpmath.exp(sign * mpmath.mpf(x))) for x in z[:, 0].tolist()]
        assert ulps(log_prob, truth) <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigmoid(isa, dtype):
    """The gradient of one bit's log-prob is σ(-z)."""
    z = spread(dtype)[:, None].requires_grad_()
    log_prob, _ = pf.bernoulli_log_prob(z, torch.ones_like(z), entropy=False)
    (grad,) = torch.autograd.grad(log_prob.sum(), z)
    truth = [1 / (1 + mpmath.exp(mpmath.mpf(x))) for x in z[:, 0].tolist()]
    assert ulps(grad[:, 0], truth) <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp(isa, dtype):
    """The gradient of a normal's log-prob with respect to its mean, at z = exp(-log_std), is exp(-2·log_std)."""
    log_std = (spread(dtype) / 4)[:, None]
    mean = torch.zeros_like(log_std).requires_grad_()
    log_prob, _ = pf.normal_log_prob(mean, log_std, torch.ones_like(log_std), entropy=False)
    (grad,) = torch.autograd.grad(log_prob.sum(), mean)
    truth = [mpmath.exp(-2 * mpmath.mpf(x)) for x in log_std[:, 0].tolist()]
    assert ulps(grad[:, 0], truth) <= 4  # two exponentials and their product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_beyond_its_linear_part(isa, dtype):
    """The statistic approx_kl of one token is exp(d) - 1 - d, which for small d cancels but for the last few digits."""
    for d in [s * x for x in (1e-6, 1e-4, 0.01, 0.1, 0.34, 0.35, 0.5, 2.0, 20.0) for s in (1, -1)]:
        x = torch.tensor([d], dtype=dtype)
        kl = pf.ppo_loss(x, torch.zeros_like(x), torch.ones_like(x)).stats.approx_kl
        exact = mpmath.mpf(x.item())
        assert ulps(kl[None], [mpmath.expm1(exact) - exact]) <= 16, d


def test_fused_multiply_add_rounds_once(isa):
    """A return of two steps is r₀ + γ·r₁. Sums as near a tie between two floats as products of floats come."""
    gamma = 1 - torch.arange(1, 4097, dtype=torch.float64).repeat(2) * 2.0**-24
    last = (2.0**-24 / gamma).float()
    first = torch.tensor([1.0, 1 + 2.0**-23]).repeat_interleave(4096)
    (got, _) = pf.discounted_returns(torch.stack([first, last]), gamma=gamma.float())
    exact = [
        Fraction(a) + Fraction(g) * Fraction(b)
        for a, g, b in zip(first.tolist(), gamma.tolist(), last.tolist(), strict=True)
    ]
    assert got.tolist() == [round(x * 2**23) / 2**23 for x in exact]  # ties to even


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [3, 64, 65, 1024, 5000])
def test_log_of_a_sum(isa, dtype, width):
    """Equal logits: log_prob = -log A and entropy = log A."""
    log_prob, entropy = pf.categorical_log_prob(torch.full((2, width), 0.3, dtype=dtype), torch.tensor([0, width - 1]))
    truth = [mpmath.log(width)] * 2
    assert ulps(-log_prob, truth) <= 2 and ulps(entropy, truth) <= 2


@pytest.mark.parametrize("width", [6, 100])
def test_softmax_floor(isa, width):
    """A logit so far below the largest that its exp underflows counts as -inf does, without subnormal numbers."""
    z = torch.zeros(4, width)
    z[:, 1:] = torch.tensor([-50.0, -86.9, -87.5, -200.0])[:, None]
    z.requires_grad_()
    log_prob, entropy = pf.categorical_log_prob(z, torch.ones(4, dtype=torch.long))
    torch.testing.assert_close(log_prob, z.detach()[:, 1] - math.log1p(0.0))
    (grad,) = torch.autograd.grad(entropy.sum() + log_prob.sum(), z)
    assert grad.isfinite().all() and not grad[2:, 2:].any() and entropy.isfinite().all()
    assert grad[0, 2] != 0
