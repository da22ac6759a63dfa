"""Log-probability of the taken action and entropy, from logits [rows, A]: actions of a policy, tokens of a vocabulary.

Floor of forward + backward: logits are read twice (what the gradient is scaled by comes after the forward pass), their
gradient is written once; labels and both upstream gradients, log-prob and entropy are small. About 11 FLOPs a logit:
subtract, exp and two multiply-adds forwards; subtract, exp and four more backwards.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Categorical

import ppo_fast as pf

from . import vocabulary_peers
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
    leaf,
    left_out,
)


def vocabulary_formula(logits, actions):
    """As language-model trainers write it: float32 whatever the logits are."""
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, actions[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def policy_formula(logits, actions):
    """As trainers for control write it."""
    policy = Categorical(logits=logits, validate_args=False)
    return policy.log_prob(actions), policy.entropy()


def named(result) -> dict[str, Tensor]:
    return dict(zip(("log_prob", "entropy"), result, strict=True))


def upstream(rows: int) -> dict[str, Tensor]:
    """Gradients of a loss with respect to log-prob and entropy."""
    return {"log_prob": torch.randn(rows) / rows, "entropy": torch.full((rows,), -0.01 / rows)}


def build(case: Case) -> Workload:
    rows, n = case.shape
    logits = {"logits": leaf(2.0 * torch.randn(rows, n, dtype=getattr(torch, case.dtype)))}
    z, actions, given = logits["logits"], torch.randint(n, (rows,)), upstream(rows)
    eager = vocabulary_formula if n > 1000 else policy_formula
    fast = compiled(eager)
    providers = [
        backward(OURS, lambda: named(pf.categorical_log_prob(z, actions)), logits, given),
        backward("eager", lambda: named(eager(z, actions)), logits, given),
        backward("compile", lambda: named(fast(z, actions)), logits, given),
    ]
    if n > 1000:
        for name, (op, note) in vocabulary_peers.from_logits(case.dtype).items():
            call = lambda op=op: named(op(z, actions))  # noqa: E731
            providers.append(left_out(name, note) if op is None else backward(name, call, logits, given, note))

    def truth() -> dict[str, Tensor]:
        wide = {"logits": double_leaf(z)}
        out = named(pf.reference.categorical_log_prob(wide["logits"], actions))
        torch.autograd.backward(list(out.values()), [g.double() for g in given.values()])
        return {**out, **gradients(wide)}

    return Workload(providers, truth, "eager", [z, z, actions, actions, *given.values()])


# --- a vocabulary's logits, overwritten by their gradient -------------------------------------------------------------


class FromNetwork(torch.autograd.Function):
    """Logits as a head hands them on: no leaf, and theirs to overwrite who has them."""

    @staticmethod
    def forward(ctx, anchor, logits, seen):
        ctx.seen = seen
        return logits.detach()

    @staticmethod
    def backward(ctx, d_logits):
        ctx.seen["d logits"] = d_logits
        return None, None, None


def build_in_place(case: Case) -> Workload:
    rows, n = case.shape
    pristine = 2.0 * torch.randn(rows, n, dtype=getattr(torch, case.dtype))
    z, anchor = pristine.clone(), torch.zeros((), requires_grad=True)
    actions, given = torch.randint(n, (rows,)), upstream(rows)
    fast = compiled(vocabulary_formula)

    def provider(name: str, op, note: str = "") -> Provider:
        def run() -> dict[str, Tensor]:
            seen: dict[str, Tensor] = {}
            out = named(op(FromNetwork.apply(anchor, z, seen), actions))
            torch.autograd.backward(list(out.values()), list(given.values()))
            return {**{k: v.detach() for k, v in out.items()}, **seen}

        return Provider(name, run, dict, lambda: z.copy_(pristine), note=note)

    providers = [
        provider(OURS, lambda z, a: pf.categorical_log_prob(z, a, inplace_backward=True)),
        provider("eager", vocabulary_formula),
        provider("compile", fast),
    ]
    for name, (op, note) in vocabulary_peers.from_logits(case.dtype).items():
        providers.append(left_out(name, note) if op is None else provider(name, op, note))

    def truth() -> dict[str, Tensor]:
        wide = {"logits": double_leaf(pristine)}
        out = named(pf.reference.categorical_log_prob(wide["logits"], actions))
        torch.autograd.backward(list(out.values()), [g.double() for g in given.values()])
        return {**{k: v.detach() for k, v in out.items()}, **gradients(wide)}

    return Workload(providers, truth, "eager", [z, z, actions, actions, *given.values()])


def _case(rows: int, n: int, dtype: str, *targets: Target, quick=False, remark="", build=build) -> Case:
    size = rows * n
    n_bytes = 3 * getattr(torch, dtype).itemsize * size + (2 * 8 + 4 * 4) * rows
    return Case("categorical_log_prob", (rows, n), dtype, "forward + backward", n_bytes, 11 * size, build, targets,
                quick, remark)  # fmt: skip


CASES = [
    _case(256, 32_000, "float32", Target(3, ("compile",)), Target(0.8, (COPY,)), remark="256 tokens, a vocabulary"),
    _case(256, 32_000, "bfloat16", Target(3, ("compile",)), remark="256 tokens, a vocabulary"),
    _case(128, 151_936, "bfloat16", Target(2.5, ("compile",)), remark="gradient over the logits", build=build_in_place),
    _case(65_536, 6, "float32", Target(4, ("compile",))),
    _case(65_536, 18, "float32", Target(4, ("compile",))),
    _case(128, 2, "float32", quick=True, remark="CleanRL's CartPole minibatch"),
]
