"""Logits to clipped loss in one op, with CleanRL's definitions: per-minibatch normalisation, ½·max value clip, entropy.

Floor: logits are read once and their gradient written once (8 bytes a logit); a row has an int64 action, four float32
streams, advantages twice (their mean and spread come first), the value and its gradient: 36 bytes. About 11 FLOPs a
logit and 65 a row. The eager block is CleanRL's with its six statistics and without its one `.item()`; ours gives all
its statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Categorical

import ppo_fast as pf
from ppo_fast.config import STATS

from .harness import OURS, Case, Target, Workload, backward, compiled, double_leaf, gradients, grid, leaf
from .ppo_loss import LOSS_SCALE, STATS_BYTES

CONFIG = pf.LossConfig.preset("cleanrl")
CLEANRL_STATS = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clip_fraction")


def cleanrl_loss(log_prob, entropy, values, old_log_prob, advantages, old_values, returns):
    """From log-probs on: what CleanRL-like trainers compute of one minibatch."""
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    with torch.no_grad():
        old_approx_kl, approx_kl = (-log_ratio).mean(), ((ratio - 1) - log_ratio).mean()
        clip_fraction = ((ratio - 1.0).abs() > CONFIG.clip_low).float().mean()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped = torch.clamp(ratio, 1 - CONFIG.clip_low, 1 + CONFIG.clip_high)
    policy_loss = torch.max(-advantages * ratio, -advantages * clipped).mean()
    value_error = (values - returns) ** 2
    near = old_values + torch.clamp(values - old_values, -CONFIG.value_clip, CONFIG.value_clip)
    value_loss = 0.5 * torch.max(value_error, (near - returns) ** 2).mean()
    mean_entropy = entropy.mean()
    loss = policy_loss - CONFIG.entropy_coef * mean_entropy + value_loss * CONFIG.value_coef
    return loss, (policy_loss, value_loss, mean_entropy, old_approx_kl, approx_kl, clip_fraction)


def eager(logits, values, actions, *rollout):
    policy = Categorical(logits=logits, validate_args=False)
    return cleanrl_loss(policy.log_prob(actions), policy.entropy(), values, *rollout)


def named(result) -> dict[str, Tensor]:
    loss, stats = result
    return {"loss": loss, **dict(zip(CLEANRL_STATS, stats, strict=True))}


def expected(out: pf.PPOLoss, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of the reference, CleanRL's statistics also by name."""
    out.loss.backward()
    one_by_one = {k: out.stats.vector[STATS.index(k)] for k in CLEANRL_STATS}
    return {"loss": out.loss, "stats": out.stats.vector, **one_by_one, **gradients(leaves)}


def rollout_of(log_prob: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Old log-probs near these, advantages, old values, returns."""
    rows = log_prob.shape[0]
    old_values = grid(torch.randn(rows))
    old_log_prob = log_prob.detach() + grid(0.15 * torch.randn(rows))
    return old_log_prob, torch.randn(rows), old_values, old_values + grid(0.5 * torch.randn(rows))


def build(case: Case) -> Workload:
    rows, n = case.shape
    z, actions = leaf(torch.randn(rows, n)), torch.randint(n, (rows,))
    rollout = rollout_of(pf.reference.categorical_log_prob(z, actions)[0])
    old_log_prob, advantages, old_values, returns = rollout
    values = leaf(old_values + grid(0.2 * torch.randn(rows)))
    leaves = {"logits": z, "values": values}

    def ours() -> dict[str, Tensor]:
        out = pf.categorical_ppo_loss(z, actions, old_log_prob, advantages, CONFIG, values=values,
                                      old_values=old_values, returns=returns)  # fmt: skip
        return {"loss": out.loss, "stats": out.stats.vector}

    fast = compiled(eager)
    providers = [
        backward(OURS, ours, leaves),
        backward("eager", lambda: named(eager(z, values, actions, *rollout)), leaves),
        backward("compile", lambda: named(fast(z, values, actions, *rollout)), leaves),
    ]

    def truth() -> dict[str, Tensor]:
        wide = {k: double_leaf(v) for k, v in leaves.items()}
        old, adv, old_v, ret = (x.double() for x in rollout)
        out = pf.reference.categorical_ppo_loss(wide["logits"], actions, old, adv, CONFIG, values=wide["values"],
                                                old_values=old_v, returns=ret)  # fmt: skip
        return expected(out, wide)

    reads = [z, actions, advantages, values, *rollout]
    return Workload(providers, truth, "eager", reads, peers_only=CLEANRL_STATS, scales=LOSS_SCALE)


def _case(rows: int, n: int, *targets: Target, quick: bool = False, remark: str = "") -> Case:
    size = rows * n
    n_bytes, flops = 8 * size + 36 * rows + STATS_BYTES, 11 * size + 65 * rows
    return Case("categorical_ppo_loss", (rows, n), "float32", "forward + backward", n_bytes, flops, build, targets, quick,
                remark)  # fmt: skip


CASES = [
    _case(128, 2, Target(10, ("eager",)), Target(3, ("compile",)), quick=True, remark="CleanRL's CartPole minibatch"),
    _case(16_384, 18),
]
