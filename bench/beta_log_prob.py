"""Beta actions in (0, 1) from alpha and beta [rows, D]; log-prob and entropy are sums over D.

Floor of forward + backward: alpha, beta and actions are read twice, two gradients written once: 32 bytes an element.
Three lgamma, three digamma and three trigamma an element (some 20 FLOPs each) weigh more than the bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta

import ppo_fast as pf

from .categorical_log_prob import named, upstream
from .harness import OURS, Case, Workload, backward, compiled, double_leaf, gradients, leaf


def eager(alpha, beta, actions):
    """As trainers for control write it."""
    policy = Beta(alpha, beta, validate_args=False)
    return policy.log_prob(actions).sum(1), policy.entropy().sum(1)


def build(case: Case) -> Workload:
    rows, n = case.shape
    alpha = leaf(torch.nn.functional.softplus(torch.randn(rows, n)) + 1.0)
    beta = leaf(torch.nn.functional.softplus(torch.randn(rows, n)) + 1.0)
    actions, given = 0.01 + 0.98 * torch.rand(rows, n), upstream(rows)
    leaves = {"alpha": alpha, "beta": beta}
    fast = compiled(eager)
    providers = [
        backward(OURS, lambda: named(pf.beta_log_prob(alpha, beta, actions)), leaves, given),
        backward("eager", lambda: named(eager(alpha, beta, actions)), leaves, given),
        backward("compile", lambda: named(fast(alpha, beta, actions)), leaves, given),
    ]

    def truth() -> dict[str, Tensor]:
        wide = {k: double_leaf(v) for k, v in leaves.items()}
        out = named(pf.reference.beta_log_prob(wide["alpha"], wide["beta"], actions.double()))
        torch.autograd.backward(list(out.values()), [g.double() for g in given.values()])
        return {**out, **gradients(wide)}

    reads = [alpha, alpha, beta, beta, actions, actions, *given.values()]
    return Workload(providers, truth, "eager", reads)


def _case(rows: int, n: int, quick: bool = False) -> Case:
    size = rows * n
    return Case("beta_log_prob", (rows, n), "float32", "forward + backward", 32 * size + 16 * rows, 200 * size, build,
                (), quick)  # fmt: skip


CASES = [_case(64, 6, quick=True), _case(16_384, 6)]
