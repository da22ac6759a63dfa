"""Corrections for rollouts that another engine sampled: one factor per token for the advantages, and what it did."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .reductions import Sequences

_FAR = 20.0  # |log ρ| is held below it: exp(20) is large enough for any bound


class RolloutWeights(NamedTuple):
    """`weights`: [same shape as the log-probs], no gradient, 0 where masked out or rejected. `keep`: where neither.
    `stats`: 0-dim tensors by name."""

    weights: Tensor
    keep: Tensor
    stats: dict[str, Tensor]


@torch.no_grad()
def rollout_weights(
    old_log_prob: Tensor,
    rollout_log_prob: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    level: Literal["token", "sequence"] = "token",
    mode: Literal["truncate", "mask"] = "truncate",
    low: float = 0.0,
    high: float = 2.0,
    reject_on: Literal["k1", "k2", "k3"] | None = None,
    reject_by: Literal["token", "mean", "sum", "max"] | None = None,
    reject_threshold: float | tuple[float, float] | None = None,
    normalize: bool = False,
) -> RolloutWeights:
    """Importance weights of what the trainer's policy would have sampled against what the engine's did.

    Formula, with ρ_t = exp(old_log_prob - rollout_log_prob)::

        level    "token": ρ = ρ_t;  "sequence": ρ = Π_t ρ_t over the valid tokens of the sequence
        mode     "truncate": clamp(ρ, low, high), truncated importance sampling;  "mask": ρ inside [low, high], else 0 (IcePop;
                 by sequence: sequence masks)
        reject   0 besides where a divergence of the two policies is too large, with u = log ρ_t clamped to ±20:
                 k1 = -u outside [log low, log high], (low, high) = reject_threshold, a number c meaning (1/c, c);
                 k2 = u²/2, or k3 = e^u - 1 - u, above reject_threshold
        normalize divides by the mean weight before the rejection: of all valid tokens, or of all sequences

    Every policy loss but "dro" and "kl_cov" is linear in the advantage, and max, min and clip keep their order under a factor
    that is not negative: multiplying the advantages by these weights is multiplying the policy loss of each token, without
    touching KL, entropy and value. Normalise advantages before, not in the loss: their mean must not see the factor.

    Args:
        old_log_prob, rollout_log_prob: [B, T] or packed [M] with cu_seqlens [S + 1]; constants.
        mask: [same shape], valid where not 0; the rest is not read and weighs 0.
        low, high: bounds of ρ, 0 <= low <= high.
        reject_by: the divergence of a token, or its mean, sum or largest over the sequence, by which all of it is
            rejected. None: "token", or "mean" with level="sequence".

    Returns: `RolloutWeights(weights, keep, stats)`: float32 (float64 if an input is), bool, and 0-dim tensors: `mean`, `max`
        and `min` of the weights, `fraction_low` and `fraction_high` of valid tokens with ρ beyond a bound,
        `fraction_rejected`, `fraction_zero` of valid tokens that weigh nothing, `ess` = (Σ w)²/(n·Σ w²).

    A rejected token still counts in the denominators of a loss that has the old mask; with mask=keep it does not (verl).

    Errors: ValueError for a shape or a bound; |log ρ| is clamped to 20. No synchronisation with a GPU.

    Sources: fengyao.notion.site/off-policy-rl (TIS), arXiv 2510.18855 (IcePop); verl's rollout_corr_helper.py, TRL's
    vllm_importance_sampling_mode.
    """
    _check(old_log_prob, rollout_log_prob, mask, level, mode, low, high, reject_on, reject_by, reject_threshold)
    double = torch.float64 in (old_log_prob.dtype, rollout_log_prob.dtype)
    dtype = torch.float64 if double else torch.float32
    valid = torch.ones_like(old_log_prob, dtype=torch.bool) if mask is None else mask != 0
    u = torch.where(valid, old_log_prob.to(dtype) - rollout_log_prob.to(dtype), 0.0)
    rows = Sequences(u, cu_seqlens)

    log_rho = u if level == "token" else rows.spread(rows.total(u))
    rho = log_rho.clamp(-_FAR, _FAR).exp()
    below, above = valid & (rho < low), valid & (rho > high)
    weights = rho.clamp(low, high) if mode == "truncate" else torch.where(below | above, 0.0, rho)

    rejected = torch.zeros_like(valid)
    if reject_on is not None:
        u = u.clamp(-_FAR, _FAR)
        # what is masked out has divergence 0, the least that k2 and k3 can be
        k = -u if reject_on == "k1" else 0.5 * u.square() if reject_on == "k2" else torch.expm1(u) - u
        by = reject_by or ("token" if level == "token" else "mean")
        if by != "token":
            k = rows.mean(k, valid) if by == "mean" else rows.spread(rows.total(k) if by == "sum" else rows.largest(k))
        least, most = _bounds(reject_on, reject_threshold)
        rejected = valid & ((k < least) | (k > most))

    weights = torch.where(valid, weights, 0.0)
    if normalize:
        each = weights if level == "token" else rows.total(weights) / rows.total(valid.to(dtype)).clamp(min=1.0)
        n = valid.sum() if level == "token" else (rows.total(valid.to(dtype)) > 0).sum()
        mean = each.sum() / n.to(dtype).clamp(min=1.0)
        weights = weights / torch.where(mean > 0, mean, 1.0)
    keep = valid & ~rejected
    weights = torch.where(keep, weights, 0.0)
    return RolloutWeights(weights, keep, _statistics(weights, valid, below, above, rejected))


def _statistics(weights: Tensor, valid: Tensor, below: Tensor, above: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    n = valid.sum().to(weights.dtype).clamp(min=1.0)
    total, squares = weights.sum(), weights.square().sum()
    inf = torch.full_like(total, float("inf"))
    least = torch.where(valid, weights, inf).flatten()
    return {
        "mean": total / n,
        "max": torch.cat([weights.flatten(), torch.zeros_like(total)[None]]).amax(),
        "min": torch.where(valid.any(), torch.cat([least, inf[None]]).amin(), 0.0),
        "fraction_low": below.sum() / n,
        "fraction_high": above.sum() / n,
        "fraction_rejected": rejected.sum() / n,
        "fraction_zero": (valid & (weights == 0)).sum() / n,
        "ess": torch.where(squares > 0, total.square() / (n * squares), 0.0),
    }


def _bounds(reject_on: str, threshold: float | tuple[float, float] | None) -> tuple[float, float]:
    """Of the divergence."""
    assert threshold is not None
    if reject_on != "k1":
        assert not isinstance(threshold, tuple)
        return -float("inf"), threshold
    low, high = threshold if isinstance(threshold, tuple) else (1.0 / threshold, threshold)
    return math.log(low), math.log(high)


def _check(old_log_prob, rollout_log_prob, mask, level, mode, low, high, reject_on, reject_by, threshold) -> None:
    def wrong(what: str) -> ValueError:
        return ValueError(f"rollout_weights: {what}")

    shape = list(old_log_prob.shape)
    for name, x in (("rollout_log_prob", rollout_log_prob), ("mask", mask)):
        if x is not None and list(x.shape) != shape:
            raise wrong(f"{name} must be the shape of old_log_prob = {shape}, got {list(x.shape)}")
    for name, x, allowed in (
        ("level", level, ("token", "sequence")),
        ("mode", mode, ("truncate", "mask")),
        ("reject_on", reject_on, (None, "k1", "k2", "k3")),
        ("reject_by", reject_by, (None, "token", "mean", "sum", "max")),
    ):
        if x not in allowed:
            raise wrong(f"{name} must be one of {allowed}, got {x!r}")
    if not 0 <= low <= high:
        raise wrong(f"low and high must be 0 <= low <= high, got {low} and {high}")
    if reject_on == "k1" and reject_by == "max":
        raise wrong("reject_by must not be 'max' with k1, which has two bounds")
    if (reject_on is None) != (threshold is None):
        raise wrong(f"reject_threshold must be given with reject_on and only then, got {threshold}")
    pair = threshold if isinstance(threshold, tuple) else (threshold,)
    if threshold is not None and (not all(x > 0 for x in pair) or list(pair) != sorted(pair)):
        raise wrong(f"reject_threshold must be > 0, or (low, high) in order, got {threshold}")
    if len(pair) != (2 if reject_on == "k1" and isinstance(threshold, tuple) else 1):
        raise wrong(f"reject_threshold must be one number, or a pair for k1, got {threshold}")
