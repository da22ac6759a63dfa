"""V-trace targets and advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend, _library, reference
from . import _scan


def vtrace(
    log_rhos: Tensor,
    rewards: Tensor,
    values: Tensor,
    last_values: Tensor | None = None,
    *,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    final_values: _scan.Final = None,
    mask: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    lam: float | Tensor = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    time_dim: int = 0,
    differentiable: bool = False,
) -> tuple[Tensor, Tensor]:
    """V-trace targets and policy-gradient advantages in one backward pass (Espeholt et al. 2018, arXiv 1802.01561).

    Formula::

        ρ_t = exp(log_rhos_t);    c_t = λ·min(c_clip, ρ_t)
        δ_t = min(rho_clip, ρ_t)·(r_t + γ·V(s_{t+1}) - V(s_t))
        vs_t = V(s_t) + δ_t + γ·c_t·(vs_{t+1} - V(s_{t+1}))
        adv_t = min(rho_clip, ρ_t)·(r_t + γ·vs_{t+1} - V(s_t))

    Args:
        log_rhos: log π(a|s) - log μ(a|s) of the learner's over the actor's policy, nats; [T, N], [T] or any shape whose
            dimension `time_dim` is time.
        rewards, values: the same shape.
        last_values: [N] (of 1-D inputs [] or [1]): V of the state after the last step; absent: 0.
        terminated: set where the step ended its episode in a terminal state: no V(s_{t+1}), trace cut.
        truncated: set where the episode was cut off after the step: V(s_{t+1}) and vs_{t+1} are `final_values`.
        final_values: needed with `truncated`, read only where truncated and not terminated: [T, N], or a pair
            (flat_index [K], value [K]) of positions in the flattened rewards. A truncated step without an entry raises.
        mask: masked steps (0) are transparent: traces and values pass over them, nothing of them is read, outputs are 0.
        gamma, lam: numbers in [0, 1], or tensors of one per column, [N].
        rho_clip, c_clip: ρ̄ and c̄ of the paper, > 0; inf switches a clip off.
        time_dim: dimension of time; memory where columns (0) or where steps (1) are neighbours is read as it lies.
        differentiable: differentiate through the estimate (the plain torch formula).

    Flags and masks are bool, integer or floating, set where not 0; floating inputs float32, float64, bfloat16 or
    float16, in any strides.

    Returns:
        (targets vs, advantages), float32 (float64 where an input is), contiguous in the shape of `rewards`.

    Gradient: none; the inputs are constants, also where they require a gradient, unless `differentiable`.

    Errors: TypeError for a dtype or a missing tensor, ValueError for a shape, a rate or an absent final value.

    Cost: reads each input once, writes two outputs: float32 with bool `terminated` 21 bytes a step. Bits do not depend
    on threads, instruction set, layout, or what else is in the batch.
    """
    if not differentiable:
        if torch.compiler.is_compiling():
            return _op(*map(_scan.constant, (log_rhos, rewards, values, last_values, terminated, truncated)),
                       *_scan.split_final(final_values), mask, *_scan.split_rate(gamma), *_scan.split_rate(lam),
                       rho_clip, c_clip, time_dim)  # fmt: skip
        backend = _backend.pick("vtrace", rewards)
        if backend is not None:
            if rewards.ndim > 2 or not backend.checks:
                _check(log_rhos, rewards, values, last_values, terminated, truncated, final_values, mask, gamma, lam,
                       rho_clip, c_clip, time_dim)  # fmt: skip
            if rewards.ndim <= 2:
                return _fill(backend, log_rhos, rewards, values, last_values, terminated, truncated, final_values, mask, gamma,
                             lam, rho_clip, c_clip, time_dim)  # fmt: skip
            grid = _scan.Grids(rewards.shape, time_dim)
            targets, advantages = _fill(
                backend, grid(log_rhos), grid(rewards), grid(values), grid.rows(last_values), grid(terminated), grid(truncated),
                grid.final(final_values), grid(mask), grid.rows(gamma), grid.rows(lam), rho_clip, c_clip, grid.time_dim,
            )  # fmt: skip
            return grid.back(targets), grid.back(advantages)
    if not torch.compiler.is_compiling():
        _check(log_rhos, rewards, values, last_values, terminated, truncated, final_values, mask, gamma, lam, rho_clip,
               c_clip, time_dim)  # fmt: skip
    result = reference.vtrace(
        log_rhos, rewards, values, last_values, terminated=terminated, truncated=truncated, final_values=final_values,
        mask=mask, gamma=gamma, lam=lam, rho_clip=rho_clip, c_clip=c_clip, time_dim=time_dim,
    )  # fmt: skip
    return result if differentiable else tuple(x.detach() for x in result)


def _fill(backend, log_rhos, rewards, values, last_values, terminated, truncated, final_values, mask, gamma, lam, rho_clip,
          c_clip, time_dim):  # fmt: skip
    double = _scan.is_double(log_rhos, rewards, values)
    targets, advantages = _scan.empty(rewards, double), _scan.empty(rewards, double)
    final_values = _scan.final_grid(backend, final_values, rewards)
    backend.ops.vtrace(log_rhos, rewards, values, last_values, terminated, truncated, final_values, mask, gamma, lam,
                       rho_clip, c_clip, time_dim, double, targets, advantages, backend.resources())  # fmt: skip
    return targets, advantages


def _check(log_rhos, rewards, values, last_values, terminated, truncated, final_values, mask, gamma, lam, rho_clip,
           c_clip, time_dim):  # fmt: skip
    _scan.check("vtrace", {"rewards": rewards, "log_rhos": log_rhos, "values": values}, last_values,
                {"terminated": terminated, "truncated": truncated, "mask": mask}, final_values,
                {"gamma": gamma, "lam": lam}, {"rho_clip": rho_clip, "c_clip": c_clip}, None, time_dim)  # fmt: skip


# --- under torch.compile ----------------------------------------------------------------------------------------------


def _kernel(log_rhos, rewards, values, last_values, terminated, truncated, final_values, final_index, mask, gamma,
            gamma_row, lam, lam_row, rho_clip, c_clip, time_dim):  # fmt: skip
    out = vtrace(log_rhos, rewards, values, last_values, terminated=terminated, truncated=truncated,
                 final_values=_scan.joined_final(final_values, final_index), mask=mask,
                 gamma=_scan.joined_rate(gamma, gamma_row), lam=_scan.joined_rate(lam, lam_row), rho_clip=rho_clip,
                 c_clip=c_clip, time_dim=time_dim)  # fmt: skip
    return tuple(x.contiguous() for x in out)


def _fake(log_rhos, rewards, values, *rest):
    return _scan.fake(rewards, log_rhos, values), _scan.fake(rewards, log_rhos, values)


_op = _library.define(
    "vtrace",
    "(Tensor log_rhos, Tensor rewards, Tensor values, Tensor? last_values, Tensor? terminated, Tensor? truncated, "
    "Tensor? final_values, Tensor? final_index, Tensor? mask, float gamma, Tensor? gamma_row, float lam, "
    "Tensor? lam_row, float rho_clip, float c_clip, int time_dim) -> (Tensor, Tensor)",
    _kernel,
    _fake,
)
