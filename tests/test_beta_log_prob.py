"""beta_log_prob against its specification."""

from __future__ import annotations

import math

import mpmath
import torch
from conftest import pf
from hypothesis import given
from hypothesis import strategies as st
from log_prob_laws import (
    LAYOUTS,
    assert_compiles,
    assert_double_backward,
    assert_parity,
    assert_refuses,
    assert_rows_stand_alone,
    assert_same_bits,
    gradients,
    strided,
)

from ppo_fast import reference

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@st.composite
def cases(draw):
    width = draw(st.sampled_from([1, 2, 3, 8, 65]))
    lead = draw(st.sampled_from([(), (1,), (5,), (33,), (2, 3), (0,)]))
    torch.manual_seed(draw(st.integers(0, 999)))
    dtype = draw(st.sampled_from(FLOATS))
    alpha, beta = (
        strided((*lead, width), draw(st.sampled_from(LAYOUTS)), torch.float32, 1.0).exp().to(dtype) for _ in range(2)
    )
    low, high = draw(st.sampled_from([(0.0, 1.0), (-2.0, 2.0), (-1.0, 0.5)]))
    actions = (low + (high - low) * (0.01 + 0.98 * torch.rand(*lead, width))).to(
        draw(st.sampled_from([torch.float32, dtype]))
    )
    return alpha, beta, actions.clamp(low, high), low, high


@given(cases())
def test_parity(case):
    alpha, beta, actions, low, high = case
    double = torch.float64 in (alpha.dtype, actions.dtype)
    assert_parity(
        lambda a, b: pf.beta_log_prob(a, b, actions, low=low, high=high),
        lambda a, b: reference.beta_log_prob(a, b, actions, low=low, high=high),
        [alpha, beta],
        double=lambda a, b: reference.beta_log_prob(a, b, actions.double(), low=low, high=high),
        ulps=2e7 if double else 8.0,  # torch's trigamma is good to 1e-9 in float64; test_polygamma is stricter
    )


def test_polygamma():
    """The gradients are digamma and trigamma: against mpmath, from tiny to huge."""
    points = [1e-3, 0.1, 0.5, 0.999, 1.0, 1.4616, 2.0, 3.7, 9.99, 10.0, 25.0, 1e3, 1e6]
    alpha = torch.tensor(points, dtype=torch.float64)[:, None].requires_grad_()
    beta = torch.full_like(alpha, 1.5)
    x = torch.full_like(alpha, 0.5)
    log_prob, entropy = pf.beta_log_prob(alpha, beta, x)
    (by_log_prob,) = torch.autograd.grad(log_prob.sum(), alpha, retain_graph=True)
    (by_entropy,) = torch.autograd.grad(entropy.sum(), alpha)
    with mpmath.workdps(40):
        for i, a in enumerate(points):
            a, total = mpmath.mpf(a), mpmath.mpf(a) + 1.5
            terms = [mpmath.log(0.5), mpmath.psi(0, a), mpmath.psi(0, total)]
            error = abs(by_log_prob[i].item() - (terms[0] - terms[1] + terms[2]))
            assert error < 2e-14 * max(map(abs, terms)), points[i]
            terms = [(total - 2) * mpmath.psi(1, total), (a - 1) * mpmath.psi(1, a)]
            error = abs(by_entropy[i].item() - (terms[0] - terms[1]))
            assert error < 2e-14 * max(map(abs, terms)), points[i]


def test_same_bits_everywhere():
    for dtype in FLOATS:
        alpha, beta, actions = (torch.rand(300, 5).clamp(0.05, 0.95).to(dtype) for _ in range(3))
        assert_same_bits(lambda a, b: pf.beta_log_prob(a * 4, b * 4, actions), [alpha, beta])  # noqa: B023


def test_rows_stand_alone():
    alpha, beta, actions = torch.rand(53, 7) + 0.5, torch.rand(53, 7) + 0.5, torch.rand(53, 7)
    assert_rows_stand_alone(pf.beta_log_prob, [alpha, beta, actions], (True, True, True))


def test_double_backward():
    alpha, beta = (torch.rand(3, 2, dtype=torch.float64).add(0.5).requires_grad_() for _ in range(2))
    actions = torch.rand(3, 2, dtype=torch.float64)
    assert_double_backward(lambda a, b: pf.beta_log_prob(a, b, actions), [alpha, beta])


def test_against_torch_distributions():
    alpha, beta, actions = torch.rand(50, 3) * 5 + 0.1, torch.rand(50, 3) * 5 + 0.1, torch.rand(50, 3)
    log_prob, entropy = pf.beta_log_prob(alpha, beta, actions)
    distribution = torch.distributions.Beta(alpha.double(), beta.double())
    torch.testing.assert_close(log_prob, distribution.log_prob(actions.double()).sum(-1).float())
    torch.testing.assert_close(entropy, distribution.entropy().sum(-1).float())
    wide = pf.beta_log_prob(alpha, beta, actions * 4 - 2, low=-2.0, high=2.0)
    torch.testing.assert_close(wide[0], log_prob - 3 * math.log(4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wide[1], entropy + 3 * math.log(4))


def test_large_parameters_do_not_cancel():
    alpha, beta, actions = torch.full((1, 1), 3e6), torch.full((1, 1), 2e6), torch.full((1, 1), 0.6)
    got = gradients(lambda a, b: pf.beta_log_prob(a, b, actions), [alpha, beta])
    want = gradients(lambda a, b: reference.beta_log_prob(a, b, actions.double()), [alpha.double(), beta.double()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=0)


def test_edges_of_the_interval():
    x = torch.tensor([[0.0], [1.0], [0.0], [1.0], [0.5], [1.5], [0.0], [1.0]])
    alpha = torch.tensor([[1.0], [2.0], [2.0], [0.5], [1.0], [2.0], [0.5], [1.0]])
    beta = torch.tensor([[2.0], [1.0], [2.0], [0.5], [1.0], [2.0], [1.0], [1.0]])
    got = gradients(lambda a, b: pf.beta_log_prob(a, b, x), [alpha, beta])
    want = gradients(lambda a, b: reference.beta_log_prob(a, b, x), [alpha, beta])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert got[0][5].isnan()


def test_errors():
    a = torch.rand(4, 3) + 0.5
    assert_refuses(ValueError, ["beta", "[4, 3]", "[4]"], pf.beta_log_prob, a, a[:, 0], a)
    assert_refuses(ValueError, ["actions", "[4, 3]"], pf.beta_log_prob, a, a, a[:2])
    assert_refuses(TypeError, ["alpha"], pf.beta_log_prob, a.long(), a, a)
    assert_refuses(ValueError, ["low must be less than high"], pf.beta_log_prob, a, a, a, low=1.0, high=0.0)
    assert_refuses(ValueError, ["actions gets no gradient"], pf.beta_log_prob, a, a, a.clone().requires_grad_())


def test_one_gradient_only():
    alpha, beta, x = (torch.rand(4, 3) + 0.1).requires_grad_(), torch.rand(4, 3) + 0.1, torch.rand(4, 3)
    pf.beta_log_prob(alpha, beta, x, entropy=False)[0].sum().backward()
    assert alpha.grad.isfinite().all()


def test_registered_op_and_compile():
    alpha, beta, x = (
        (torch.rand(5, 3) + 0.5).requires_grad_(),
        (torch.rand(5, 3) + 0.5).requires_grad_(),
        torch.rand(5, 3),
    )
    ops = torch.ops.ppo_fast
    for entropy in (True, False):
        torch.library.opcheck(ops.beta_log_prob.default, (alpha, beta, x, 0.0, 1.0, entropy))
    rest = (alpha.detach(), beta.detach(), x, 0.0, 1.0, True, torch.empty(0), torch.randn(5), torch.randn(5))
    torch.library.opcheck(ops.beta_log_prob_backward.default, rest)
    assert_compiles(lambda a, b: pf.beta_log_prob(a, b, x), [torch.rand(5, 3) + 0.5, torch.rand(5, 3) + 0.5])


def test_empty():
    a = torch.empty(0, 3, requires_grad=True)
    log_prob, entropy = pf.beta_log_prob(a, a, torch.empty(0, 3))
    (log_prob.sum() + entropy.sum()).backward()
    assert log_prob.shape == (0,) and a.grad.shape == (0, 3)
