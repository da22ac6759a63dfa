"""Independent binary actions from logits [rows, D]; log-prob and entropy are sums over D.

Floor of forward + backward: logits and float actions are read twice, the gradient written once: 20 bytes and about 15
FLOPs an element.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Bernoulli

import ppo_fast as pf

from .categorical_log_prob import named, upstream
from .harness import OURS, Case, Workload, backward, compiled, double_leaf, gradients, leaf


def eager(logits, actions):
    """As trainers for control write it."""
    policy = Bernoulli(logits=logits, validate_args=False)
    return policy.log_prob(actions).sum(1), policy.entropy().sum(1)


def build(case: Case) -> Workload:
    z, given = leaf(2.0 * torch.randn(case.shape)), upstream(case.shape[0])
    actions = torch.randint(2, case.shape).float()
    leaves = {"logits": z}
    fast = compiled(eager)
    providers = [
        backward(OURS, lambda: named(pf.bernoulli_log_prob(z, actions)), leaves, given),
        backward("eager", lambda: named(eager(z, actions)), leaves, given),
        backward("compile", lambda: named(fast(z, actions)), leaves, given),
    ]

    def truth() -> dict[str, Tensor]:
        wide = {"logits": double_leaf(z)}
        out = named(pf.reference.bernoulli_log_prob(wide["logits"], actions))
        torch.autograd.backward(list(out.values()), [g.double() for g in given.values()])
        return {**out, **gradients(wide)}

    return Workload(providers, truth, "eager", [z, z, actions, actions, *given.values()])


def _case(rows: int, n: int, quick: bool = False) -> Case:
    size = rows * n
    return Case("bernoulli_log_prob", (rows, n), "float32", "forward + backward", 20 * size + 16 * rows, 15 * size,
                build, (), quick)  # fmt: skip


CASES = [_case(128, 8, quick=True), _case(65_536, 8)]
