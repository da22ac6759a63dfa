"""Generalised advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend, _library, _memory, reference
from . import _scan


def gae(
    rewards: Tensor,
    values: Tensor,
    last_values: Tensor | None = None,
    *,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    final_values: _scan.Final = None,
    mask: Tensor | None = None,
    mask_mode: str = "carry",
    cu_seqlens: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    lam: float | Tensor = 0.95,
    time_dim: int = 0,
    differentiable: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
    moments: bool = False,
) -> tuple[Tensor, ...]:
    """Advantages and returns in one backward pass (Schulman et al. 2016, arXiv 1506.02438).

    Formula::

        δ_t = r_t + γ·V(s_{t+1}) - V(s_t);    A_t = δ_t + γλ·A_{t+1};    returns = A + V

    Args:
        rewards, values: [T, N], [T] or any shape whose dimension `time_dim` is time; V in units of discounted reward.
        last_values: [N] (of 1-D inputs [] or [1]): V of the state after the last step; absent: 0.
        terminated: [T, N], set where the step ended its episode in a terminal state: no V(s_{t+1}), trace cut.
        truncated: [T, N], set where the episode was cut off after the step: V(s_{t+1}) is `final_values`, trace cut.
        final_values: needed with `truncated`, read only where truncated and not terminated: [T, N], or a pair
            (flat_index [K], value [K]) of positions in the flattened rewards. A truncated step without an entry raises.
        mask: [T, N]; the outputs of masked steps (0) are 0 and their rewards and values are not read.
        mask_mode: "carry": a masked step is transparent, advantage and next value pass over it, its flags are not read.
            "zero": a masked step has reward and value 0 and is otherwise a step like any other.
        cu_seqlens: [S + 1], int32 or int64: inputs are packed trajectories [M], one from each border to the next;
            `last_values`, `gamma` and `lam` are then per sequence, [S].
        gamma, lam: numbers in [0, 1], or tensors of one per column, [N].
        time_dim: dimension of time; memory where columns (0) or where steps (1) are neighbours is read as it lies.
        differentiable: differentiate through the estimate (the plain torch formula).
        out: (advantages, returns) to write to, contiguous, of the results' shape and dtype, apart from every input. Worth
            it above 32 MiB, where an allocator maps fresh pages on every call: that takes longer than the scan.
        moments: True returns a third result, what `whiten` needs to know of the advantages that the mask keeps:
            `whiten(advantages, mask=mask, moments=moments)` then reads them once, not twice.

    Flags and masks are bool, integer or floating, set where not 0; floating inputs float32, float64, bfloat16 or
    float16, in any strides.

    Returns:
        (advantages, returns), float32 (float64 where rewards or values are), contiguous in the shape of `rewards`; with
        `moments` a third, float64 [3]: n, their mean m and Σ (A_t - m)², joined over blocks in a fixed order (Chan et al.
        1979). Zeros where no advantage is valid. Its last bits depend on the layout, not on threads or the run.

    Gradient: none; the inputs are constants, also where they require a gradient, unless `differentiable`; then of all
    three results.

    Errors: TypeError for a dtype or a missing tensor, ValueError for a shape, a rate or an absent final value.

    Cost: reads each input once, writes two outputs: float32 with bool `terminated` 17 bytes a step. With `moments` no more
    on a GPU, where every path sums what it writes; on the CPU the first pass of `whiten` comes after the scan, 4 bytes.
    Bits do not depend on threads, instruction set, layout, or what else is in the batch; packed and padded sequences agree.
    """
    if out is not None:
        return _into(out, rewards, values, last_values, terminated, truncated, final_values, mask, mask_mode, cu_seqlens,
                     gamma, lam, time_dim, differentiable, moments)  # fmt: skip
    if not differentiable:
        if torch.compiler.is_compiling():
            results = _op(*map(_scan.constant, (rewards, values, last_values, terminated, truncated)),
                          *_scan.split_final(final_values), mask, mask_mode, cu_seqlens, *_scan.split_rate(gamma),
                          *_scan.split_rate(lam), time_dim, moments)  # fmt: skip
            return results if moments else results[:2]
        backend = _backend.pick("gae", rewards)
        if backend is not None:
            if rewards.ndim > 2 or not backend.checks:
                _check(rewards, values, last_values, terminated, truncated, final_values, mask, mask_mode, cu_seqlens,
                       gamma, lam, time_dim)  # fmt: skip
            if rewards.ndim <= 2:
                return _fill(backend, rewards, values, last_values, terminated, truncated, final_values, mask, mask_mode,
                             cu_seqlens, gamma, lam, time_dim, moments)  # fmt: skip
            grid = _scan.Grids(rewards.shape, time_dim)
            advantages, returns, *found = _fill(
                backend, grid(rewards), grid(values), grid.rows(last_values), grid(terminated), grid(truncated),
                grid.final(final_values), grid(mask), mask_mode, None, grid.rows(gamma), grid.rows(lam), grid.time_dim, moments,
            )  # fmt: skip
            return grid.back(advantages), grid.back(returns), *found
    if not torch.compiler.is_compiling():
        _check(rewards, values, last_values, terminated, truncated, final_values, mask, mask_mode, cu_seqlens, gamma,
               lam, time_dim)  # fmt: skip
    result = reference.gae(
        rewards, values, last_values, terminated=terminated, truncated=truncated, final_values=final_values, mask=mask,
        mask_mode=mask_mode, cu_seqlens=cu_seqlens, gamma=gamma, lam=lam, time_dim=time_dim, moments=moments,
    )  # fmt: skip
    return result if differentiable else tuple(x.detach() for x in result)


def _into(out, rewards, values, last_values, terminated, truncated, final_values, mask, mask_mode, cu_seqlens, gamma, lam,
          time_dim, differentiable, moments):  # fmt: skip
    if differentiable:
        raise ValueError("gae: out cannot be given with differentiable=True")
    _scan.check_out("gae", out, rewards, values, (last_values, terminated, truncated, mask))
    backend = None if rewards.ndim > 2 or torch.compiler.is_compiling() else _backend.pick("gae", rewards)
    if backend is not None:
        if not backend.checks:
            _check(rewards, values, last_values, terminated, truncated, final_values, mask, mask_mode, cu_seqlens, gamma,
                   lam, time_dim)  # fmt: skip
        torch.autograd.graph.increment_version(out)
        return _fill(backend, rewards, values, last_values, terminated, truncated, final_values, mask, mask_mode, cu_seqlens,
                     gamma, lam, time_dim, moments, out)  # fmt: skip
    fresh = gae(rewards, values, last_values, terminated=terminated, truncated=truncated, final_values=final_values,
                mask=mask, mask_mode=mask_mode, cu_seqlens=cu_seqlens, gamma=gamma, lam=lam,
                time_dim=time_dim, moments=moments)  # fmt: skip
    return *(to.copy_(x) for to, x in zip(out, fresh[:2], strict=True)), *fresh[2:]


def _fill(backend, rewards, values, last_values, terminated, truncated, final_values, mask, mask_mode, cu_seqlens, gamma, lam,
          time_dim, moments, out=None):  # fmt: skip
    double = _scan.is_double(rewards, values)
    if out is None:
        advantages = _scan.empty(rewards, double)
        returns = _memory.empty_like(advantages)
    else:
        advantages, returns = out
    found = torch.empty(3, dtype=torch.float64, device=advantages.device) if moments else None
    final_values = _scan.final_grid(backend, final_values, rewards)
    backend.ops.gae(rewards, values, last_values, terminated, truncated, final_values, mask, mask_mode,
                    _scan.borders(backend, cu_seqlens), gamma, lam, time_dim, double, advantages, returns, found,
                    backend.resources())  # fmt: skip
    return (advantages, returns) if found is None else (advantages, returns, found)


def _check(rewards, values, last_values, terminated, truncated, final_values, mask, mask_mode, cu_seqlens, gamma, lam,
           time_dim):  # fmt: skip
    if mask_mode not in ("carry", "zero"):
        raise ValueError(f"gae: mask_mode must be 'carry' or 'zero', got {mask_mode!r}")
    _scan.check("gae", {"rewards": rewards, "values": values}, last_values,
                {"terminated": terminated, "truncated": truncated, "mask": mask}, final_values,
                {"gamma": gamma, "lam": lam}, {}, cu_seqlens, time_dim, mask_mode == "carry")  # fmt: skip


# --- under torch.compile ----------------------------------------------------------------------------------------------


def _kernel(rewards, values, last_values, terminated, truncated, final_values, final_index, mask, mask_mode, cu_seqlens,
            gamma, gamma_row, lam, lam_row, time_dim, moments=False):  # fmt: skip
    advantages, returns, *found = gae(
        rewards, values, last_values, terminated=terminated, truncated=truncated,
        final_values=_scan.joined_final(final_values, final_index), mask=mask, mask_mode=mask_mode, cu_seqlens=cu_seqlens,
        gamma=_scan.joined_rate(gamma, gamma_row), lam=_scan.joined_rate(lam, lam_row), time_dim=time_dim, moments=moments,
    )  # fmt: skip
    return advantages.contiguous(), returns.contiguous(), *(found or (_library.placeholder(rewards),))


def _fake(rewards, values, *rest):
    found = rewards.new_empty(3, dtype=torch.float64) if rest[-1] is True else _library.placeholder(rewards)
    return _scan.fake(rewards, values), _scan.fake(rewards, values), found


_op = _library.define(
    "gae",
    "(Tensor rewards, Tensor values, Tensor? last_values, Tensor? terminated, Tensor? truncated, Tensor? final_values, "
    "Tensor? final_index, Tensor? mask, str mask_mode, Tensor? cu_seqlens, float gamma, Tensor? gamma_row, float lam, "
    "Tensor? lam_row, int time_dim, bool moments=False) -> (Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
)
