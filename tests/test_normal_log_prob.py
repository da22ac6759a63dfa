"""normal_log_prob against its specification: shared, full and broadcast log_std, with and without squash."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import assert_as_good, pf
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
    width = draw(st.sampled_from([1, 2, 3, 6, 17, 64, 65, 130]))
    lead = draw(st.sampled_from([(), (1,), (5,), (16,), (33,), (300,), (2, 3), (4, 1, 5), (0,)]))
    torch.manual_seed(draw(st.integers(0, 999)))
    dtype = draw(st.sampled_from(FLOATS))
    mean = strided((*lead, width), draw(st.sampled_from(LAYOUTS)), dtype, scale=1.0)
    actions = strided(
        (*lead, width), draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from([dtype, torch.float32])), 1.0
    )
    kind = draw(st.sampled_from(["shared", "shared rows", "full", "one", "column"]))
    shape = {"shared": (width,), "shared rows": (1,) * len(lead) + (width,), "full": (*lead, width), "one": (1,),
             "column": (*lead, 1)}[kind]  # fmt: skip
    layout = draw(st.sampled_from(LAYOUTS)) if kind == "full" else "plain"
    log_std = strided(shape, layout, draw(st.sampled_from([dtype, torch.float32])), 0.5)
    return mean, log_std, actions, draw(st.booleans())


@given(cases())
def test_parity(case):
    mean, log_std, actions, squash = case
    double = torch.float64 in (mean.dtype, log_std.dtype, actions.dtype)
    assert_parity(
        lambda m, s: pf.normal_log_prob(m, s, actions, squash=squash),
        lambda m, s: reference.normal_log_prob(m, s, actions, squash=squash),
        [mean, log_std],
        double=lambda m, s: reference.normal_log_prob(m, s, actions.double(), squash=squash),
        ulps=32.0 if double else 8.0,  # float64's truth rounds too
    )


@pytest.mark.parametrize("kind", ["shared", "full"])
@pytest.mark.parametrize("squash", [False, True])
def test_same_bits_everywhere(kind, squash):
    for dtype in FLOATS:
        mean, actions = torch.randn(9000, 6).to(dtype), torch.randn(9000, 6).to(dtype)
        log_std = torch.randn(6 if kind == "shared" else (9000, 6)).to(dtype)
        assert_same_bits(lambda m, s: pf.normal_log_prob(m, s, actions, squash=squash), [mean, log_std])  # noqa: B023


@pytest.mark.parametrize("width", [1, 6, 80])
def test_rows_stand_alone(width):
    mean, actions, log_std = torch.randn(53, width), torch.randn(53, width), torch.randn(width)
    assert_rows_stand_alone(pf.normal_log_prob, [mean, log_std, actions], (True, False, True))
    full = log_std.expand(53, width).contiguous()
    for a, b in zip(pf.normal_log_prob(mean, full, actions), pf.normal_log_prob(mean, log_std, actions), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("shape", [(3,), (4, 3), (4, 1), (1,)])
def test_double_backward(squash, shape):
    mean = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    log_std = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    actions = torch.randn(4, 3, dtype=torch.float64)
    assert_double_backward(lambda m, s: pf.normal_log_prob(m, s, actions, squash=squash), [mean, log_std])
    for k in (0, 1):
        assert_double_backward(lambda m, s, k=k: pf.normal_log_prob(m, s, actions, squash=squash)[k], [mean, log_std])


def test_one_gradient_only():
    mean, log_std, actions = torch.randn(20, 3, requires_grad=True), torch.randn(3), torch.randn(20, 3)
    pf.normal_log_prob(mean, log_std, actions)[0].sum().backward()
    assert mean.grad.isfinite().all() and log_std.grad is None
    log_std.requires_grad_()
    pf.normal_log_prob(mean.detach(), log_std, actions)[1].sum().backward()
    assert torch.equal(log_std.grad, torch.full((3,), 20.0))
    log_prob, entropy = pf.normal_log_prob(mean, log_std, actions, entropy=False)
    assert entropy is None and log_prob.requires_grad


def test_against_torch_distributions():
    mean, log_std, actions = torch.randn(50, 4), torch.randn(4), torch.randn(50, 4)
    log_prob, entropy = pf.normal_log_prob(mean, log_std, actions)
    normal = torch.distributions.Normal(mean, log_std.exp())
    torch.testing.assert_close(log_prob, normal.log_prob(actions).sum(-1))
    torch.testing.assert_close(entropy, normal.entropy().sum(-1))
    squashed = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean.double(), log_std.double().exp()), [torch.distributions.TanhTransform()]
    )
    torch.testing.assert_close(
        pf.normal_log_prob(mean, log_std, actions, squash=True)[0],
        squashed.log_prob(actions.double().tanh()).sum(-1).float(), rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_squash_far_out():
    """Where tanh is 1 in float32, its log-slope is still a number."""
    actions = torch.tensor([[20.0], [-20.0], [90.0], [-1000.0]])
    log_prob, _ = pf.normal_log_prob(actions, torch.zeros(1), actions, squash=True)
    expected = -0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - actions.abs().squeeze(-1).double())
    assert_as_good(log_prob, None, expected, "squash", ulps=4)


def test_law_of_the_mean_gradient():
    """Shifting mean and actions together changes nothing; scaling both by e^c and log_std by c shifts log_prob by -c·D."""
    mean, log_std, actions = torch.randn(40, 5), torch.randn(5), torch.randn(40, 5)
    plain = gradients(lambda m, s: pf.normal_log_prob(m, s, actions), [mean, log_std])
    moved = gradients(lambda m, s: pf.normal_log_prob(m + 1.0, s, actions + 1.0), [mean, log_std])
    for a, b in zip(plain, moved, strict=True):
        assert_as_good(a, None, b.double(), "shift", ulps=64)
    scaled = pf.normal_log_prob(mean * math.e, log_std + 1.0, actions * math.e)
    assert_as_good(scaled[0], None, plain[0].double() - 5, "scale", ulps=16)
    assert_as_good(scaled[1], None, plain[1].double() + 5, "scale", ulps=16)


def test_rows_without_incoming_gradient_reach_nothing():
    mean, log_std, actions = torch.randn(20, 3), torch.zeros(3, requires_grad=True), torch.randn(20, 3)
    mean[7] = math.nan
    mean.requires_grad_()
    log_prob, entropy = pf.normal_log_prob(mean, log_std, actions)
    keep = torch.ones(20, dtype=torch.bool)
    keep[7] = False
    (torch.where(keep, log_prob, 0.0).sum() + torch.where(keep, entropy, 0.0).sum()).backward()
    assert mean.grad.isfinite().all() and not mean.grad[7].any() and log_std.grad.isfinite().all()
    assert log_prob[7].isnan()


def test_errors():
    mean, log_std, actions = torch.randn(4, 3), torch.zeros(3), torch.randn(4, 3)
    op = pf.normal_log_prob
    assert_refuses(ValueError, ["actions", "[4, 3]", "[3, 4]"], op, mean, log_std, actions.T)
    assert_refuses(ValueError, ["log_std", "broadcast", "[4, 3]", "[4]"], op, mean, torch.zeros(4), actions)
    assert_refuses(TypeError, ["log_std"], op, mean, log_std.long(), actions)
    assert_refuses(TypeError, ["actions"], op, mean, log_std, None)
    assert_refuses(ValueError, ["actions gets no gradient"], op, mean, log_std, actions.requires_grad_())
    with pf.use_backend("reference"):
        assert_refuses(ValueError, ["actions"], op, mean, log_std, actions.detach().T)


def test_empty():
    mean, log_std = torch.empty(0, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    log_prob, entropy = pf.normal_log_prob(mean, log_std, torch.empty(0, 3))
    (log_prob.sum() + entropy.sum()).backward()
    assert log_prob.shape == (0,) and mean.grad.shape == (0, 3) and torch.equal(log_std.grad, torch.zeros(3))


@pytest.mark.parametrize("shape", [(3,), (5, 3), (5, 1)])
def test_registered_op(shape):
    mean, log_std, actions = torch.randn(5, 3), torch.randn(shape), torch.randn(5, 3)
    ops = torch.ops.ppo_fast
    for squash in (False, True):
        args = (mean.requires_grad_(), log_std.requires_grad_(), actions, squash, True)
        torch.library.opcheck(ops.normal_log_prob.default, args)
    rest = (mean.detach(), log_std.detach(), actions, False, True, torch.empty(0), torch.randn(5), torch.randn(5))
    torch.library.opcheck(ops.normal_log_prob_backward.default, rest)


@pytest.mark.parametrize("squash", [False, True])
def test_compiles(squash):
    actions = torch.randn(9, 3)
    assert_compiles(lambda m, s: pf.normal_log_prob(m, s, actions, squash=squash), [torch.randn(9, 3), torch.randn(3)])


def test_functorch_goes_through_the_reference():
    mean, actions = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    mapped = torch.func.vmap(lambda m, a: pf.normal_log_prob(m, torch.zeros(6), a))(mean, actions)
    for a, b in zip(mapped, pf.normal_log_prob(mean, torch.zeros(6), actions), strict=True):
        torch.testing.assert_close(a, b)
