"""Advantages without a critic, and rewards made of scores and KL: what language-model trainers do around the loss.

Plain torch. Every estimator takes `rewards` of one response a row, in one of two forms:

- scores [B]: one number a response. Returns advantages [B].
- token rewards [B, T] with `mask` [B, T] (absent: all valid). A response's score is the sum over its valid tokens, and its
  advantage stands at each of them; 0 elsewhere. What lies under the mask is not read.

`group` names the responses to one prompt: an integer G (consecutive rows, G each) or integer ids [B] in any order. With
score s_i, its group's size n, mean μ and standard deviation σ. A group of one has no baseline and no deviation: its score is
the advantage, as in verl (NeMo-RL: 0; TRL refuses). Scores are constants; results are float32 (float64 for float64).

`gae` with a critic is `ppo_fast.gae`; `length_adaptive_lambda` makes its `lam`, `token_rewards` its rewards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ops.discounted_returns import discounted_returns
from .ops.whiten import whiten

Group = int | Tensor


def grpo(rewards: Tensor, group: Group, mask: Tensor | None = None, *, eps: float = 1e-4, ddof: int = 1) -> Tensor:
    """A_i = (s_i - μ)/(σ + eps) (Shao et al. 2024, arXiv 2402.03300).

    `eps`: TRL 1e-4, verl 1e-6, OpenRLHF 1e-9. `ddof` 1 is torch.std, which all three take; the paper leaves it open.
    """
    return _spread(_Groups(_scores(rewards, mask, "grpo"), group, "grpo").normalized(eps, ddof), rewards, mask)


def dr_grpo(rewards: Tensor, group: Group, mask: Tensor | None = None) -> Tensor:
    """A_i = s_i - μ (Liu et al. 2025, arXiv 2503.20783). Its loss divides by a constant length: the loss's `denominator`."""
    return _spread(_Groups(_scores(rewards, mask, "dr_grpo"), group, "dr_grpo").centred(), rewards, mask)


def rloo(rewards: Tensor, group: Group, mask: Tensor | None = None) -> Tensor:
    """A_i = s_i - mean of the others' scores = n/(n - 1)·(s_i - μ) (Ahmadian et al. 2024, arXiv 2402.14740)."""
    groups = _Groups(_scores(rewards, mask, "rloo"), group, "rloo")
    return _spread(groups.centred() * groups.count / (groups.count - 1).clamp(min=1), rewards, mask)


def leave_one_out(rewards: Tensor, group: Group, mask: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """A_i = (s_i - μ_{-i})/(σ_{-i} + eps), both of the others in its group, σ unbiased; not divided where σ_{-i} is 0 or
    n < 3 (NeMo-RL's GRPO, nemo_rl/algorithms/utils.py; its eps is 1e-6)."""
    scores = _scores(rewards, mask, "leave_one_out")
    groups = _Groups(scores.double(), group, "leave_one_out")
    others = (groups.count - 1).clamp(min=1)
    d = groups.centred()
    # of the others: mean is -d_i/(n - 1), Σ (d_j - mean)² is Σ_all d² - d_i²·n/(n - 1), which cancels: float64
    squares = groups.sum(d.square()) - d.square() * groups.count / others
    squares = squares.clamp(min=0.0) * (squares > 1e-12 * groups.sum(d.square()))  # what cancelled is 0
    std = (squares / (groups.count - 2).clamp(min=1)).sqrt()
    advantages = d * groups.count / others
    advantages = torch.where((std > 0) & (groups.count > 2), advantages / (std + eps), advantages)
    return _spread(advantages.to(scores.dtype), rewards, mask)


def opo(rewards: Tensor, group: Group, mask: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
    """A_i = s_i - Σ_j l_j·s_j / Σ_j l_j, weighted by response length (Hao et al. 2025, arXiv 2505.23585).

    `lengths` [B] in tokens: needed with scores [B]; otherwise those of the mask.
    """
    if lengths is None:
        if rewards.ndim != 2:
            raise TypeError("opo: lengths must be given with scores [B]")
        lengths = (torch.ones_like(rewards) if mask is None else (mask != 0)).sum(-1)
    groups = _Groups(_scores(rewards, mask, "opo"), group, "opo")
    if lengths.shape != groups.d.shape:
        raise ValueError(f"opo: lengths must be [B] = {list(groups.d.shape)}, got {list(lengths.shape)}")
    weights = lengths.to(groups.d.dtype)
    baseline = groups.sum(weights * groups.d) / groups.sum(weights).clamp(min=1.0)
    return _spread(groups.alone(groups.d - baseline), rewards, mask)


def reinforce_plus_plus(
    rewards: Tensor, group: Group | None = None, mask: Tensor | None = None, *, gamma: float = 1.0, eps: float = 1e-8,
    process_group: Any = None,
) -> Tensor:  # fmt: skip
    """The discounted reward-to-go, whitened over all valid tokens of the batch: (G - mean)/√(var + eps), no groups (Hu 2025,
    arXiv 2501.03262; verl, OpenRLHF: eps 1e-8). Scores [B] are whitened over the batch. `group` is not used. The batch is that
    of all ranks of `process_group`."""
    if rewards.ndim == 1:
        scores = _scores(rewards, mask, "reinforce_plus_plus")
        return whiten(scores, eps=eps, eps_in_variance=True, group=process_group)
    _scores(rewards, mask, "reinforce_plus_plus")  # its checks
    returns = discounted_returns(rewards, mask=mask, gamma=gamma, time_dim=1)
    return whiten(returns, mask=mask, eps=eps, eps_in_variance=True, group=process_group)


def reinforce_plus_plus_baseline(
    rewards: Tensor, group: Group, mask: Tensor | None = None, *, eps: float = 1e-8, process_group: Any = None
) -> Tensor:
    """s_i - μ, at each valid token, whitened over all valid tokens of the batch (Hu 2025, arXiv 2501.03262; verl, OpenRLHF),
    which is that of all ranks of `process_group`."""
    return whiten(dr_grpo(rewards, group, mask), mask=mask, eps=eps, eps_in_variance=True, group=process_group)


def remax(rewards: Tensor, baselines: Tensor, mask: Tensor | None = None) -> Tensor:
    """A = reward-to-go - baseline, the score [B] of the greedy response to the same prompt (Li et al. 2023, arXiv 2310.10505).

    Of scores [B]: s_i - baseline_i.
    """
    scores = _scores(rewards, mask, "remax")
    if baselines.shape != scores.shape:
        raise ValueError(f"remax: baselines must be [B] = {list(scores.shape)}, got {list(baselines.shape)}")
    if rewards.ndim == 1:
        return scores - baselines.detach()
    to_go = discounted_returns(rewards, mask=mask, gamma=1.0, time_dim=1) - baselines.detach()[:, None]
    return to_go if mask is None else torch.where(mask != 0, to_go, 0.0)


#: Estimators by the name that a configuration may use; `remax` needs greedy responses and is not among them.
ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (grpo, dr_grpo, rloo, leave_one_out, opo, reinforce_plus_plus, reinforce_plus_plus_baseline)
}


def length_adaptive_lambda(lengths: Tensor, alpha: float = 0.05) -> Tensor:
    """λ_i = 1 - 1/(alpha·l_i), at least 0, for responses of l_i tokens [B] (VAPO, Yue et al. 2025, arXiv 2504.05118; α 0.05).

    Σ_t λ^t = alpha·l: the trace spans the same share of a response whatever its length. For `gae(..., lam=λ, time_dim=1)`.
    """
    if not alpha > 0:
        raise ValueError(f"length_adaptive_lambda: alpha must be > 0, got {alpha}")
    lengths = lengths if lengths.is_floating_point() else lengths.float()
    return (1.0 - 1.0 / (alpha * lengths.clamp(min=1.0))).clamp(min=0.0)


def kl_estimate(log_prob: Tensor, ref_log_prob: Tensor, estimator: str = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference), nats. With u = ref_log_prob - log_prob: k1 = -u, abs = |u|, k2 = u²/2,
    k3 = exp(u) - u - 1 (joschu.net/blog/kl-approx.html)."""
    u = ref_log_prob - log_prob
    if estimator == "k1":
        return -u
    if estimator == "abs":
        return u.abs()
    if estimator == "k2":
        return 0.5 * u.square()
    if estimator == "k3":
        return torch.expm1(u) - u
    raise ValueError(f"kl_estimate: estimator must be one of k1, abs, k2, k3, got {estimator!r}")


def token_rewards(
    scores: Tensor, log_prob: Tensor, ref_log_prob: Tensor, mask: Tensor, kl_coef: float, estimator: str = "k1"
) -> Tensor:
    """r_t = -kl_coef·kl_t, plus the response's score at its last valid token (Ziegler et al. 2019, arXiv 1909.08593).

    Args:
        scores: [B], of whole responses.
        log_prob, ref_log_prob: [B, T], nats, of the policy that sampled and of the reference.
        mask: [B, T]; where 0 nothing is read and the reward is 0. A response without a valid token has no reward at all.
        kl_coef: reward per nat.
        estimator: of `kl_estimate`.

    Returns: [B, T], float32 (float64 where log_prob is), no gradient.
    """
    if mask.ndim != 2 or log_prob.shape != mask.shape or ref_log_prob.shape != mask.shape:
        shapes = [list(x.shape) for x in (log_prob, ref_log_prob, mask)]
        raise ValueError(f"token_rewards: log_prob, ref_log_prob and mask must be [B, T], got {shapes}")
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"token_rewards: scores must be [B] = [{len(mask)}], got {list(scores.shape)}")
    dtype = torch.float64 if log_prob.dtype is torch.float64 else torch.float32
    valid = mask != 0
    log_prob, ref_log_prob = (torch.where(valid, x.detach().to(dtype), 0.0) for x in (log_prob, ref_log_prob))
    position = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(valid, position, -1).amax(1, keepdim=True) if mask.shape[1] else position[None, :0]
    rewards = -kl_coef * kl_estimate(log_prob, ref_log_prob, estimator)
    return torch.where(position == last, rewards + scores.detach().to(dtype)[:, None], rewards)


@dataclass
class FixedKL:
    """A KL coefficient that stays."""

    coef: float

    def update(self, kl: float, n: int) -> None:
        """After `n` responses with a mean KL of `kl` nats a response."""


@dataclass
class AdaptiveKL:
    """Steers the KL to `target` nats a response: β ← β·(1 + clip(kl/target - 1, ±0.2)·n/horizon) after n responses
    (Ziegler et al. 2019, arXiv 1909.08593 §2.2; the horizon of their code, in responses, is 10,000)."""

    coef: float
    target: float
    horizon: float = 10_000.0

    def __post_init__(self) -> None:
        if not (self.target > 0 and self.horizon > 0):
            raise ValueError(f"AdaptiveKL: target and horizon must be > 0, got {self.target} and {self.horizon}")

    def update(self, kl: float, n: int) -> None:
        """After `n` responses with a mean KL of `kl` nats a response."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * n / self.horizon


def _scores(rewards: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """[B] in the compute dtype."""
    if rewards.ndim not in (1, 2):
        raise ValueError(f"{name}: rewards must be [B] or [B, T], got {list(rewards.shape)}")
    if mask is not None and (rewards.ndim == 1 or mask.shape != rewards.shape):
        raise ValueError(f"{name}: mask must be [B, T] beside rewards [B, T], got {list(mask.shape)}")
    x = rewards.detach().to(torch.float64 if rewards.dtype is torch.float64 else torch.float32)
    if x.ndim == 1:
        return x
    return (x if mask is None else torch.where(mask != 0, x, 0.0)).sum(-1)


def _spread(advantages: Tensor, rewards: Tensor, mask: Tensor | None) -> Tensor:
    if rewards.ndim == 1:
        return advantages
    advantages = advantages[:, None].expand(rewards.shape)
    return advantages.clone() if mask is None else torch.where(mask != 0, advantages, 0.0)


class _Groups:
    """Sums over groups, back at every member. Scores are taken from the first of their group on, which changes no deviation
    and makes equal scores differ by exactly 0."""

    def __init__(self, scores: Tensor, group: Group, name: str) -> None:
        n = len(scores)
        index = torch.arange(n, device=scores.device)
        if isinstance(group, int):
            if group < 1 or n % group:
                raise ValueError(f"{name}: group must divide the {n} responses, got {group}")
            self.ids = index // group
        else:
            if group.shape != scores.shape or group.is_floating_point():
                raise ValueError(f"{name}: group must be integers [B] = [{n}], got {group.dtype} {list(group.shape)}")
            self.ids = group.unique(return_inverse=True)[1]
        first = torch.full_like(index, n).scatter_reduce(0, self.ids, index, "amin")[self.ids]
        self.scores, self.d = scores, scores - scores[first]
        self.count = self.sum(torch.ones_like(scores))

    def sum(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, self.ids, x)[self.ids]

    def alone(self, advantages: Tensor) -> Tensor:
        """A group of one keeps its score."""
        return torch.where(self.count > 1, advantages, self.scores)

    def centred(self) -> Tensor:
        """s - μ."""
        return self.alone(self.d - self.sum(self.d) / self.count)

    def normalized(self, eps: float, ddof: int) -> Tensor:
        d = self.d - self.sum(self.d) / self.count
        std = (self.sum(d.square()) / (self.count - ddof).clamp(min=1)).sqrt()
        return self.alone(d / (std + eps))
