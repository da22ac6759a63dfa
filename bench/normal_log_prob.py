"""Diagonal normal actions [rows, D] with a log_std [D] that does not depend on the state; sums over D.

Floor of forward + backward: mean and actions are read twice, the gradient of mean written once: 20 bytes and about 15
FLOPs an element. log_std and its gradient (a sum over the rows) are D numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Normal

import ppo_fast as pf

from .categorical_log_prob import named, upstream
from .harness import OURS, Case, Workload, backward, compiled, double_leaf, gradients, leaf


def eager(mean, log_std, actions):
    """As trainers for control write it."""
    policy = Normal(mean, log_std.expand_as(mean).exp(), validate_args=False)
    return policy.log_prob(actions).sum(1), policy.entropy().sum(1)


def build(case: Case) -> Workload:
    rows, n = case.shape
    mean, log_std, given = leaf(torch.randn(rows, n)), leaf(0.2 * torch.randn(n) - 0.5), upstream(rows)
    actions = mean.detach() + log_std.detach().exp() * torch.randn(rows, n)
    leaves = {"mean": mean, "log_std": log_std}
    fast = compiled(eager)
    providers = [
        backward(OURS, lambda: named(pf.normal_log_prob(mean, log_std, actions)), leaves, given),
        backward("eager", lambda: named(eager(mean, log_std, actions)), leaves, given),
        backward("compile", lambda: named(fast(mean, log_std, actions)), leaves, given),
    ]

    def truth() -> dict[str, Tensor]:
        wide = {k: double_leaf(v) for k, v in leaves.items()}
        out = named(pf.reference.normal_log_prob(wide["mean"], wide["log_std"], actions.double()))
        torch.autograd.backward(list(out.values()), [g.double() for g in given.values()])
        return {**out, **gradients(wide)}

    reads = [mean, mean, actions, actions, log_std, log_std, *given.values()]
    return Workload(providers, truth, "eager", reads)


def _case(rows: int, n: int, quick: bool = False) -> Case:
    size = rows * n
    return Case("normal_log_prob", (rows, n), "float32", "forward + backward", 20 * size + 16 * rows + 12 * n, 15 * size,
                build, (), quick)  # fmt: skip


CASES = [_case(64, 6, quick=True), _case(65_536, 6)]
