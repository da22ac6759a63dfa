"""Policies of whole sequences and of the batch: the log-probs, old log-probs and advantages that make a token policy of
them, so that every backend has them without a kernel of their own. Formulas and sources: `LossConfig`.

The token policy sees the policy's own ratio, so the statistics are of that ratio: of a sequence's mean ("gspo",
"gspo_token"), of the mean of its clipped log-ratios ("gmpo"), of the product w ("vespo"), of tokens ("clip_cov", "kl_cov").
KL, entropy and value terms keep the token's own log-prob: the KL is a second call of the token loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import NUMBERS, SEQUENCE_POLICIES, STATS, LossConfig
from .outputs import PPOLoss, Stats
from .reductions import Sequences, normalized, token_weights


class Term(NamedTuple):
    """What the token policy is given, in the shape of the tokens, and what it cannot know."""

    log_prob: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    extra: Tensor | None = None  # a loss per token beside it, under the same weights
    outside: tuple[Tensor, Tensor] | None = None  # tokens clipped low and high, where its own ratio does not tell


class Tokens(NamedTuple):
    """Streams of the policy, 0 where masked out."""

    log_prob: Tensor
    old_log_prob: Tensor  # constant, as the next
    advantages: Tensor
    valid: Tensor | None
    rows: Sequences
    config: LossConfig

    @property
    def log_ratio(self) -> Tensor:
        return self.log_prob - self.old_log_prob

    def number(self, name: str) -> Any:
        """Of the config: read from the device where a captured graph shall read it again."""
        there = self.config.device_numbers
        if there is None or there.device != self.log_prob.device:
            return getattr(self.config, name)
        return there[NUMBERS.index(name)].to(self.log_prob.dtype)

    @property
    def count(self) -> Any:
        """Valid tokens, at least 1."""
        n = self.log_prob.numel()
        return max(n, 1) if self.valid is None else self.valid.sum().double().clamp(min=1.0)

    def largest(self, key: Tensor) -> Tensor:
        """The share `cov_ratio` of all valid tokens, at least one, whose key is largest; none whose key is -inf."""
        order = key.flatten().argsort(descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=key.device)).view_as(key)
        return ((rank == 0) | (rank + 1 <= self.count * self.config.cov_ratio)) & (key > -math.inf)

    def covariance(self) -> Tensor:
        """(A - mean A)·(x - mean x) per token, -inf where masked out."""
        x = self.log_prob.detach()
        cov = (self.advantages - self.advantages.sum() / self.count) * (x - x.sum() / self.count)
        return cov if self.valid is None else torch.where(self.valid, cov, -math.inf)


def _gspo(t: Tokens) -> Term:
    return Term(t.rows.mean(t.log_ratio, t.valid), torch.zeros_like(t.log_prob), t.advantages)


def _gspo_token(t: Tokens) -> Term:
    sequence = t.rows.mean(t.log_ratio.detach(), t.valid)
    log_ratio = (sequence + (t.log_prob - t.log_prob.detach())).clamp(max=10.0)
    return Term(log_ratio, torch.zeros_like(t.log_prob), t.advantages)


def _gmpo(t: Tokens) -> Term:
    d, low, high = t.log_ratio, -t.number("clip_low"), t.number("clip_high")
    held = torch.where(t.advantages >= 0, d.clamp(max=high), d.clamp(min=low))
    log_ratio = t.rows.mean(held, t.valid)
    return Term(log_ratio, torch.zeros_like(d), t.advantages, outside=(d.detach() < low, d.detach() > high))


def _vespo(t: Tokens) -> Term:
    c, positive = t.config, t.advantages >= 0
    log_w = t.rows.spread(t.rows.total(t.log_ratio.detach().clamp(-20.0, 20.0))).clamp(math.log(1e-8), 20.0)
    k = torch.full_like(log_w, c.vespo_k_negative).masked_fill(positive, c.vespo_k_positive)
    lam = torch.full_like(log_w, c.vespo_lambda_negative).masked_fill(positive, c.vespo_lambda_positive)
    phi = (lam + k * log_w - lam * log_w.exp()).exp()
    return Term(t.log_prob, t.log_prob.detach() - log_w, phi * t.advantages)


def _clip_cov(t: Tokens) -> Term:
    ratio, cov = t.log_ratio.detach().exp(), t.covariance()
    clipped = ((t.advantages > 0) & (ratio > 1.0 + t.number("clip_high"))) | (
        (t.advantages < 0) & (ratio < 1.0 - t.number("clip_low"))
    )
    candidate = ~clipped & (cov > t.config.cov_low) & (cov < t.config.cov_high)
    left_out = t.largest(torch.where(candidate, torch.rand_like(cov), -math.inf))
    return Term(t.log_prob, t.old_log_prob, torch.where(left_out, 0.0, t.advantages))


def _kl_cov(t: Tokens) -> Term:
    penalty = torch.where(t.largest(t.covariance()), t.config.cov_kl_coef * t.log_ratio.abs(), 0.0)
    return Term(t.log_prob, t.old_log_prob, t.advantages, extra=penalty)


_TERMS: dict[str, Callable[[Tokens], Term]] = {
    "gspo": _gspo, "gspo_token": _gspo_token, "gmpo": _gmpo, "vespo": _vespo, "clip_cov": _clip_cov, "kl_cov": _kl_cov,
}  # fmt: skip
assert set(_TERMS) == set(SEQUENCE_POLICIES)


def sequence_loss(
    op: str,
    token_loss: Callable[..., PPOLoss],
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    config: LossConfig,
    *,
    rollout_log_prob: Tensor | None,
    ref_log_prob: Tensor | None,
    mask: Tensor | None,
    values: Tensor | None,
    entropy: Tensor | None,
    **rest: Any,
) -> PPOLoss:
    """`token_loss`, a `ppo_loss` of any backend, for a sequence policy; `op` is what messages say."""
    _check(op, log_prob, old_log_prob=old_log_prob, advantages=advantages, rollout_log_prob=rollout_log_prob, mask=mask)
    if config.kl is not None and ref_log_prob is None:
        raise TypeError(f"{op}: ref_log_prob must be a tensor with LossConfig(kl=...), got None")
    policy, kl = config.forms
    doubles = (x is not None and x.dtype == torch.float64 for x in (log_prob, values, entropy))
    dtype = torch.float64 if any(doubles) else torch.float32
    valid = None if mask is None else mask != 0

    def read(x: Tensor) -> Tensor:
        return x.to(dtype) if valid is None else torch.where(valid, x.to(dtype), 0.0)

    x, old, a = read(log_prob), read(old_log_prob).detach(), read(advantages).detach()
    if config.normalize_advantages:
        a = normalized(a, valid, config.advantage_ddof, config.advantage_eps)
        a = a if valid is None else torch.where(valid, a, 0.0)
    term = _TERMS[config.policy](Tokens(x, old, a, valid, Sequences(x, rest["cu_seqlens"]), config))
    rollout = None
    if config.rollout_correction is not None and rollout_log_prob is not None:  # keeps old - rollout as it was
        rollout = term.old_log_prob - (old - read(rollout_log_prob).detach())
    out = token_loss(
        term.log_prob, term.old_log_prob, term.advantages, policy, values=values, entropy=entropy, mask=mask,
        ref_log_prob=None, rollout_log_prob=rollout, **rest,
    )  # fmt: skip
    loss, changed = out.loss, {}
    with torch.no_grad():
        if term.outside is not None:
            keep = torch.ones_like(x, dtype=torch.bool) if valid is None else valid
            count = keep.sum().to(dtype).clamp(min=1.0)
            low, high = ((keep & side).sum() / count for side in term.outside)
            changed = {"clip_fraction": low + high, "clip_fraction_low": low, "clip_fraction_high": high}
    if term.extra is not None:
        weights, denominator, cu_seqlens = rest["weights"], rest["denominator"], rest["cu_seqlens"]
        w = token_weights(x, valid, config.reduction, weights, denominator, cu_seqlens)
        if rollout is not None:
            w = w * _rollout_factor(term.old_log_prob - rollout, config)
        extra = (w * term.extra).sum()
        loss = loss + extra
        changed["policy_loss"] = out.stats.policy_loss + extra.detach()
    if config.kl is not None:
        nothing = dict.fromkeys(("values", "old_values", "returns", "entropy", "rollout_log_prob"))
        estimate = token_loss(
            log_prob, old_log_prob, torch.zeros_like(advantages), kl, mask=mask, ref_log_prob=ref_log_prob,
            **{**rest, **nothing},
        )  # fmt: skip
        loss = loss + estimate.loss
        changed["kl"] = estimate.stats.kl
    vector = torch.stack([changed.get(name, out.stats.vector[i]) for i, name in enumerate(STATS)]) if changed else None
    return PPOLoss(loss, out.stats if vector is None else Stats(vector.to(out.stats.vector.dtype)))


def _rollout_factor(log_rho: Tensor, config: LossConfig) -> Tensor:
    rho = log_rho.exp()
    if config.rollout_correction == "tis":
        return rho.clamp(max=config.rollout_high)
    return torch.where((rho >= config.rollout_low) & (rho <= config.rollout_high), rho, 0.0)


def _check(op: str, log_prob: Tensor, **streams: Tensor | None) -> None:
    """What the arithmetic ahead of the kernels needs; they check the rest."""
    for name, x in {"log_prob": log_prob, **streams}.items():
        if x is None and name in ("mask", "rollout_log_prob"):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__ if x is not None else x}")
        if name != "mask" and not x.is_floating_point():
            raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {str(x.dtype)[6:]}")
        if x.shape != log_prob.shape:
            wanted = f"the shape of log_prob = {list(log_prob.shape)}"
            raise ValueError(f"{op}: {name} must be {wanted}, got {list(x.shape)}")
        if name in streams and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} gets no gradient but requires one; detach it or use torch.no_grad()")
