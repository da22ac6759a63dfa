"""slime: what is replaced, and the log-probs, against its own. `PYTHONPATH=<a checkout of slime>:tests/peers/stubs/slime`."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("slime.utils.ppo_utils")
try:
    from ppo_fast.integrations import slime
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)
from slime.utils import ppo_utils

LENGTHS = [7, 1, 300, 128, 129]
TOTALS = [n + 3 for n in LENGTHS]


def rand(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


@pytest.fixture(autouse=True)
def megatron(monkeypatch):
    mpu = SimpleNamespace(get_context_parallel_world_size=lambda: 1)
    monkeypatch.setitem(sys.modules, "megatron", SimpleNamespace(core=SimpleNamespace(mpu=mpu)))
    monkeypatch.setitem(sys.modules, "megatron.core", SimpleNamespace(mpu=mpu))
    return mpu


@pytest.fixture
def calls(monkeypatch):
    """Names of slime's own functions that were called."""
    called = []
    for name in ("vanilla_gae", "chunked_gae", "chunked_discounted_returns", "get_advantages_and_returns_batch",
                 "calculate_log_probs_and_entropy"):  # fmt: skip
        function = getattr(slime.theirs, name)
        monkeypatch.setattr(slime.theirs, name, lambda *a, _f=function, _n=name: called.append(_n) or _f(*a))
    return called


def close(ours, theirs, **tolerance):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    usual = {"rtol": 1e-10, "atol": 1e-10} if ours.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ours, theirs, **(tolerance or usual))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.0, 0.5), (0.9, 0.0)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (2, 500)])
def test_gae_and_returns(shape, gamma, lam, dtype, calls):
    rewards, values = rand(*shape, seed=1, dtype=dtype), rand(*reversed(shape), seed=2, dtype=dtype).T
    wanted = [
        slime.theirs.vanilla_gae(rewards, values, gamma, lam),
        slime.theirs.chunked_gae(rewards, values, gamma, lam),
    ]
    returns = slime.theirs.chunked_discounted_returns(rewards, gamma)
    calls.clear()
    for function, expected in zip((slime.vanilla_gae, slime.chunked_gae), wanted, strict=True):
        for x, y in zip(function(rewards, values, gamma, lam), expected, strict=True):
            close(x, y)
    close(slime.chunked_discounted_returns(rewards, gamma), returns)
    assert not calls


@pytest.mark.parametrize("chunked", [False, True])
def test_responses_of_all_lengths(chunked, calls):
    values, rewards = ([rand(n + 2, seed=s + i) for i, n in enumerate(LENGTHS)] for s in (0, 50))
    arguments = TOTALS, LENGTHS, values, rewards, 0.99, 0.95, chunked
    wanted = slime.theirs.get_advantages_and_returns_batch(*arguments)
    calls.clear()
    with slime.enabled():
        assert ppo_utils.get_advantages_and_returns_batch is slime.get_advantages_and_returns_batch
        ours = ppo_utils.get_advantages_and_returns_batch(*arguments)
    assert not calls
    for mine, their in zip(ours, wanted, strict=True):
        assert [len(x) for x in mine] == LENGTHS
        for x, y in zip(mine, their, strict=True):
            close(x, y)


def test_reinforce_plus_plus_takes_our_returns():
    kl, masks = [rand(n, seed=n) for n in LENGTHS], [torch.ones(n) for n in LENGTHS]
    arguments = rand(len(LENGTHS)), kl, masks, LENGTHS, TOTALS, 0.1, 0.97
    wanted = ppo_utils.get_reinforce_plus_plus_returns(*arguments)
    with slime.enabled():
        ours = ppo_utils.get_reinforce_plus_plus_returns(*arguments)
    for x, y in zip(ours, wanted, strict=True):
        close(x, y)


def test_what_ours_cannot_do_is_theirs(calls, megatron, monkeypatch):
    half, x = rand(2, 9).bfloat16(), rand(2, 9)
    slime.vanilla_gae(half, half, 0.9, 0.9)
    slime.vanilla_gae(x, x.double(), 0.9, 0.9)
    slime.chunked_gae(x, x.clone().requires_grad_(), 0.9, 0.9)
    slime.chunked_gae(x, x, 1.01, 0.9)
    slime.chunked_discounted_returns(half.float().requires_grad_(), 0.9)
    slime.get_advantages_and_returns_batch([9], [9], [half[0]], [half[0]], 0.9, 0.9)
    batch = "get_advantages_and_returns_batch"
    assert calls == ["vanilla_gae", "vanilla_gae", "chunked_gae", "chunked_gae", "chunked_discounted_returns", batch]
    slime.calculate_log_probs_and_entropy(torch.empty(0, 4), torch.empty(0, dtype=torch.long), None, True)
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 2)  # the vocabulary is sharded; nothing is initialised here
    slime.calculate_log_probs_and_entropy(rand(3, 5), torch.zeros(3, dtype=torch.long), group)
    assert calls[-2:] == ["calculate_log_probs_and_entropy"] * 2
    megatron.get_context_parallel_world_size = lambda: 2
    monkeypatch.setattr(slime.theirs, batch, lambda *a: "theirs")
    assert slime.get_advantages_and_returns_batch([9], [9], [x[0]], [x[0]], 0.9, 0.9) == "theirs"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("entropy", "entropy_grad"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_and_entropy(dtype, entropy, entropy_grad, masked, calls):
    tokens, results = torch.randint(37, (20,)), []
    mask = rand(20, 37) > 0 if masked else None
    for function in (ppo_utils.calculate_log_probs_and_entropy, slime.calculate_log_probs_and_entropy):
        logits = rand(20, 37, seed=2, scale=3.0, dtype=dtype).requires_grad_()
        log_prob, h = function(logits, tokens, None, entropy, 7, mask, entropy_grad)
        loss = (log_prob * rand(20, 1, seed=3)).sum()
        if h is not None:
            assert h.requires_grad == entropy_grad
            loss = loss + (h * rand(20, seed=4)).sum()
        loss.backward()
        results.append([x.detach() for x in (log_prob, h, logits.grad) if x is not None])
    assert not calls
    for x, y in zip(results[1], results[0], strict=True):
        close(x, y, **({"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-6}))


def test_log_probs_are_slimes_until_asked_for():
    before = ppo_utils.calculate_log_probs_and_entropy
    with slime.enabled():
        assert ppo_utils.calculate_log_probs_and_entropy is before
