"""Mean and log_std to clipped loss in one op, with CleanRL's definitions for continuous actions.

Floor: mean and actions are read once and the gradient of mean written once (12 bytes an action); a row has four float32
streams, advantages twice, the value and its gradient: 28 bytes. About 15 FLOPs an action and 65 a row. The eager block is
CleanRL's with its six statistics; ours gives all its statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

import ppo_fast as pf

from .categorical_ppo_loss import CLEANRL_STATS, CONFIG, cleanrl_loss, expected, named, rollout_of
from .harness import OURS, Case, Target, Workload, backward, compiled, double_leaf, grid, leaf
from .normal_log_prob import eager as eager_log_prob
from .ppo_loss import LOSS_SCALE, STATS_BYTES


def eager(mean, log_std, values, actions, *rollout):
    return cleanrl_loss(*eager_log_prob(mean, log_std, actions), values, *rollout)


def build(case: Case) -> Workload:
    rows, n = case.shape
    mean, log_std = leaf(torch.randn(rows, n)), leaf(0.2 * torch.randn(n) - 0.5)
    actions = mean.detach() + log_std.detach().exp() * torch.randn(rows, n)
    rollout = rollout_of(pf.reference.normal_log_prob(mean, log_std, actions)[0])
    old_log_prob, advantages, old_values, returns = rollout
    values = leaf(old_values + grid(0.2 * torch.randn(rows)))
    leaves = {"mean": mean, "log_std": log_std, "values": values}

    def ours() -> dict[str, Tensor]:
        out = pf.normal_ppo_loss(mean, log_std, actions, old_log_prob, advantages, CONFIG, values=values,
                                 old_values=old_values, returns=returns)  # fmt: skip
        return {"loss": out.loss, "stats": out.stats.vector}

    fast = compiled(eager)
    providers = [
        backward(OURS, ours, leaves),
        backward("eager", lambda: named(eager(mean, log_std, values, actions, *rollout)), leaves),
        backward("compile", lambda: named(fast(mean, log_std, values, actions, *rollout)), leaves),
    ]

    def truth() -> dict[str, Tensor]:
        wide = {k: double_leaf(v) for k, v in leaves.items()}
        old, adv, old_v, ret = (x.double() for x in rollout)
        out = pf.reference.normal_ppo_loss(wide["mean"], wide["log_std"], actions.double(), old, adv, CONFIG,
                                           values=wide["values"], old_values=old_v, returns=ret)  # fmt: skip
        return expected(out, wide)

    reads = [mean, log_std, actions, advantages, values, *rollout]
    return Workload(providers, truth, "eager", reads, peers_only=CLEANRL_STATS, scales=LOSS_SCALE)


def _case(rows: int, n: int, *targets: Target, quick: bool = False, remark: str = "") -> Case:
    size = rows * n
    n_bytes, flops = 12 * size + 28 * rows + 8 * n + STATS_BYTES, 15 * size + 65 * rows
    return Case("normal_ppo_loss", (rows, n), "float32", "forward + backward", n_bytes, flops, build, targets, quick,
                remark)  # fmt: skip


CASES = [
    _case(64, 6, Target(10, ("eager",)), Target(3, ("compile",)), quick=True, remark="CleanRL's MuJoCo minibatch"),
    _case(24_576, 12, remark="rsl_rl's minibatch"),
]
