"""linear_log_prob and linear_ppo_loss on a GPU: torch's products, our kernels on each chunk, no wait and no logits."""

from __future__ import annotations

import pytest
import torch
from conftest import as_double, assert_as_good
from linear_cases import M, V, example

import ppo_fast as pf
from ppo_fast import reference

from . import cases
from .conftest import BACKENDS, DEVICE, needs_cuda

each_backend = pytest.mark.parametrize("backend", BACKENDS)
CONFIG = pf.LossConfig(entropy_coef=0.01, kl="k3", kl_coef=0.1)


def rollout(x):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        log_prob, _ = reference.linear_log_prob(**{k: as_double(v) for k, v in x.items()})
    make = lambda: torch.randn(M, generator=g)  # noqa: E731
    old = log_prob.float() + 0.05 * make()
    return {"old_log_prob": old, "advantages": make(), "ref_log_prob": old + 0.3, "mask": torch.arange(M) % 4 != 0}


def results(op, x, seeds=None, **rest):
    """Values and gradients of the leaves of x, on the CPU."""
    out = op(**x, **rest)
    leaves = [v for v in x.values() if v.requires_grad]
    if seeds is None:
        grads = torch.autograd.grad(out.loss, leaves)
        return [y.detach().cpu() for y in (out.loss, out.stats.vector[:-1], *grads)]  # without values: NaN
    grads = torch.autograd.grad(out, leaves, [s.to(y) for s, y in zip(seeds, out, strict=True)])
    return [y.detach().cpu() for y in (*out, *grads)]


def there(x):
    return {k: cases.moved(v, DEVICE) for k, v in x.items()}


@each_backend
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("memory", [None, 4 * V * 10])
def test_log_probs(backend, dtype, memory):
    x, seeds = example(dtype, bias=True), torch.randn(2, M)
    x["targets"][::5] = -100
    options = {"softcap": 5.0, "ignore_index": -100, "temperature": torch.linspace(0.5, 2.0, M)}
    truth = results(reference.linear_log_prob, {k: as_double(v) for k, v in x.items()}, seeds, **options)
    eager = results(reference.linear_log_prob, x, seeds, **options)
    options["temperature"] = options["temperature"].to(DEVICE)
    with pf.use_backend(backend):
        actual = results(pf.linear_log_prob, there(x), seeds, **options, logits_memory=memory)
    for i, (a, e, t) in enumerate(zip(actual, eager, truth, strict=True)):
        assert_as_good(a, e, t, f"result {i}", ulps=64.0)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory", [None, 4 * V * 10])
def test_losses(backend, dtype, memory):
    x = example(dtype, bias=True)
    stored = rollout(x)
    with pf.use_backend("reference"):
        truth = results(pf.linear_ppo_loss, {k: as_double(v) for k, v in x.items()}, **stored, config=CONFIG)
    with pf.use_backend(backend):
        actual = results(pf.linear_ppo_loss, there(x), **there(stored), config=CONFIG, logits_memory=memory)
    for i, (a, t) in enumerate(zip(actual, truth, strict=True)):
        assert_as_good(a, None, t, f"result {i}", ulps=2000.0)


@each_backend
def test_masked_tokens_may_hold_anything(backend):
    x = example()
    stored = rollout(x)
    mask = stored["mask"]
    dirty = {k: torch.where(mask, v, float("nan")) if v.is_floating_point() else v for k, v in stored.items()}
    hidden = torch.where(mask[:, None], x["hidden"].detach(), float("inf")).requires_grad_()
    with pf.use_backend(backend):
        clean = results(pf.linear_ppo_loss, there(x), **there(stored), config=CONFIG)
        other = results(pf.linear_ppo_loss, there({**x, "hidden": hidden}), **there(dirty), config=CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(clean, other, strict=True))


@each_backend
def test_same_bits_over_runs(backend):
    x = there(example())
    stored = there(rollout(example()))
    with pf.use_backend(backend):
        runs = [results(pf.linear_ppo_loss, x, **stored, config=CONFIG, logits_memory=4 * V * 10) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_cuda
@each_backend
def test_nobody_waits(backend):
    x, stored = there(example()), there(rollout(example()))
    with pf.use_backend(backend):
        pf.linear_ppo_loss(**x, **stored, config=CONFIG).loss.backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = pf.linear_ppo_loss(**x, **stored, config=CONFIG)
            out.loss.backward()
            log_prob, entropy = pf.linear_log_prob(**x)
            (log_prob.sum() + entropy.sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@each_backend
def test_the_logits_never_exist(backend):
    m, h, v = 4096, 256, 32_000
    hidden = torch.randn(m, h, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, h, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(v, (m,), device=DEVICE)
    old, advantages = torch.full((m,), -10.0, device=DEVICE), torch.randn(m, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before, memory = torch.cuda.memory_allocated(), 16 << 20
    with pf.use_backend(backend):
        pf.linear_ppo_loss(hidden, weight, targets, old, advantages, logits_memory=memory).loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < memory + 3 * 4 * v * h + 4 * 2 * m * h + (8 << 20)  # dW, a chunk's product, the cast; d_hidden
    assert weight.grad.dtype is torch.bfloat16


@needs_cuda
def test_a_target_outside_the_vocabulary_is_said_late():
    x = there(example())
    x["targets"][5] = V
    with pf.use_backend(BACKENDS[0]):
        pf.linear_log_prob(**x)
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match=f"got {V} at 5"):
            pf.linear_log_prob(**there(example()))
