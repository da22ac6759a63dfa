"""More than 2³¹ elements: every offset is 64 bits wide. One after another (a group), each where memory allows."""

from __future__ import annotations

import pytest
import torch

import ppo_fast as pf

from .conftest import BACKENDS, DEVICE, needs_cuda, needs_memory, poison

pytestmark = [needs_cuda, pytest.mark.xdist_group("large")]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
BEYOND = 2**31


@pytest.fixture(autouse=True)
def memory_is_given_back():
    poison(False)  # filling gigabytes with NaN before each use is not what is tested
    yield
    torch.cuda.empty_cache()


@each_backend
def test_a_vocabulary(backend):
    rows, width = 14_300, 151_936
    assert rows * width > BEYOND
    needs_memory(3 * 2 * rows * width)
    logits = torch.empty(rows, width, dtype=torch.bfloat16, device=DEVICE)
    for part in logits.split(1000):
        part.normal_(0.0, 2.0)
    labels = torch.randint(width, (rows,), device=DEVICE)
    given = [torch.randn(rows, device=DEVICE) for _ in range(2)]

    def run(part):
        leaf = logits[part].detach().requires_grad_()
        out = pf.categorical_log_prob(leaf, labels[part])
        return [*out, *torch.autograd.grad(out, [leaf], [g[part] for g in given])]

    with pf.use_backend(backend):
        log_prob, entropy, grad = run(slice(None))
        for part in (slice(0, 3), slice(rows // 2, rows // 2 + 2), slice(rows - 3, rows)):
            for got, want in zip(run(part), (log_prob, entropy, grad), strict=True):
                assert torch.equal(got, want[part])
    assert bool(log_prob.isfinite().all()) and bool(entropy.isfinite().all())
    del grad
    # in place: the gradient lies where the logits lay
    last = logits[-3:].clone()
    with pf.use_backend(backend):
        anchor = torch.ones((), device=DEVICE, requires_grad=True)
        owned = _Owned.apply(anchor, logits)
        out = pf.categorical_log_prob(owned, labels, inplace_backward=True)
        torch.autograd.backward(out, given)
        leaf = last.requires_grad_()
        small = pf.categorical_log_prob(leaf, labels[-3:])
        (wanted,) = torch.autograd.grad(small, [leaf], [g[-3:] for g in given])
    assert torch.equal(logits[-3:], wanted)


class _Owned(torch.autograd.Function):
    """Logits that are the result of an operation, without a second copy of them."""

    @staticmethod
    def forward(ctx, anchor, logits):
        return logits.detach()

    @staticmethod
    def backward(ctx, g):
        return None, None


@each_backend
@pytest.mark.parametrize("time_dim", [0, 1])
def test_gae(backend, time_dim):
    """Outputs beyond 2³¹ elements; inputs are half precision, and the rewards one column or row over and over."""
    long, wide = 64, 33_600_000
    assert long * wide > BEYOND
    needs_memory((4 + 4 + 2) * long * wide * 1.05)
    shape = (long, wide) if time_dim == 0 else (wide, long)
    values = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_()
    some = torch.randn(long, device=DEVICE, dtype=torch.bfloat16)
    rewards = (some[:, None] if time_dim == 0 else some[None, :]).expand(shape)
    with pf.use_backend(backend):
        advantages, returns = pf.gae(rewards, values, time_dim=time_dim)
        for part in (slice(0, 3), slice(wide - 3, wide)):
            at = (slice(None), part) if time_dim == 0 else (part, slice(None))
            alone = pf.gae(rewards[at].contiguous(), values[at].contiguous(), time_dim=time_dim)
            assert torch.equal(alone[0], advantages[at]) and torch.equal(alone[1], returns[at])


@each_backend
def test_ppo_loss(backend):
    n = BEYOND + 1001
    needs_memory(2 * 2 * n * 1.05)
    log_prob = torch.empty(n, dtype=torch.bfloat16, device=DEVICE).normal_(0.0, 0.1).requires_grad_()
    old, advantages = torch.zeros((), device=DEVICE).expand(n), torch.ones((), device=DEVICE).expand(n)
    config = pf.LossConfig(reduction="sum")
    with pf.use_backend(backend):
        out = pf.ppo_loss(log_prob, old, advantages, config)
        (grad,) = torch.autograd.grad(out.loss, log_prob)
        for part in (slice(0, 100), slice(n - 1001, n)):
            leaf = log_prob.detach()[part].clone().requires_grad_()
            small = pf.ppo_loss(leaf, old[part], advantages[part], config)
            assert torch.equal(torch.autograd.grad(small.loss, leaf)[0], grad[part])
    assert bool(out.loss.isfinite())


@each_backend
@pytest.mark.parametrize("op", ["ppo_loss", "whiten", "gae"])
def test_views_that_reach_far(backend, op):
    """Two rows, 2³¹ elements apart: strides as wide as that, over one buffer."""
    needs_memory(2 * (BEYOND + 5000) * 1.05)
    buffer = torch.empty(BEYOND + 5000, dtype=torch.bfloat16, device=DEVICE)
    buffer[:5000].normal_()
    buffer[-5000:].normal_()
    far = buffer.as_strided((2, 500), (BEYOND, 1))
    near = far.contiguous()

    def run(x):
        if op == "whiten":
            return [pf.whiten(x)]
        if op == "gae":
            return pf.gae(x, x, time_dim=1)
        leaf = x.detach().requires_grad_()
        out = pf.ppo_loss(leaf, x, x)
        return [out.loss.detach(), out.stats.vector, *torch.autograd.grad(out.loss, leaf)]

    with pf.use_backend(backend):
        for got, want in zip(run(far), run(near), strict=True):
            torch.testing.assert_close(got, want)
