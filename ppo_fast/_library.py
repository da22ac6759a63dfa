"""The third door: ops registered with torch.library, taken only while torch.compile traces (a registered call costs
several times a raw one). Each op file defines its own; here is the one way to do it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .config import CHOICES

_library = torch.library.Library("ppo_fast", "DEF")

#: Schema of a LossConfig: its numbers as one tensor, which a schedule over compiled calls may change freely.
CONFIG_SCHEMA = ", ".join(["Tensor numbers", *(f"int {name}" for name in CHOICES)])
N_CONFIG = 1 + len(CHOICES)


def define(
    name: str,
    schema: str,
    kernel: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Registers ppo_fast::<name> for every device (`kernel` picks the backend itself) and returns the callable op."""
    _library.define(f"{name}{schema}")
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ppo_fast::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"ppo_fast::{name}", backward, setup_context=setup_context, lib=_library)
    return getattr(torch.ops.ppo_fast, name).default


#: What every loss takes after its own inputs; in this order `_fill` of each loss takes it too.
ROLLOUT_SCHEMA = (
    "Tensor old_log_prob, Tensor advantages, Tensor? old_values, Tensor? returns, Tensor? ref_log_prob, "
    "Tensor? rollout_log_prob, Tensor? mask, Tensor? weights, float denominator, bool total"
)


def placeholder(like: Tensor) -> Tensor:
    """Stands for an absent gradient among an op's outputs."""
    return like.new_empty(0)


def define_loss(name: str, inputs: str, kernel: Callable, fake: Callable, extra: str = "") -> Callable:
    """A loss that returns (loss, stats, one gradient per differentiable input), gradients for a grad_output of 1."""
    n_inputs = inputs.count(",") + 1

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*output[2:])
        ctx.n_rest = len(inputs) - n_inputs
        ctx.absent = [x is None for x in inputs[:n_inputs]]
        ctx.mark_non_differentiable(*output[1:])

    def backward(ctx, grad_loss, *_):
        grads = [
            None if absent else g * grad_loss.to(g.dtype)
            for absent, g in zip(ctx.absent, ctx.saved_tensors, strict=True)
        ]
        return *grads, *([None] * ctx.n_rest)

    returns = ", ".join(["Tensor"] * (2 + n_inputs))
    schema = f"({inputs}, {ROLLOUT_SCHEMA}, {extra}{CONFIG_SCHEMA}) -> ({returns})"
    return define(name, schema, kernel, fake, setup_context, backward)
