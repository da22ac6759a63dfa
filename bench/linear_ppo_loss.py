"""PPO loss of a language model from hidden states [M, H] and a head [V, H]: shape (M, H, V). All tokens alive, or half of
them without a gradient (advantage 0, as in a group of equal rewards), or half of them masked (a prompt).

Floor: three products, 2·M·H·V FLOPs each; a token without a gradient leaves two of them, a masked one all.
"""

from __future__ import annotations

import torch
from torch import Tensor

import ppo_fast as pf

from .harness import OURS, PRODUCTS, Case, Target, Workload, backward, compiled, double_leaf, gradients
from .linear_log_prob import formula, head, products

CONFIG = pf.LossConfig()
ALIVE, HALF_DEAD, HALF_MASKED = "", "half dead", "half masked"


def eager_loss(hidden, weight, targets, old_log_prob, advantages, mask):
    """As language-model trainers write it, with the statistics that they log."""
    log_prob, entropy = formula(hidden, weight, targets)
    count = mask.sum()
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - CONFIG.clip_low, 1 + CONFIG.clip_high)
    policy = torch.maximum(-advantages * ratio, -advantages * clipped)
    loss = torch.where(mask, policy, 0.0).sum() / count
    with torch.no_grad():
        outside = (ratio < 1 - CONFIG.clip_low) | (ratio > 1 + CONFIG.clip_high)
        statistics = [(x * mask).sum() / count for x in (entropy, ratio - 1 - (log_prob - old_log_prob), outside)]
    return loss, statistics


def build(case: Case) -> Workload:
    m = case.shape[0]
    leaves, targets = head(case)
    hidden, weight = leaves["hidden"], leaves["weight"]
    with torch.no_grad():
        old_log_prob = formula(hidden, weight, targets)[0] + 0.05 * torch.randn(m)  # nothing near a clip's edge
    advantages, mask = torch.randn(m), torch.ones(m, dtype=torch.bool)
    if case.variant == HALF_DEAD:
        advantages[::2] = 0
    elif case.variant == HALF_MASKED:
        mask[::2] = False
    data = (targets, old_log_prob, advantages)
    fast = compiled(eager_loss)

    def ours() -> dict[str, Tensor]:
        return {"loss": pf.linear_ppo_loss(hidden, weight, *data, CONFIG, mask=mask).loss}

    providers = [
        backward(OURS, ours, leaves),
        backward("eager", lambda: {"loss": eager_loss(hidden, weight, *data, mask)[0]}, leaves),
        backward("compile", lambda: {"loss": fast(hidden, weight, *data, mask)[0]}, leaves),
        products(hidden, weight),
    ]

    def truth() -> dict[str, Tensor]:
        wide = {k: double_leaf(x) for k, x in leaves.items()}
        rollout = (old_log_prob.double(), advantages.double(), None, None, None, None, mask, None)
        out = pf.reference.linear_ppo_loss(wide["hidden"], wide["weight"], targets, CONFIG, rollout)
        out.loss.backward()
        return {"loss": out.loss.detach(), **gradients(wide)}

    scales = {"loss": advantages.abs().mean().item()}
    return Workload(providers, truth, "eager", [hidden, weight, *data, mask], scales=scales)


def _case(m: int, h: int, v: int, variant: str, *targets: Target, quick: bool = False) -> Case:
    n_bytes = 4 * 2 * (m * h + v * h) + 17 * m + 4
    share = {ALIVE: 3.0, HALF_DEAD: 2.0, HALF_MASKED: 1.5}[variant]
    return Case("linear_ppo_loss", (m, h, v), "float32", "forward + backward", n_bytes, int(share * 2 * m * h * v), build,
                targets, quick, variant=variant)  # fmt: skip


CASES = [
    _case(2048, 1024, 32_000, ALIVE, Target(1 / 1.15, (PRODUCTS,))),
    _case(2048, 1024, 32_000, HALF_DEAD, Target(1 / (1.15 * 0.75), (PRODUCTS,))),
    _case(512, 512, 32_000, HALF_MASKED),
    _case(64, 64, 500, ALIVE, quick=True),
]
