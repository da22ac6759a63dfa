"""Group estimators, rewards with KL, controllers: against formulas written down again in float64, and by laws."""

from __future__ import annotations

import math

import pytest
import torch

import ppo_fast as pf
from ppo_fast import advantages as adv


def group_formula(name, scores, lengths):
    """The estimators for the scores (Python floats) of one group, from their papers."""
    n = len(scores)
    if n == 1:
        return list(scores)
    mean = math.fsum(scores) / n
    if name == "dr_grpo":
        return [s - mean for s in scores]
    if name == "grpo":
        std = math.sqrt(math.fsum((s - mean) ** 2 for s in scores) / (n - 1))
        return [(s - mean) / (std + 1e-4) for s in scores]
    if name == "opo":
        baseline = math.fsum(a * s for a, s in zip(lengths, scores, strict=True)) / math.fsum(lengths)
        return [s - baseline for s in scores]
    out = []
    for i, s in enumerate(scores):
        others = scores[:i] + scores[i + 1 :]
        mean = math.fsum(others) / (n - 1)
        std = (
            math.sqrt(math.fsum((x - mean) ** 2 for x in others) / (n - 2)) if name == "leave_one_out" and n > 2 else 0
        )
        out.append((s - mean) / (std + 1e-6) if std > 0 else s - mean)
    return out


def formula(name, scores, ids, lengths):
    out = [0.0] * len(scores)
    for g in set(ids.tolist()):
        members = [i for i, j in enumerate(ids.tolist()) if j == g]
        found = group_formula(name, [scores[i].item() for i in members], [lengths[i].item() for i in members])
        for i, a in zip(members, found, strict=True):
            out[i] = a
    return torch.tensor(out, dtype=torch.float64)


def whitened(x):
    return (x - x.mean()) / (x.var(correction=1) + 1e-8).sqrt()


GROUPED = ("grpo", "dr_grpo", "rloo", "leave_one_out", "opo")
IDS = torch.tensor([7, -2, 7, 5, 7, -2, 7, 11, 7, 11])  # groups of 5, 2, 1 and 2
LENGTHS = torch.tensor([1, 4, 3, 2, 6, 5, 1, 2, 2, 3])


def scores_of(seed=0, dtype=torch.float64):
    return torch.randn(len(IDS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def call(name, rewards, ids, **options):
    if name == "opo" and rewards.ndim == 1:
        options["lengths"] = LENGTHS
    return adv.ESTIMATORS[name](rewards, ids, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GROUPED)
def test_scores_against_the_formula(name, dtype):
    for seed in range(5):
        scores = scores_of(seed, dtype)
        out = call(name, scores, IDS)
        assert out.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        tolerance = 1e-12 if dtype is torch.float64 else 3e-5
        torch.testing.assert_close(out.double(), formula(name, scores, IDS, LENGTHS), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", GROUPED)
def test_token_rewards_are_summed_and_masked_ones_are_not_read(name):
    scores = scores_of()
    mask = torch.arange(6) < LENGTHS[:, None]
    mask = mask.flip(1) if name == "rloo" else mask  # any pattern will do
    parts = torch.rand(len(IDS), 6, dtype=torch.float64) * mask
    parts = parts / parts.sum(1, keepdim=True) * scores[:, None]
    rewards = torch.where(mask, parts, math.nan)
    out = adv.ESTIMATORS[name](rewards, IDS, mask.float())
    expected = formula(name, scores, IDS, LENGTHS)[:, None] * mask
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_reinforce_plus_plus_whitens_the_reward_to_go():
    torch.manual_seed(3)
    mask = torch.arange(5) < torch.tensor([5, 2, 1, 4])[:, None]
    rewards = torch.where(mask, torch.randn(4, 5, dtype=torch.float64), math.nan)
    to_go = torch.zeros(4, 5, dtype=torch.float64)
    running = torch.zeros(4, dtype=torch.float64)
    for t in reversed(range(5)):
        running = torch.where(mask[:, t], rewards[:, t].nan_to_num() + 0.9 * running, 0.0)
        to_go[:, t] = running
    expected = torch.zeros_like(to_go)
    expected[mask] = whitened(to_go[mask])
    torch.testing.assert_close(adv.reinforce_plus_plus(rewards, None, mask, gamma=0.9), expected)
    scores = scores_of()
    torch.testing.assert_close(adv.reinforce_plus_plus(scores), whitened(scores))
    baseline = adv.reinforce_plus_plus_baseline(scores, IDS)
    torch.testing.assert_close(baseline, whitened(formula("dr_grpo", scores, IDS, LENGTHS)))


def test_remax_takes_the_greedy_score_off():
    rewards = torch.tensor([[0.5, 1.0, math.nan], [0.0, 0.0, 2.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    out = adv.remax(rewards, torch.tensor([1.0, -1.0]), mask)
    assert out.tolist() == [[0.5, 0.0, 0.0], [3.0, 3.0, 3.0]]
    assert adv.remax(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 5.0])).tolist() == [2.0, -1.0]


ALL = (*GROUPED, "reinforce_plus_plus", "reinforce_plus_plus_baseline")
NO_SINGLES = torch.tensor([7, -2, 7, 7, 7, -2, 7, 11, 7, 11])


@pytest.mark.parametrize("name", ALL)
def test_laws(name):
    scores = scores_of(1)
    out = call(name, scores, NO_SINGLES)
    # a shift of all scores changes nothing
    torch.testing.assert_close(call(name, scores + 100.0, NO_SINGLES), out, rtol=1e-9, atol=1e-9)
    # permuting responses with their groups permutes results
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(5))
    options = {"lengths": LENGTHS[order]} if name == "opo" else {}
    permuted = adv.ESTIMATORS[name](scores[order], NO_SINGLES[order], **options)
    torch.testing.assert_close(permuted, out[order], rtol=1e-9, atol=1e-9)
    # names of groups do not matter, and an integer means consecutive ones
    by_id = adv.ESTIMATORS[name](scores, torch.arange(10) // 5, **({"lengths": LENGTHS} if name == "opo" else {}))
    by_size = adv.ESTIMATORS[name](scores, 5, **({"lengths": LENGTHS} if name == "opo" else {}))
    assert torch.equal(by_id, by_size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_groups_of_equal_scores_give_exactly_zero(name, dtype):
    scores = torch.full((10,), 0.1, dtype=dtype)
    if not name.startswith("reinforce"):
        scores = scores + NO_SINGLES.to(dtype)  # equal inside each group only
    assert torch.equal(call(name, scores, NO_SINGLES), torch.zeros(10, dtype=torch.promote_types(dtype, torch.float32)))


@pytest.mark.parametrize("name", GROUPED)
def test_a_group_of_one_keeps_its_score(name):
    scores = scores_of(2)
    out = call(name, scores, IDS)
    assert out[3] == scores[3]
    assert torch.equal(call(name, scores, 1), scores)


def test_deviations_of_others_are_not_rounding_noise():
    """Three equal scores and one other: σ of the equal three is 0, not what was left after cancelling."""
    out = adv.leave_one_out(torch.tensor([0.3, 0.1, 0.1, 0.1]), 4)
    assert abs(out[0].item() - 0.2) < 1e-6


def test_inputs_are_constants_and_empty_batches_pass():
    scores = scores_of().requires_grad_()
    assert not call("grpo", scores, IDS).requires_grad
    for name in GROUPED:
        assert adv.ESTIMATORS[name](torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)).shape == (0, 4)


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        (lambda s: adv.grpo(s, 3), "divide the 10"),
        (lambda s: adv.grpo(s, IDS[:4]), r"\[10\]"),
        (lambda s: adv.grpo(s, IDS.float()), "float32"),
        (lambda s: adv.grpo(s, IDS, IDS), r"mask must be"),
        (lambda s: adv.rloo(s[None, None], 1), r"\[B\] or \[B, T\]"),
        (lambda s: adv.opo(s, IDS, lengths=LENGTHS[:3]), "lengths"),
        (lambda s: adv.remax(s, s[:3]), "baselines"),
        (lambda s: adv.length_adaptive_lambda(s, 0.0), "alpha"),
        (lambda s: adv.kl_estimate(s, s, "k4"), "k4"),
        (lambda s: adv.token_rewards(s, s, s, s, 0.1), r"\[B, T\]"),
        (lambda s: adv.token_rewards(s, s[:, None], s[:, None], s[:5, None], 0.1), r"\[B, T\]"),
        (lambda s: adv.AdaptiveKL(0.1, 0.0), "target"),
    ],
)
def test_wrong_input_is_named(wrong, part):
    with pytest.raises(ValueError, match=part):
        wrong(scores_of())


def test_opo_needs_lengths():
    with pytest.raises(TypeError, match="lengths"):
        adv.opo(scores_of(), IDS)


def test_length_adaptive_lambda_spans_a_share_of_the_response():
    lengths = torch.tensor([100, 400, 1, 0], dtype=torch.int64)
    lam = adv.length_adaptive_lambda(lengths, 0.05)
    assert lam.tolist() == pytest.approx([0.8, 0.95, 0.0, 0.0])
    assert 1 / (1 - lam[:2].double()) == pytest.approx([5.0, 20.0])  # Σ λ^t = alpha·l
    rewards, values = torch.randn(3, 100), torch.randn(3, 100)
    lam = adv.length_adaptive_lambda(torch.tensor([100, 60, 30]))
    out, _ = pf.gae(rewards, values, lam=lam, gamma=1.0, time_dim=1)
    for i in range(3):
        one, _ = pf.gae(rewards[i], values[i], lam=float(lam[i]), gamma=1.0)
        torch.testing.assert_close(out[i], one)


ESTIMATES = {
    "k1": lambda u: -u,
    "abs": lambda u: abs(u),
    "k2": lambda u: u * u / 2,
    "k3": lambda u: math.exp(u) - u - 1,
}


@pytest.mark.parametrize("estimator", ESTIMATES)
def test_token_rewards(estimator):
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    log_prob, ref = (torch.where(mask, torch.randn(4, 4, dtype=torch.float64), math.nan) for _ in range(2))
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    out = adv.token_rewards(scores, log_prob, ref, mask, 0.3, estimator)
    last = [1, 2, None, 3]
    for i in range(4):
        for t in range(4):
            expected = 0.0
            if mask[i, t]:
                expected = -0.3 * ESTIMATES[estimator]((ref[i, t] - log_prob[i, t]).item())
                expected += scores[i].item() if t == last[i] else 0.0
            assert out[i, t].item() == pytest.approx(expected, abs=1e-12)
    assert adv.token_rewards(torch.zeros(2), *torch.zeros(3, 2, 0), 0.1).shape == (2, 0)


def test_kl_controllers():
    fixed = adv.FixedKL(0.2)
    fixed.update(100.0, 64)
    assert fixed.coef == 0.2
    adaptive = adv.AdaptiveKL(0.2, target=6.0, horizon=1000.0)
    adaptive.update(6.6, 100)  # 10 % too much
    assert adaptive.coef == pytest.approx(0.2 * 1.01)
    adaptive.update(60.0, 100)  # the error is clipped at 20 %
    assert adaptive.coef == pytest.approx(0.2 * 1.01 * 1.02)
    adaptive.update(0.0, 100)
    assert adaptive.coef == pytest.approx(0.2 * 1.01 * 1.02 * 0.98)
