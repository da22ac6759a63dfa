"""OpenRLHF: its losses, advantages, log-probs and entropies against ours; what needs a GPU's libraries to import is mocked."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("openrlhf") is None:
    pytest.skip("openrlhf is not installed", allow_module_level=True)
sys.path.append(str(Path(__file__).parents[1] / "peers/stubs/openrlhf"))
import stand_ins

with stand_ins.mocked():
    from openrlhf.models import PolicyLoss, ValueLoss
    from openrlhf.models import utils as models_utils
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    from ppo_fast.integrations import openrlhf

LENGTHS = torch.tensor([7, 4, 9, 0, 1, 8])  # one row is empty
B, T, V = len(LENGTHS), 9, 23
MASK = torch.arange(T) < LENGTHS[:, None]
HOLES = MASK & (torch.arange(T) % 4 != 2)


def numbers(seed=0, scale=0.4, mean=-1.5, shape=(B, T), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + mean).to(dtype)


def close(mine, other, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(mine, other, rtol=rtol, atol=atol)


def both(theirs, ours, leaf, *arguments):
    """Results and gradient of theirs and of ours, compared."""
    found = []
    for f in (theirs, ours):
        x = leaf.clone().requires_grad_()
        out = f(x, *arguments)
        loss = out[0] if isinstance(out, tuple) else out
        (grad,) = torch.autograd.grad(loss.sum(), x)
        found.append((out if isinstance(out, tuple) else (out,), grad))
    (theirs_out, theirs_grad), (out, grad) = found
    for x, y in zip(theirs_out, out, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype
            close(y, x)
    close(grad, theirs_grad, 1e-5, 1e-7)
    return out, grad


POLICIES = {
    "plain": {},
    "sides": {"clip_eps_low": 0.1, "clip_eps_high": 0.3},
    "dual clip": {"dual_clip": 1.2},
    "by sequence": {"token_level_loss": False},
    "gspo": {"policy_loss_type": "gspo"},
    "gspo, dual clip": {"policy_loss_type": "gspo", "dual_clip": 1.05, "clip_eps_low": 0.05, "clip_eps_high": 0.02},
    "gspo of the rollout": {"policy_loss_type": "gspo", "is_correction_level": "token"},
    "tis": {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.8, 1.2)},
    "icepop without 1": {"is_correction_level": "token", "is_correction_threshold": (1.01, 9.0)},
    "icepop": {"is_correction_level": "token", "is_correction_threshold": (0.6, 1.5), "dual_clip": 1.5},
    "by ratio of sequences": {"is_correction_level": "seq", "is_correction_threshold": (0.9, 1.1)},
    "no lower bound": {"is_correction_level": "seq", "is_correction_threshold": (0.0, 1.1)},
    "by kl": {
        "is_correction_level": "token",
        "is_correction_gating": "binary_kl",
        "is_correction_threshold": (0.0, 0.05),
    },
    "by tv": {"is_correction_level": "seq", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.08)},
}


@pytest.mark.parametrize("totals", [(), (4, 77.0, 13.0), (2, torch.tensor(50.0), torch.tensor(9.0))])
@pytest.mark.parametrize("mask", [MASK, HOLES.float(), HOLES.long()], ids=["bool", "float", "int"])
@pytest.mark.parametrize("name", POLICIES)
def test_policy_loss(name, mask, totals):
    module = PolicyLoss(**POLICIES[name])
    old, rollout = numbers(1), numbers(2)
    arguments = (old, numbers(3, 1.5, 0.0), mask, rollout, *totals)
    out, grad = both(lambda *a: openrlhf._policy_loss(module, *a), lambda *a: openrlhf.policy_loss(module, *a),
                     numbers(0), *arguments)  # fmt: skip
    assert grad.count_nonzero() > 3 and grad[mask == 0].count_nonzero() == 0
    assert (out[3] is None) == (not name.startswith(("tis", "icepop", "by ratio", "no lower", "by kl", "by tv")))


@pytest.mark.parametrize("name", ["plain", "dual clip", "gspo", "tis", "by ratio of sequences"])
def test_policy_loss_of_extreme_ratios_and_ties(name):
    module = PolicyLoss(**POLICIES[name])
    x, old, advantages = numbers(0, 12.0), numbers(1, 12.0), numbers(3, 1.5, 0.0)
    old[0], advantages[:, ::3] = x[0], 0.0  # ratio 1
    if name == "gspo":  # a ratio of infinity is theirs and ours, and NaN times a mask is only theirs
        x, old = x * 0.2, old * 0.2
    x[4, 0], old[4, 0], advantages[4, 0] = 15.0, -15.0, -1.0  # beyond the clamp of a token; a sequence of one has none
    ours = both(lambda *a: openrlhf._policy_loss(module, *a), lambda *a: openrlhf.policy_loss(module, *a), x, old, advantages,
                MASK, numbers(4, 12.0))  # fmt: skip
    assert ours[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_policy_loss_in_other_dtypes(dtype):
    module = PolicyLoss(dual_clip=3.0)
    streams = [numbers(i, dtype=dtype) for i in range(3)]
    out, _ = both(
        lambda *a: openrlhf._policy_loss(module, *a), lambda *a: openrlhf.policy_loss(module, *a), *streams, MASK
    )
    assert out[0].dtype == (torch.float64 if dtype is torch.float64 else torch.bfloat16)


def test_policy_loss_without_a_mask_and_broadcast():
    module = PolicyLoss()
    both(lambda *a: openrlhf._policy_loss(module, *a), lambda *a: openrlhf.policy_loss(module, *a), numbers(0), numbers(1),
         numbers(2))  # fmt: skip
    both(lambda *a: openrlhf._policy_loss(module, *a), lambda *a: openrlhf.policy_loss(module, *a), numbers(0), numbers(1),
         numbers(2)[:, :1], MASK)  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "gspo", "tis", "by ratio of sequences", "by sequence"])
def test_masked_places_reach_nothing(name):
    module = PolicyLoss(**POLICIES[name])
    clean = [numbers(0), numbers(1), numbers(3, 1.0, 0.0), numbers(4)]
    dirty = [x.masked_fill(~MASK, torch.nan) for x in clean]
    found = []
    for x, old, advantages, rollout in (clean, dirty):
        x.requires_grad_()
        out = openrlhf.policy_loss(module, x, old, advantages, MASK, rollout)
        found.append([*(y for y in out if y is not None), torch.autograd.grad(out[0], x)[0]])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    nothing = openrlhf.policy_loss(module, *clean[:3], torch.zeros_like(MASK), clean[3])
    assert all(x is None or x.isfinite() for x in nothing) and nothing[0] == 0  # theirs: 0/0


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("totals", [(), (4, 77.0, 13.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_value_loss(clip, by_token, totals, dtype):
    module = ValueLoss(clip, by_token)
    streams = [numbers(i, 1.0, 0.0, dtype=dtype) for i in range(3)]
    streams[1][0] = streams[0][0]  # a tie of both branches
    both(
        lambda *a: openrlhf._value_loss(module, *a),
        lambda *a: openrlhf.value_loss(module, *a),
        *streams,
        HOLES,
        *totals,
    )
    if by_token and not totals:
        both(lambda *a: openrlhf._value_loss(module, *a), lambda *a: openrlhf.value_loss(module, *a), *streams)


@pytest.mark.parametrize("mask", [None, MASK, HOLES.float(), ~MASK])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.0), (1.0, 1.0), (0.97, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_advantages(mask, gamma, lam, dtype):
    values, rewards = numbers(0, 1.0, 0.0, (T, B), dtype).t(), numbers(1, 1.0, 0.0, dtype=dtype)
    x = openrlhf._get_advantages_and_returns(None, values, rewards, mask, gamma, lam)
    y = openrlhf.get_advantages_and_returns(None, values, rewards, mask, gamma, lam)
    for a, b in zip(x, y, strict=True):
        assert a.dtype == b.dtype and b.shape == (B, T) and not b.requires_grad
        close(b, a, 1e-5, 1e-5)


def test_advantages_at_the_edges():
    one = numbers(0, shape=(B, 1))
    for x in (openrlhf._get_advantages_and_returns, openrlhf.get_advantages_and_returns):
        assert torch.equal(x(None, one, one, None, 1.0, 0.95)[1], one)
        with pytest.raises(RuntimeError):  # no step at all
            x(None, one[:, :0], one[:, :0], None, 1.0, 0.95)
    outside = [f(None, one, one, None, 1.5, 0.95)[0] for f in
               (openrlhf._get_advantages_and_returns, openrlhf.get_advantages_and_returns)]  # fmt: skip
    assert torch.equal(*outside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropy(dtype, temperature):
    logits = numbers(0, 3.0, 0.0, (B, T + 1, V), dtype)[:, :-1]  # a view
    labels = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    found = []
    for log_prob, entropy in (
        (openrlhf._log_probs_from_logits, models_utils.compute_entropy._torchdynamo_orig_callable),
        (openrlhf.log_probs_from_logits, openrlhf.compute_entropy if dtype is not torch.bfloat16 else None),
    ):
        x = logits.clone().requires_grad_()
        h = None if entropy is None else entropy(x / temperature)
        out = log_prob(x * 1.0, labels, temperature)
        total = out.sum() if h is None or dtype is torch.bfloat16 else out.sum() + 2 * h.sum()
        found.append((out, h, *torch.autograd.grad(total, x)))
    for a, b in zip(*found, strict=True):
        if a is not None and b is not None:
            assert a.dtype == b.dtype == dtype
            close(b, a, 1e-4, 1e-5) if dtype is not torch.bfloat16 else close(b, a)


def test_impossible_tokens_and_odd_calls():
    logits = numbers(0, 1.0, 0.0, (3, V))
    logits[0, 4:] = -torch.inf
    assert openrlhf.compute_entropy(logits).isfinite().all()
    close(openrlhf.compute_entropy(logits)[0], openrlhf.compute_entropy(logits[0, :4]))
    with pytest.raises(RuntimeError):
        openrlhf.log_probs_from_logits(logits, torch.zeros(2, 3, dtype=torch.long))


def test_enable_and_disable():
    from openrlhf.models import actor

    before = actor.compute_entropy, PolicyLoss.forward, RemoteExperienceMaker.get_advantages_and_returns
    with openrlhf.enabled():
        assert actor.compute_entropy is models_utils.compute_entropy is openrlhf.compute_entropy
        assert actor.log_probs_from_logits is openrlhf.log_probs_from_logits
        x = numbers(0).requires_grad_()
        loss, *rest = PolicyLoss()(x, numbers(1), numbers(2), MASK)
        close(loss, openrlhf._policy_loss(PolicyLoss(), x, numbers(1), numbers(2), MASK)[0])
        assert len(rest) == 4 and ValueLoss.forward is openrlhf.value_loss
        assert RemoteExperienceMaker.get_advantages_and_returns is openrlhf.get_advantages_and_returns
    assert before == (actor.compute_entropy, PolicyLoss.forward, RemoteExperienceMaker.get_advantages_and_returns)
