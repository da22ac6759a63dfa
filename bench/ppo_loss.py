"""The clipped loss with value and entropy terms, all its statistics and the gradients of log_prob, values, entropy.

Floor: seven streams are read once, three gradients written once: 40 bytes and about 60 FLOPs an element (24 for the
loss, 12 for the gradients, the rest for the statistics).
"""

from __future__ import annotations

import torch
from torch import Tensor

import ppo_fast as pf
from ppo_fast.config import STATS

from .harness import (
    COPY,
    OURS,
    Case,
    Provider,
    Target,
    Workload,
    backward,
    compiled,
    double_leaf,
    gradients,
    grid,
    leaf,
)

CLIP, VALUE_COEF, ENTROPY_COEF = 0.2, 0.5, 0.01
CONFIG = pf.LossConfig(value_clip=CLIP, value_coef=VALUE_COEF, entropy_coef=ENTROPY_COEF)
#: A policy loss is a mean of terms A·r of magnitude 1 and either sign: its own magnitude says nothing about rounding.
LOSS_SCALE = {"loss": 1.0, "policy_loss": 1.0}
STATS_BYTES = 4 * (1 + len(STATS))  # the loss and its statistics


def eager_loss(log_prob, values, entropy, old_log_prob, advantages, old_values, returns):
    """The loss as a trainer writes it, and the same statistics that ours gives, without a gradient."""
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    policy_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
    value_error = (values - returns) ** 2
    near = old_values + (values - old_values).clamp(-CLIP, CLIP)
    near_error = (near - returns) ** 2
    value_loss = 0.5 * torch.max(value_error, near_error).mean()
    mean_entropy = entropy.mean()
    loss = policy_loss + VALUE_COEF * value_loss - ENTROPY_COEF * mean_entropy
    with torch.no_grad():
        zero = torch.zeros_like(loss)
        low, high = (ratio < 1 - CLIP).float().mean(), (ratio > 1 + CLIP).float().mean()
        value_clipped = (near_error > value_error) & ((values - old_values).abs() > CLIP)
        mean_ratio = ratio.mean()
        residual = (returns - values).var(correction=0)
        stats = torch.stack([
            policy_loss, value_loss, mean_entropy, zero, ((ratio - 1) - log_ratio).mean(), (-log_ratio).mean(),
            low + high, low, high, zero, value_clipped.float().mean(), mean_ratio, ratio.min(), ratio.max(),
            mean_ratio**2 / (ratio**2).mean(), 1 - residual / returns.var(correction=0),
        ])  # fmt: skip
    return loss, stats


def named(result) -> dict[str, Tensor]:
    return {"loss": result[0], "stats": result[1]}


def build(case: Case) -> Workload:
    (n,) = case.shape
    old_log_prob, advantages, old_values = grid(-torch.rand(n)), torch.randn(n), grid(torch.randn(n))
    returns = old_values + grid(0.5 * torch.randn(n))
    leaves = {
        "log_prob": leaf(old_log_prob + grid(0.15 * torch.randn(n))),
        "values": leaf(old_values + grid(0.2 * torch.randn(n))),
        "entropy": leaf(torch.rand(n)),
    }
    learned, rollout = tuple(leaves.values()), (old_log_prob, advantages, old_values, returns)

    def ours() -> dict[str, Tensor]:
        out = pf.ppo_loss(leaves["log_prob"], old_log_prob, advantages, CONFIG, values=leaves["values"],
                          old_values=old_values, returns=returns, entropy=leaves["entropy"])  # fmt: skip
        return {"loss": out.loss, "stats": out.stats.vector}

    fast = compiled(eager_loss)
    providers: list[Provider] = [
        backward(OURS, ours, leaves),
        backward("eager", lambda: named(eager_loss(*learned, *rollout)), leaves),
        backward("compile", lambda: named(fast(*learned, *rollout)), leaves),
    ]

    def truth() -> dict[str, Tensor]:
        wide = {k: double_leaf(v) for k, v in leaves.items()}
        old, adv, old_v, ret = (x.double() for x in rollout)
        out = pf.reference.ppo_loss(wide["log_prob"], old, adv, CONFIG, values=wide["values"], old_values=old_v,
                                    returns=ret, entropy=wide["entropy"])  # fmt: skip
        out.loss.backward()
        return {"loss": out.loss, "stats": out.stats.vector, **gradients(wide)}

    return Workload(providers, truth, "eager", [*learned, *rollout], scales=LOSS_SCALE)


def _case(n: int, *targets: Target, quick: bool = False) -> Case:
    return Case("ppo_loss", (n,), "float32", "forward + backward", 40 * n + STATS_BYTES, 60 * n, build, targets, quick)


CASES = [
    _case(256, Target(3, ("compile",)), Target(10, ("eager",)), quick=True),
    _case(65_536, Target(3, ("compile",)), Target(25, ("eager",))),
    _case(1_048_576, Target(4, ("compile",)), Target(50, ("eager",)), Target(0.8, (COPY,))),
]
