"""rollout_weights against its formula, its laws and its errors; tests/test_peers_losses.py holds it to the trainers."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import same_bits

import ppo_fast as pf

LENGTHS = [5, 1, 9, 0, 3]
MASK = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
CU_SEQLENS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])


def batch(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(5, 9, generator=g, dtype=torch.float64).mul(0.3).sub(1.0).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_formula(level, mode):
    old, rollout = batch()
    out = pf.rollout_weights(old, rollout, mask=MASK, level=level, mode=mode, low=0.5, high=1.6)
    wanted = torch.zeros(5, 9, dtype=torch.float64)
    for i, n in enumerate(LENGTHS):
        d = old[i, :n] - rollout[i, :n]
        rho = d.exp() if level == "token" else d.sum().exp().expand(n)
        inside = (rho >= 0.5) & (rho <= 1.6)
        wanted[i, :n] = rho.clamp(0.5, 1.6) if mode == "truncate" else torch.where(inside, rho, 0.0)
    torch.testing.assert_close(out.weights, wanted, rtol=1e-13, atol=0)
    w = wanted[MASK]
    stats = {k: v.item() for k, v in out.stats.items()}
    assert stats["mean"] == pytest.approx(w.mean().item()) and stats["max"] == w.max() and stats["min"] == w.min()
    assert stats["ess"] == pytest.approx((w.sum() ** 2 / (len(w) * w.square().sum())).item())
    assert stats["fraction_zero"] == pytest.approx((w == 0).double().mean().item()) and stats["fraction_rejected"] == 0
    assert torch.equal(out.keep, MASK)


@pytest.mark.parametrize("options", [
    {}, {"level": "sequence", "mode": "mask", "low": 0.5}, {"reject_on": "k3", "reject_threshold": 0.05},
    {"level": "sequence", "reject_on": "k1", "reject_threshold": (0.9, 1.2)}, {"normalize": True},
    {"level": "sequence", "normalize": True, "reject_on": "k2", "reject_by": "max", "reject_threshold": 0.3},
])  # fmt: skip
def test_packed_is_padded_and_nothing_behind_the_mask_is_read(options):
    old, rollout = batch()
    padded = pf.rollout_weights(old, rollout, mask=MASK, **options)
    packed = pf.rollout_weights(old[MASK], rollout[MASK], cu_seqlens=CU_SEQLENS, **options)
    torch.testing.assert_close(padded.weights[MASK], packed.weights, rtol=1e-13, atol=0)
    assert (padded.weights[~MASK] == 0).all() and not padded.keep[~MASK].any()
    assert torch.equal(padded.keep[MASK], packed.keep)
    torch.testing.assert_close(padded.stats, packed.stats, rtol=1e-12, atol=0)
    for poison in (math.nan, math.inf, -math.inf):
        dirty = (torch.where(MASK, t, poison) for t in (old, rollout))
        again = pf.rollout_weights(*dirty, mask=MASK.float(), **options)
        assert same_bits([padded.weights, *padded.stats.values()], [again.weights, *again.stats.values()])


def test_the_mean_is_one_when_normalised():
    old, rollout = batch()
    out = pf.rollout_weights(old, rollout, mask=MASK, normalize=True)
    assert out.weights[MASK].mean().item() == pytest.approx(1.0)
    out = pf.rollout_weights(old, rollout, mask=MASK, normalize=True, level="sequence")
    assert out.weights[torch.tensor(LENGTHS) > 0, 0].mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize("policy", ["ppo", "cispo", "sapo", "dppo_tv", "reinforce", "cpi", "gspo_token"])
def test_a_factor_of_the_advantages_is_one_of_the_policy_term(policy):
    """As the config's own rollout_correction, which kernels apply."""
    old, rollout = batch()
    x, a = (old + 0.1 * rollout).requires_grad_(), rollout + 1.0
    config = pf.LossConfig(policy=policy, dual_clip=1.5, kl="k3", kl_coef=0.1)
    tis = pf.LossConfig(policy=policy, dual_clip=1.5, kl="k3", kl_coef=0.1, rollout_correction="tis")
    weights = pf.rollout_weights(old, rollout).weights
    one = pf.ppo_loss(x, old, a * weights, config, ref_log_prob=rollout)
    two = pf.ppo_loss(x, old, a, tis, ref_log_prob=rollout, rollout_log_prob=rollout)
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(o.loss, x)[0] for o in (one, two)), rtol=1e-12, atol=1e-15)


def test_constants_dtypes_and_the_ends():
    old, rollout = batch(torch.bfloat16)
    out = pf.rollout_weights(old.requires_grad_(), rollout)
    assert out.weights.dtype is torch.float32 and not out.weights.requires_grad
    far = pf.rollout_weights(torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0]), high=math.inf)
    assert far.weights.tolist() == pytest.approx([math.exp(20.0), math.exp(-20.0)])
    for shape, mask in (((0,), None), ((0, 4), None), ((2, 3), torch.zeros(2, 3))):
        empty = torch.full(shape, math.nan)
        out = pf.rollout_weights(
            empty, empty, mask=mask, normalize=True, reject_on="k2", reject_by="max", reject_threshold=1.0
        )
        assert (out.weights == 0).all() and all(v == 0 for v in out.stats.values())


@pytest.mark.parametrize(("options", "message"), [
    ({"mask": torch.ones(3)}, r"mask must be the shape of old_log_prob = \[5, 9\], got \[3\]"),
    ({"level": "row"}, r"level must be one of \('token', 'sequence'\), got 'row'"),
    ({"mode": "tis"}, r"mode must be one of .*, got 'tis'"),
    ({"low": 3.0}, "low and high must be 0 <= low <= high, got 3.0 and 2.0"),
    ({"reject_on": "k4"}, "reject_on must be one of .*, got 'k4'"),
    ({"reject_on": "k1"}, "reject_threshold must be given with reject_on and only then, got None"),
    ({"reject_threshold": 1.0}, "reject_threshold must be given with reject_on and only then, got 1.0"),
    ({"reject_on": "k3", "reject_threshold": (0.1, 0.2)}, "reject_threshold must be one number, or a pair for k1"),
    ({"reject_on": "k1", "reject_threshold": (1.2, 0.8)}, r"reject_threshold must be > 0, or \(low, high\) in order"),
    ({"reject_on": "k1", "reject_by": "max", "reject_threshold": 1.2}, "reject_by must not be 'max' with k1"),
    ({"reject_on": "k2", "reject_by": "row", "reject_threshold": 1.2}, "reject_by must be one of"),
])  # fmt: skip
def test_errors(options, message):
    with pytest.raises(ValueError, match=f"rollout_weights: {message}"):
        pf.rollout_weights(*batch(), **options)
