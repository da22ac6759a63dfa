"""Several independent categoricals side by side (MultiDiscrete actions): sums of log-probs and entropies over the heads.

Floor of forward + backward: as categorical_log_prob, with one int64 label a head: 12 bytes and 11 FLOPs a logit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Categorical

import ppo_fast as pf

from .categorical_log_prob import named, upstream
from .harness import OURS, Case, Workload, backward, compiled, double_leaf, gradients, leaf

NVEC = (3, 3, 4, 25, 25, 8, 8)  # seven heads of different sizes, as a real-time strategy game has


def eager(logits, actions):
    """As trainers for control write it: a distribution a head."""
    heads = [Categorical(logits=z, validate_args=False) for z in logits.split(NVEC, dim=1)]
    log_prob = torch.stack([p.log_prob(a) for p, a in zip(heads, actions.unbind(1), strict=True)]).sum(0)
    return log_prob, torch.stack([p.entropy() for p in heads]).sum(0)


def build(case: Case) -> Workload:
    rows, n = case.shape
    z, given = leaf(2.0 * torch.randn(rows, n)), upstream(rows)
    actions = torch.stack([torch.randint(k, (rows,)) for k in NVEC], dim=1)
    leaves = {"logits": z}
    fast = compiled(eager)
    providers = [
        backward(OURS, lambda: named(pf.multi_categorical_log_prob(z, actions, NVEC)), leaves, given),
        backward("eager", lambda: named(eager(z, actions)), leaves, given),
        backward("compile", lambda: named(fast(z, actions)), leaves, given),
    ]

    def truth() -> dict[str, Tensor]:
        wide = {"logits": double_leaf(z)}
        out = named(pf.reference.multi_categorical_log_prob(wide["logits"], actions, NVEC))
        torch.autograd.backward(list(out.values()), [g.double() for g in given.values()])
        return {**out, **gradients(wide)}

    return Workload(providers, truth, "eager", [z, z, actions, actions, *given.values()])


def _case(rows: int, quick: bool = False) -> Case:
    size = rows * sum(NVEC)
    n_bytes = 12 * size + (2 * 8 * len(NVEC) + 4 * 4) * rows
    return Case("multi_categorical_log_prob", (rows, sum(NVEC)), "float32", "forward + backward", n_bytes, 11 * size,
                build, (), quick, f"{len(NVEC)} heads")  # fmt: skip


CASES = [_case(128, quick=True), _case(16_384)]
