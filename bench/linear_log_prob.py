"""Log-prob of tokens from hidden states [M, H] and a head [V, H]: shape (M, H, V).

Floor: three products, 2·M·H·V FLOPs each, which is what it is measured against ("the products": torch's own, of all tokens
at once, and nothing else). Where the logits do not fit the memory given, what was not kept is a fourth. The bytes are
those of the inputs and gradients; logits count as scratch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import ppo_fast as pf

from . import vocabulary_peers
from .harness import (
    OURS,
    PRODUCTS,
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


def formula(hidden, weight, targets):
    """As language-model trainers write it; without entropy where nobody asks for it."""
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    return log_p.gather(-1, targets[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def formula_of_log_prob(hidden, weight, targets):
    logits = (hidden @ weight.T).float()
    return (logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1),)


def products(hidden: Tensor, weight: Tensor) -> Provider:
    """The three of forward and backward."""
    hidden, weight = hidden.detach(), weight.detach()

    def run():
        logits = hidden @ weight.T
        return logits @ weight, logits.T @ hidden

    return Provider(PRODUCTS, run, lambda _: {})


def named(result) -> dict[str, Tensor]:
    return {name: x for name, x in zip(("log_prob", "entropy"), result, strict=False) if x is not None}


def head(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    m, h, v = case.shape
    dtype = getattr(torch, case.dtype)
    x = {"hidden": leaf(torch.randn(m, h).to(dtype)), "weight": leaf((torch.randn(v, h) / math.sqrt(h)).to(dtype))}
    return x, torch.randint(v, (m,))


def build(case: Case) -> Workload:
    m, with_entropy = case.shape[0], "entropy" in case.remark
    leaves, targets = head(case)
    hidden, weight = leaves["hidden"], leaves["weight"]
    given = {"log_prob": torch.randn(m) / m}
    if with_entropy:
        given["entropy"] = torch.full((m,), -0.01 / m)
    eager = formula if with_entropy else formula_of_log_prob
    fast = compiled(eager)
    providers = [
        backward(OURS, lambda: named(pf.linear_log_prob(hidden, weight, targets, entropy=with_entropy)), leaves, given),
        backward("eager", lambda: named(eager(hidden, weight, targets)), leaves, given),
        backward("compile", lambda: named(fast(hidden, weight, targets)), leaves, given),
        products(hidden, weight),
    ]
    for name, (op, note) in vocabulary_peers.from_hidden(with_entropy).items():
        # what nobody asked for gets no gradient
        call = lambda op=op: {k: x for k, x in named(op(hidden, weight, targets)).items() if k in given}  # noqa: E731
        providers.append(left_out(name, note) if op is None else backward(name, call, leaves, given, note))

    def truth() -> dict[str, Tensor]:
        wide = {k: double_leaf(x) for k, x in leaves.items()}
        out = named(pf.reference.linear_log_prob(**wide, targets=targets, entropy=with_entropy))
        torch.autograd.backward(list(out.values()), [g.double() for g in given.values()])
        return {**{k: v.detach() for k, v in out.items()}, **gradients(wide)}

    return Workload(providers, truth, "eager", [hidden, weight, targets])


def _case(m: int, h: int, v: int, *targets: Target, entropy: bool = True, quick: bool = False) -> Case:
    n_bytes = 4 * 2 * (m * h + v * h) + 16 * m
    remark = "with entropy and its gradient" if entropy else "log-prob alone"
    return Case("linear_log_prob", (m, h, v), "float32", "forward + backward", n_bytes, 6 * m * h * v, build, targets,
                quick, remark)  # fmt: skip


CASES = [
    _case(2048, 1024, 32_000, Target(1 / 1.15, (PRODUCTS,))),
    _case(512, 512, 32_000, entropy=False),
    _case(64, 64, 500, quick=True),
]
