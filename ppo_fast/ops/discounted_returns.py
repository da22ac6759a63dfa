"""Discounted returns."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend, _library, reference
from . import _scan


def discounted_returns(
    rewards: Tensor,
    last_values: Tensor | None = None,
    *,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    final_values: _scan.Final = None,
    mask: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    time_dim: int = 0,
    differentiable: bool = False,
) -> Tensor:
    """Discounted sum of the rewards to come, in one backward pass: the Monte Carlo return.

    Formula::

        R_t = r_t + γ·R_{t+1},  started from `last_values`

    Args:
        rewards: [T, N], [T] or any shape whose dimension `time_dim` is time.
        last_values: [N] (of 1-D inputs [] or [1]): R after the last step; absent: 0.
        terminated: the same shape as rewards, set where the step ended its episode in a terminal state: R_{t+1} is 0.
        truncated: set where the episode was cut off after the step: R_{t+1} is `final_values`.
        final_values: needed with `truncated`, read only where truncated and not terminated: [T, N], or a pair
            (flat_index [K], value [K]) of positions in the flattened rewards. A truncated step without an entry raises.
        mask: masked steps (0) are transparent: the return passes over them, nothing of them is read, outputs are 0.
        gamma: a number in [0, 1], or a tensor of one per column, [N].
        time_dim: dimension of time; memory where columns (0) or where steps (1) are neighbours is read as it lies.
        differentiable: differentiate through the sum (the plain torch formula).

    Flags and masks are bool, integer or floating, set where not 0; floating inputs float32, float64, bfloat16 or
    float16, in any strides.

    Returns:
        Returns, float32 (float64 where rewards are), contiguous in the shape of `rewards`.

    Gradient: none; the inputs are constants, also where they require a gradient, unless `differentiable`.

    Errors: TypeError for a dtype or a missing tensor, ValueError for a shape, a rate or an absent final value.

    Cost: reads each input once, writes one output: float32 with bool `terminated` 9 bytes a step. Bits do not depend on
    threads, instruction set, layout, or what else is in the batch.
    """
    if not differentiable:
        if torch.compiler.is_compiling():
            return _op(*map(_scan.constant, (rewards, last_values, terminated, truncated)),
                       *_scan.split_final(final_values), mask, *_scan.split_rate(gamma), time_dim)  # fmt: skip
        backend = _backend.pick("discounted_returns", rewards)
        if backend is not None:
            if rewards.ndim > 2 or not backend.checks:
                _check(rewards, last_values, terminated, truncated, final_values, mask, gamma, time_dim)
            if rewards.ndim <= 2:
                return _fill(backend, rewards, last_values, terminated, truncated, final_values, mask, gamma, time_dim)
            grid = _scan.Grids(rewards.shape, time_dim)
            return grid.back(
                _fill(backend, grid(rewards), grid.rows(last_values), grid(terminated), grid(truncated),
                      grid.final(final_values), grid(mask), grid.rows(gamma), grid.time_dim)
            )  # fmt: skip
    if not torch.compiler.is_compiling():
        _check(rewards, last_values, terminated, truncated, final_values, mask, gamma, time_dim)
    result = reference.discounted_returns(
        rewards, last_values, terminated=terminated, truncated=truncated, final_values=final_values, mask=mask,
        gamma=gamma, time_dim=time_dim,
    )  # fmt: skip
    return result if differentiable else result.detach()


def _fill(backend, rewards, last_values, terminated, truncated, final_values, mask, gamma, time_dim):
    double = _scan.is_double(rewards)
    returns = _scan.empty(rewards, double)
    final_values = _scan.final_grid(backend, final_values, rewards)
    backend.ops.discounted_returns(rewards, last_values, terminated, truncated, final_values, mask, gamma, time_dim,
                                   double, returns, backend.resources())  # fmt: skip
    return returns


def _check(rewards, last_values, terminated, truncated, final_values, mask, gamma, time_dim):
    _scan.check("discounted_returns", {"rewards": rewards}, last_values,
                {"terminated": terminated, "truncated": truncated, "mask": mask}, final_values, {"gamma": gamma}, {},
                None, time_dim)  # fmt: skip


# --- under torch.compile ----------------------------------------------------------------------------------------------


def _kernel(rewards, last_values, terminated, truncated, final_values, final_index, mask, gamma, gamma_row, time_dim):
    return discounted_returns(
        rewards, last_values, terminated=terminated, truncated=truncated,
        final_values=_scan.joined_final(final_values, final_index), mask=mask,
        gamma=_scan.joined_rate(gamma, gamma_row), time_dim=time_dim,
    ).contiguous()  # fmt: skip


def _fake(rewards, *rest):
    return _scan.fake(rewards)


_op = _library.define(
    "discounted_returns",
    "(Tensor rewards, Tensor? last_values, Tensor? terminated, Tensor? truncated, Tensor? final_values, "
    "Tensor? final_index, Tensor? mask, float gamma, Tensor? gamma_row, int time_dim) -> Tensor",
    _kernel,
    _fake,
)
