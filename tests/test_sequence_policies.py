"""Policies of sequences and of the batch against formulas written from their papers in float64, and the laws of all policies."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import same_bits
from loss_cases import replace

import ppo_fast as pf
from ppo_fast.config import POLICIES, REDUCTIONS, SEQUENCE_POLICIES, TOKEN_POLICIES

LENGTHS = [5, 1, 9, 0, 3]  # valid tokens of each row: one row has none
B, T = len(LENGTHS), 9


def batch(seed=0, dtype=torch.float64):
    """Rows of [B, T] with a mask, probabilities below 1, advantages of both signs that differ within a row."""
    g = torch.Generator().manual_seed(seed)
    make = lambda scale, mean=0.0: (torch.randn(B, T, generator=g, dtype=torch.float64) * scale + mean).to(dtype)  # noqa: E731
    x = {
        "log_prob": make(0.3, -1.5).requires_grad_(), "old_log_prob": make(0.3, -1.5), "advantages": make(1.0),
        "ref_log_prob": make(0.3, -1.5), "rollout_log_prob": make(0.3, -1.5), "values": make(1.0).requires_grad_(),
        "returns": make(1.0), "entropy": make(0.1, 1.0).requires_grad_(),
    }  # fmt: skip
    return x, torch.arange(T) < torch.tensor(LENGTHS)[:, None]


def policy_of(config, x, mask):
    """Policy loss and its gradient by the op, everything else switched off."""
    out = pf.ppo_loss(x["log_prob"], x["old_log_prob"], x["advantages"], config, mask=mask)
    return out, torch.autograd.grad(out.loss, x["log_prob"])[0]


# --- the papers' formulas, sequence by sequence -----------------------------------------------------------------------


def gspo(x, old, a, c):
    """arXiv 2507.18071, eq. 5 to 7: one ratio a sequence."""
    s = ((x - old).sum() / len(x)).exp()
    return torch.stack([-torch.min(s * each, s.clamp(1 - c.clip_low, 1 + c.clip_high) * each) for each in a])


def gspo_token(x, old, a, c):
    """arXiv 2507.18071, eq. 13 and 14."""
    s = ((x - old).sum() / len(x)).exp().detach() * x.exp() / x.exp().detach()
    return -torch.min(s * a, s.clamp(1 - c.clip_low, 1 + c.clip_high) * a)


def gmpo(x, old, a, c):
    """arXiv 2507.20673, eq. 4: the geometric mean of the ratios, each clipped on the side that its advantage would push."""
    ratios = (x - old).exp()
    low, high = math.exp(-c.clip_low), math.exp(c.clip_high)
    kept = [
        torch.clamp(r, max=high) if each >= 0 else torch.clamp(r, min=low) for r, each in zip(ratios, a, strict=True)
    ]
    return -a * torch.stack(kept).prod() ** (1.0 / len(x))


def vespo(x, old, a, c):
    w = (x - old).sum().exp().detach()
    out = []
    for each, log_prob in zip(a, x, strict=True):
        k, lam = (
            (c.vespo_k_positive, c.vespo_lambda_positive)
            if each >= 0
            else (c.vespo_k_negative, c.vespo_lambda_negative)
        )
        out.append(-math.exp(lam) * w**k * torch.exp(-lam * w) * each * log_prob)
    return torch.stack(out)


PAPERS = {"gspo": gspo, "gspo_token": gspo_token, "gmpo": gmpo, "vespo": vespo}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("policy", sorted(PAPERS))
def test_the_papers_formula(policy, packed):
    config = pf.LossConfig(policy=policy, clip_low=0.03, clip_high=0.05, reduction="seq-mean-token-mean")
    x, mask = batch()
    terms = [
        PAPERS[policy](x["log_prob"][i, :n], x["old_log_prob"][i, :n], x["advantages"][i, :n], config).mean()
        for i, n in enumerate(LENGTHS)
        if n > 0
    ]
    truth = torch.stack(terms).mean()
    (wanted,) = torch.autograd.grad(truth, x["log_prob"])
    if packed:
        cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])
        flat = [x[k][mask] for k in ("log_prob", "old_log_prob", "advantages")]
        out = pf.ppo_loss(*flat, config, cu_seqlens=cu_seqlens)
        (got,) = torch.autograd.grad(out.loss, x["log_prob"])
    else:
        out, got = policy_of(config, x, mask)
    torch.testing.assert_close(out.loss, truth, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-14)
    assert (got[~mask] == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_clip_cov_leaves_out_its_share_of_the_candidates(reduction):
    x, mask = batch(3)
    n = int(mask.sum())
    config = pf.LossConfig(policy="clip_cov", cov_low=0.0, cov_high=3.0, cov_ratio=0.2, reduction=reduction)
    plain, grad = policy_of(replace(config, policy="ppo"), x, mask)
    a, p = x["advantages"][mask], x["log_prob"].detach()[mask]
    cov = torch.full((B, T), -math.inf, dtype=torch.float64)
    cov[mask] = (a - a.mean()) * (p - p.mean())
    candidates = (cov > 0.0) & (cov < 3.0) & (grad != 0)
    assert candidates.sum() > int(0.2 * n)
    chosen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        out, got = policy_of(config, x, mask)
        left_out = (got == 0) & (grad != 0)
        assert left_out.sum() == int(0.2 * n) and not (left_out & ~candidates).any()
        torch.testing.assert_close(got, torch.where(left_out, 0.0, grad))
        chosen |= set(left_out.flatten().nonzero().flatten().tolist())
        torch.testing.assert_close(out.stats.vector[5:], plain.stats.vector[5:], equal_nan=True)
    assert len(chosen) == candidates.sum()  # each at some time


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("share", "how_many"), [(1e-9, 1), (0.25, 4), (1.0, 18)])
def test_kl_cov_holds_the_tokens_of_largest_covariance(share, how_many, normalize):
    x, mask = batch(4)
    x["advantages"] = x["advantages"] + 3.0
    config = pf.LossConfig(policy="kl_cov", cov_ratio=share, cov_kl_coef=0.7, normalize_advantages=normalize)
    d = (x["log_prob"] - x["old_log_prob"])[mask]
    a, p = x["advantages"][mask], x["log_prob"].detach()[mask]
    a = (a - a.mean()) / (a.std() + 1e-8) if normalize else a
    cov = (a - a.mean()) * (p - p.mean())
    held = torch.zeros_like(a)
    held[cov.argsort(descending=True)[:how_many]] = 0.7
    truth = (-a * d.exp() + held * d.abs()).mean()
    out, got = policy_of(config, x, mask)
    torch.testing.assert_close(out.loss, truth, rtol=1e-13, atol=0)
    torch.testing.assert_close(out.stats.policy_loss, truth.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(got, torch.autograd.grad(truth, x["log_prob"])[0], rtol=1e-12, atol=1e-15)


# --- what lies around the policy --------------------------------------------------------------------------------------

FULL = pf.LossConfig(
    value_coef=0.3, entropy_coef=0.2, kl="k3", kl_coef=0.1, reduction="seq-mean-token-mean", cov_ratio=0.3
)


@pytest.mark.parametrize(
    "kl", [{}, {"kl_weight": "ratio"}, {"kl_weight": "score"}, {"kl_gradient": "k2"}, {"kl_coef": 0.0}]
)
@pytest.mark.parametrize("policy", sorted(SEQUENCE_POLICIES))
def test_kl_entropy_and_value_are_those_of_tokens(policy, kl):
    """They are the token loss's own: loss and gradient are the policy's alone, and the rest of reinforce with A = 0."""
    x, mask = batch(5)
    config = replace(FULL, policy=policy, **kl)
    leaves = [x["log_prob"], x["values"], x["entropy"]]
    del x["rollout_log_prob"]
    torch.manual_seed(0)
    out = pf.ppo_loss(**x, config=config, mask=mask)
    torch.manual_seed(0)
    policy_loss, policy_grad = policy_of(replace(config, kl=None), x, mask)
    rest = pf.ppo_loss(**{**x, "advantages": torch.zeros(B, T, dtype=torch.float64)},
                       config=replace(config, policy="reinforce"), mask=mask)  # fmt: skip
    torch.testing.assert_close(out.loss, policy_loss.loss + rest.loss, rtol=1e-12, atol=1e-14)
    got, wanted = torch.autograd.grad(out.loss, leaves), torch.autograd.grad(rest.loss, leaves, allow_unused=True)
    torch.testing.assert_close(got[0], policy_grad + (0.0 if wanted[0] is None else wanted[0]), rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(got[1:], wanted[1:])
    for name in ("value_loss", "entropy", "kl", "explained_variance", "value_clip_fraction"):
        torch.testing.assert_close(getattr(out.stats, name), getattr(rest.stats, name), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out.stats.policy_loss, policy_loss.loss.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("policy", sorted(SEQUENCE_POLICIES))
def test_statistics_are_of_the_policys_own_ratio(policy):
    x, mask = batch(6)
    config = pf.LossConfig(policy=policy, clip_low=0.05, clip_high=0.1)
    out, _ = policy_of(config, x, mask)
    ratios, low, high = [], [], []
    for i, n in enumerate(LENGTHS):
        d, a = (x["log_prob"] - x["old_log_prob"]).detach()[i, :n], x["advantages"][i, :n]
        own = d
        if policy in ("gspo", "gspo_token"):
            own = d.mean().expand(n)
        elif policy == "gmpo":
            own = torch.where(a >= 0, d.clamp(max=0.1), d.clamp(min=-0.05)).mean().expand(n)
        elif policy == "vespo":
            own = d.sum().expand(n)
        ratios.append(own)
        low.append(d < -0.05 if policy == "gmpo" else own.exp() < 0.95)
        high.append(d > 0.1 if policy == "gmpo" else own.exp() > 1.1)
    d, low, high = torch.cat(ratios), torch.cat(low).double().mean(), torch.cat(high).double().mean()
    assert 0 < low < 1 and 0 < high < 1
    r = d.exp()
    wanted = {"ratio_mean": r.mean(), "ratio_min": r.min(), "ratio_max": r.max(), "approx_kl": (r - 1 - d).mean(),
              "old_approx_kl": -d.mean(), "clip_fraction_low": low, "clip_fraction_high": high, "clip_fraction": low + high,
              "ess": r.sum() ** 2 / (len(r) * r.square().sum())}  # fmt: skip
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(out.stats, name), value, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("how", ["tis", "icepop"])
@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"clip_cov"}))
def test_rollout_correction_weighs_the_policy_term_of_each_token(policy, how):
    x, mask = batch(7)
    config = replace(FULL, policy=policy, rollout_low=0.8, rollout_high=1.2, kl=None)
    rho = (x["old_log_prob"] - x["rollout_log_prob"]).exp()
    rho = rho.clamp(max=1.2) if how == "tis" else torch.where((rho >= 0.8) & (rho <= 1.2), rho, 0.0)
    n = torch.tensor(LENGTHS)[:, None]
    weights = torch.where(mask, rho / (n.clamp(min=1) * (n > 0).sum()), 0.0)
    a = pf.ppo_loss(x["log_prob"], x["old_log_prob"], x["advantages"], replace(config, rollout_correction=how), mask=mask,
                    rollout_log_prob=x["rollout_log_prob"])  # fmt: skip
    b = pf.ppo_loss(x["log_prob"], x["old_log_prob"], x["advantages"], config, mask=mask, weights=weights)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-12, atol=1e-14)
    first, second = (torch.autograd.grad(out.loss, x["log_prob"])[0] for out in (a, b))
    torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-15)


# --- laws -------------------------------------------------------------------------------------------------------------


def test_on_policy_gradients_are_reinforces():
    """Where r = 1, every policy that only weighs or clips the ratio has the gradient -A of reinforce."""
    x, mask = batch(8)
    x["old_log_prob"] = x["log_prob"].detach()
    config = pf.LossConfig(reduction="seq-mean-token-mean", sapo_tau_negative=3.0)
    _, wanted = policy_of(replace(config, policy="reinforce"), x, mask)
    for policy in ("ppo", "cispo", "sapo", "dppo_tv", "dppo_kl", "dro", "cpi", "gspo_token", "vespo", "kl_cov"):
        _, got = policy_of(replace(config, policy=policy), x, mask)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-15, msg=policy)
    x["advantages"] = x["advantages"][:, :1].expand(B, T)  # one a sequence: then through its mean too
    _, wanted = policy_of(replace(config, policy="reinforce"), x, mask)
    for policy in ("gspo", "gmpo"):
        _, got = policy_of(replace(config, policy=policy), x, mask)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-15, msg=policy)


@pytest.mark.parametrize("policy", ["gspo", "gspo_token"])
def test_one_token_a_sequence_is_ppo(policy):
    x, _ = batch(9)
    rows = {k: v.detach().reshape(-1, 1).requires_grad_(k == "log_prob") for k, v in x.items()}
    a, first = policy_of(pf.LossConfig(policy=policy), rows, None)
    b, second = policy_of(pf.LossConfig(), rows, None)
    torch.testing.assert_close((a.loss, first), (b.loss, second), rtol=1e-13, atol=1e-16)
    torch.testing.assert_close(a.stats.vector, b.stats.vector, rtol=1e-13, atol=1e-14, equal_nan=True)


def test_gspo_of_one_advantage_a_sequence_has_its_token_forms_gradient():
    """Under means of means: the mean of the tokens' gradients is the gradient through the mean."""
    x, mask = batch(10)
    x["advantages"] = x["advantages"][:, :1].expand(B, T)
    config = pf.LossConfig(policy="gspo", reduction="seq-mean-token-mean", clip_low=0.02, clip_high=0.02)
    torch.testing.assert_close(
        policy_of(config, x, mask)[1], policy_of(replace(config, policy="gspo_token"), x, mask)[1]
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"clip_cov", "kl_cov"}))  # those two choose among the batch
def test_a_batch_split_with_global_denominators_has_the_same_gradient(policy, reduction):
    x, mask = batch(11)
    del x["rollout_log_prob"]
    config = replace(FULL, policy=policy, reduction=reduction, kl_weight="ratio", dro_beta=0.4)
    leaves = ("log_prob", "values", "entropy")
    whole = pf.ppo_loss(**x, config=config, mask=mask)
    wanted = torch.autograd.grad(whole.loss, [x[k] for k in leaves])
    count = {"token-mean": sum(LENGTHS), "sum": 1}.get(reduction, sum(n > 0 for n in LENGTHS))
    total, parts = 0.0, []
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        y = {k: v.detach()[rows].requires_grad_(k in leaves) for k, v in x.items()}
        out = pf.ppo_loss(**y, config=config, mask=mask[rows], denominator=float(count))
        total += out.loss.item()
        parts.append(torch.autograd.grad(out.loss, [y[k] for k in leaves]))
    assert total == pytest.approx(whole.loss.item(), rel=1e-13)
    for got, truth in zip(zip(*parts, strict=True), wanted, strict=True):
        torch.testing.assert_close(torch.cat(got), truth, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_behind_the_mask_is_read(policy, dtype):
    x, mask = batch(12, dtype)
    config = replace(FULL, policy=policy, kl_weight="ratio", rollout_correction="tis", normalize_advantages=True)
    leaves = ("log_prob", "values", "entropy")

    def run(x):
        torch.manual_seed(0)
        out = pf.ppo_loss(**x, config=config, mask=mask)
        return [out.loss.detach(), out.stats.vector, *torch.autograd.grad(out.loss, [x[k] for k in leaves])]

    wanted = run(x)
    assert all(t.isfinite().all() for t in (wanted[0], *wanted[2:]))
    for poison in (math.nan, math.inf, -math.inf, 88.0):
        y = {k: torch.where(mask, v.detach(), poison).to(dtype).requires_grad_(k in leaves) for k, v in x.items()}
        got = run(y)
        assert same_bits(wanted, got)
        assert all((g[~mask] == 0).all() for g in got[2:])


@pytest.mark.parametrize("policy", POLICIES)
def test_empty_and_all_masked(policy):
    config = replace(FULL, policy=policy)
    for shape, mask in (((0,), None), ((3, 4), torch.zeros(3, 4))):
        x = torch.zeros(shape, requires_grad=True)
        stored = {k: torch.full(shape, math.nan) for k in ("old_log_prob", "advantages", "ref_log_prob")}
        out = pf.ppo_loss(x, **stored, config=config, mask=mask)
        out.loss.backward()
        assert out.loss.item() == 0.0 and torch.equal(x.grad, torch.zeros(shape))
        assert all(v == 0 or math.isnan(v) for v in out.stats.to_dict().values())


@pytest.mark.parametrize("where", ["log_prob", "old_log_prob", "advantages"])
@pytest.mark.parametrize("policy", TOKEN_POLICIES)
def test_nan_in_a_valid_element_shows(policy, where):
    x, _ = batch(13, torch.float32)
    if (policy, where) == ("reinforce", "old_log_prob"):  # which does not read it
        return
    x[where] = torch.where(torch.arange(T) == 3, math.nan, x[where].detach()).requires_grad_(where == "log_prob")
    assert policy_of(pf.LossConfig(policy=policy), x, None)[0].loss.isnan()


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"clip_cov"}))
def test_gradcheck(policy):
    """But of sg: what is constant in the formula is no derivative that differences could find."""
    x, mask = batch(14)
    config = replace(FULL, policy=policy, log_ratio_clamp=0.5, clip_low=0.11, clip_high=0.12, kl_weight="ratio")
    constant = policy in ("cispo", "dppo_tv", "dppo_kl", "gspo_token", "vespo")

    def loss(log_prob):
        y = {**x, "log_prob": log_prob}
        return pf.ppo_loss(y["log_prob"], y["old_log_prob"], y["advantages"], config, mask=mask,
                           ref_log_prob=y["ref_log_prob"]).loss  # fmt: skip

    if not constant:
        assert torch.autograd.gradcheck(loss, (x["log_prob"],))
    (plain,) = torch.autograd.grad(
        loss(x["log_prob"]), x["log_prob"]
    )  # the kernel's; below, the reference's derivatives
    with pf.use_backend("reference"):
        (truth,) = torch.autograd.grad(loss(x["log_prob"]), x["log_prob"], create_graph=True)
    (grad,) = torch.autograd.grad(loss(x["log_prob"]), x["log_prob"], create_graph=True)
    torch.testing.assert_close(plain, truth.detach(), rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(grad, truth, rtol=1e-11, atol=1e-15)
    v = torch.randn(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, second = (torch.autograd.grad((g * v).sum(), x["log_prob"])[0] for g in (grad, truth))
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("policy", ["cispo", "dro", "dppo_kl", "gmpo"])
def test_ties_and_edges(policy):
    """On a bound of the clip range a token is inside it."""
    config = pf.LossConfig(policy=policy, clip_low=0.5, clip_high=1.0, log_ratio_clamp=math.log(2.0), dro_beta=2.0)
    x = torch.tensor([[-1.0]], dtype=torch.float64)

    def gradient(d, a):
        leaf = x.clone().requires_grad_()
        out = pf.ppo_loss(leaf, x - d, torch.tensor([[a]], dtype=torch.float64), config)
        return torch.autograd.grad(out.loss, leaf)[0].item()

    if policy == "cispo":
        assert gradient(math.log(2.0), 3.0) == pytest.approx(-6.0) and gradient(0.0, 3.0) == -3.0
        assert gradient(-5.0, 3.0) == -1.5  # both sides, whatever the sign of A, and past the log-ratio clamp
        assert gradient(-5.0, -3.0) == 1.5 and gradient(5.0, -3.0) == pytest.approx(6.0)
    elif policy == "dro":
        assert gradient(0.5, 3.0) == -3.0 + 2.0 * 0.5
        assert gradient(5.0, 3.0) == -3.0  # the penalty is clamped, reinforce is not
    elif policy == "dppo_kl":
        assert gradient(0.0, 3.0) == -3.0
    else:
        wide = replace(config, clip_low=0.25, clip_high=0.5, log_ratio_clamp=None)
        config = wide
        assert gradient(0.5, 3.0) == pytest.approx(-3.0 * math.exp(0.5))  # the edge passes
        assert gradient(0.6, 3.0) == 0.0 and gradient(0.6, -3.0) == pytest.approx(3.0 * math.exp(0.6))
        assert gradient(-0.3, -3.0) == 0.0 and gradient(-0.3, 3.0) == pytest.approx(-3.0 * math.exp(-0.3))


@pytest.mark.parametrize("policy", ["dppo_tv", "dppo_kl"])
def test_dppo_leaves_out_what_moved_too_far_the_wrong_way(policy):
    q, config = 0.5, pf.LossConfig(policy=policy, clip_low=0.1, clip_high=0.2, ratio_cap=1.3)
    for p in (0.05, 0.3, 0.45, 0.55, 0.65, 0.75, 0.95):
        kl = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
        for a in (2.0, -2.0):
            if policy == "dppo_tv":
                out = p - q > 0.2 if a > 0 else p - q < -0.1
            else:
                out = (kl > 0.2 and p > q) if a > 0 else (kl > 0.1 and p < q)
            x = torch.tensor([math.log(p)], dtype=torch.float64, requires_grad=True)
            loss = pf.ppo_loss(x, torch.tensor([math.log(q)], dtype=torch.float64), torch.tensor([a]).double(), config)
            wanted = 0.0 if out else -a * min(p / q, 1.3)
            assert torch.autograd.grad(loss.loss, x)[0].item() == pytest.approx(wanted, rel=1e-12)
            assert loss.loss.item() == pytest.approx(wanted * math.log(p), rel=1e-12)
            sides = (loss.stats.clip_fraction_low.item(), loss.stats.clip_fraction_high.item())
            assert sides == (float(out and a < 0), float(out and a > 0)) and loss.stats.clip_fraction.item() == sum(
                sides
            )


@pytest.mark.parametrize("d", [100.0, -200.0, math.inf, -math.inf])
@pytest.mark.parametrize("policy", ["sapo", "cispo", "dppo_tv"])
def test_ratios_that_overflow_have_finite_gradients(policy, d):
    for backend in ("cpu", "reference"):
        x = torch.tensor([-1.0], requires_grad=True)
        with pf.use_backend(backend):
            out = pf.ppo_loss(
                x, torch.tensor([-1.0 - d]), torch.tensor([2.0]), pf.LossConfig(policy=policy, ratio_cap=3.0)
            )
        assert torch.autograd.grad(out.loss, x)[0].isfinite() and out.loss.isfinite()


# --- through the other ops and doors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", sorted(SEQUENCE_POLICIES))
def test_the_fused_losses_take_them_too(policy):
    """From logits and from a normal's parameters, gathered by an index: the same as log-prob, then ppo_loss."""
    x, mask = batch(15)
    config = replace(FULL, policy=policy, clip_low=0.3)
    logits = torch.randn(B, T, 6, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(0, 6, (B, T))
    mean, log_std = torch.randn(B, T, 3, dtype=torch.float64, requires_grad=True), torch.zeros(3, dtype=torch.float64)
    taken = torch.randn(B, T, 3, dtype=torch.float64)
    stored = {k: x[k] for k in ("old_log_prob", "advantages", "returns", "ref_log_prob")}
    rest = {"values": x["values"], "mask": mask, **stored, "config": config}
    for fused, parts, leaf in (
        (
            lambda: pf.categorical_ppo_loss(logits, actions, **rest),
            lambda: pf.categorical_log_prob(logits, actions),
            logits,
        ),
        (
            lambda: pf.normal_ppo_loss(mean, log_std, taken, **rest),
            lambda: pf.normal_log_prob(mean, log_std, taken),
            mean,
        ),
    ):
        torch.manual_seed(0)
        out = fused()
        log_prob, entropy = parts()
        torch.manual_seed(0)
        wanted = pf.ppo_loss(log_prob, entropy=entropy, **rest)
        torch.testing.assert_close(out.loss, wanted.loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(out.stats.vector, wanted.stats.vector, rtol=1e-12, atol=1e-13, equal_nan=True)
        pair = [torch.autograd.grad(o.loss, [leaf, x["values"]]) for o in (out, wanted)]
        torch.testing.assert_close(*pair, rtol=1e-11, atol=1e-15)
    index = torch.randperm(B * T).view(B, T)
    torch.manual_seed(0)
    gathered = {k: v.flatten()[index] for k, v in {**stored, "mask": mask}.items()}
    wanted = pf.categorical_ppo_loss(logits, actions.flatten()[index], **{**rest, **gathered})
    torch.manual_seed(0)
    out = pf.categorical_ppo_loss(logits, actions, **rest, index=index)
    torch.testing.assert_close(out.loss, wanted.loss)
    with pytest.raises(ValueError, match=r"categorical_ppo_loss: index must be in \[0, 45\)"):
        pf.categorical_ppo_loss(logits, actions, **rest, index=index - 1)


@pytest.mark.parametrize("policy", ["gspo", "gmpo", "sapo", "dppo_kl"])
def test_compiled(policy):
    torch._dynamo.reset()
    x, mask = batch(16, torch.float32)
    del x["rollout_log_prob"]
    config = replace(FULL, policy=policy)
    leaves = [x["log_prob"], x["values"], x["entropy"]]

    def step(x):
        out = pf.ppo_loss(**x, config=config, mask=mask)
        return out.loss, out.stats.vector

    got, stats = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    wanted, vector = step(x)
    torch.testing.assert_close((got, stats), (wanted, vector))
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves))


def test_a_config_on_a_device_may_be_set():
    x, mask = batch(17)
    del x["rollout_log_prob"]
    for policy in sorted(set(POLICIES) - {"clip_cov"}):
        config = replace(FULL, policy=policy)
        on = config.on("cpu")
        pf.ppo_loss(**x, config=on, mask=mask)
        changed = dict(clip_low=0.01, clip_high=0.02, kl_coef=0.5, dro_beta=0.1, sapo_tau_positive=0.5)
        on.set(**changed)
        for backend in ("cpu", "reference"):
            with pf.use_backend(backend):
                got, wanted = (pf.ppo_loss(**x, config=c, mask=mask) for c in (on, replace(config, **changed)))
            torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-13, atol=0)
            torch.testing.assert_close(got.stats.vector, wanted.stats.vector, rtol=1e-13, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("change", [
    (dict(old_log_prob=torch.zeros(B, 1)), ValueError, r"old_log_prob must be the shape of log_prob = \[5, 9\], got \[5, 1\]"),
    (dict(advantages=None), TypeError, "advantages must be a tensor, got None"),
    (dict(advantages=torch.zeros(B, T, dtype=torch.int64)), TypeError, "advantages must be float32.*, got int64"),
    (dict(mask=torch.ones(T)), ValueError, "mask must be the shape of log_prob"),
    (dict(old_log_prob=torch.zeros(B, T, requires_grad=True)), ValueError, "old_log_prob gets no gradient but requires one"),
    (dict(ref_log_prob=None), TypeError, r"ref_log_prob must be a tensor with LossConfig\(kl=...\), got None"),
    (dict(config=replace(FULL, policy="gspo", rollout_correction="tis")), TypeError, "rollout_log_prob must be a tensor"),
    (dict(log_prob=[0.0]), TypeError, "log_prob must be a tensor, got list"),
    (dict(returns=None), TypeError, "returns must be a tensor with values"),
])  # fmt: skip
def test_errors_name_the_argument(change):
    fields, error, message = change
    x, mask = batch(18, torch.float32)
    del x["rollout_log_prob"]
    with pytest.raises(error, match=f"ppo_loss: .*{message}"):
        pf.ppo_loss(**{**x, "mask": mask, "config": replace(FULL, policy="gspo"), **fields})
