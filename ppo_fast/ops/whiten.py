"""Whitening: zero mean, unit deviation over the valid elements."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _backend, _library, _memory, reference
from . import _checks


def whiten(
    x: Tensor,
    *,
    mask: Tensor | None = None,
    ddof: int = 1,
    eps: float = 1e-8,
    shift_mean: bool = True,
    group: Any = None,
    eps_in_variance: bool = False,
    differentiable: bool = False,
) -> Tensor:
    """y = (x - mean) / (std + eps) over the elements that `mask` keeps; what control trainers do to advantages.

    Args:
        x: [...], any strides, float32/float64/bfloat16/float16; usually advantages.
        mask: [...], bool, integer or floating; where it is 0, x is not read and y is 0.
        ddof: the variance divides by count - ddof; 1 is Bessel's correction (torch.std), 0 the biased one.
        eps: added to the standard deviation.
        shift_mean: False adds the mean back, so only the scale changes.
        group: a torch.distributed process group; mean and variance are then over all its ranks.
        eps_in_variance: sqrt(var + eps) instead, as language-model trainers have it (TRL, verl).
        differentiable: True lets gradients flow to x, through the reference. Otherwise x is a constant.

    Returns:
        y, [...], contiguous, float32 (float64 for float64 input). With no more than `ddof` valid elements there is no
        deviation: they are returned as they are (Stable-Baselines3 leaves a minibatch of one alone; others give NaN).

    Numerics: deviations from tile means, tiles joined in double (Chan et al. 1979); the same bits for any thread count.

    Errors: TypeError for a dtype, ValueError for a shape, ddof or eps.

    Cost: reads x twice, mask twice, writes y once: 12 bytes an element in float32.
    """
    if ddof not in (0, 1):
        raise ValueError(f"whiten: ddof must be 0 or 1, got {ddof!r}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"whiten: eps must be finite and >= 0, got {eps!r}")
    if torch.compiler.is_compiling() and group is None and not differentiable and _backend.compiles_kernel(x):
        return _op(x.detach(), mask, ddof, float(eps), shift_mean, eps_in_variance)
    backend = None
    if not differentiable and not torch.compiler.is_compiling():
        backend = _backend.pick("whiten", x)
    if backend is None or not backend.checks:
        _checks.same_shape("whiten", x.shape, "the shape of x", mask=mask)
        _checks.same_device("whiten", x, mask=mask)
    if backend is None:
        x = x if differentiable else x.detach()
        moments = None if group is None else _joined(_reference_moments(x, mask), ddof, group)
        return reference.whiten(x, mask=mask, ddof=ddof, eps=eps, shift_mean=shift_mean,
                                eps_in_variance=eps_in_variance, moments=moments)  # fmt: skip
    _checks.floating("whiten", x=x)
    out = _memory.empty_like(x, _dtype_of_result(x))
    options = (ddof, eps, shift_mean, eps_in_variance, backend.resources())
    if group is None:
        backend.ops.whiten(x, mask, out, None, False, *options)
        return out
    local = torch.empty(3, dtype=torch.float64, device=x.device)
    backend.ops.whiten(x, mask, None, local, False, *options)
    count, mean, variance = _joined(local, ddof, group)
    everywhere = torch.stack([count, mean, variance * (count - ddof).clamp(min=1.0)]).to(x.device)
    backend.ops.whiten(x, mask, out, everywhere, True, *options)
    return out


def _dtype_of_result(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _reference_moments(x: Tensor, mask: Tensor | None) -> Tensor:
    count, mean, variance = reference._moments(x.double(), None if mask is None else mask != 0, 0)
    return torch.stack([count, mean, variance * count.clamp(min=1.0)])


def _joined(local: Tensor, ddof: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance over all ranks from each rank's (count, mean, m2), joined in rank order."""
    parts = [torch.empty_like(local) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, local, group=group)
    count, mean, m2 = parts[0]
    for other_count, other_mean, other_m2 in parts[1:]:
        total = count + other_count
        share = torch.where(total > 0, other_count / total, 0.0)
        delta = other_mean - mean
        mean = mean + delta * share
        m2 = m2 + other_m2 + delta * delta * (count * share)
        count = total
    return count, mean, m2 / (count - ddof).clamp(min=1.0)


# --- under torch.compile ----------------------------------------------------------------------------------------------


def _kernel(x, mask, ddof, eps, shift_mean, eps_in_variance):
    return whiten(x, mask=mask, ddof=ddof, eps=eps, shift_mean=shift_mean, eps_in_variance=eps_in_variance)


def _fake(x, mask, ddof, eps, shift_mean, eps_in_variance):
    return torch.empty_like(x, dtype=_dtype_of_result(x), memory_format=torch.contiguous_format)


_op = _library.define(
    "whiten",
    "(Tensor x, Tensor? mask, int ddof, float eps, bool shift_mean, bool eps_in_variance) -> Tensor",
    _kernel,
    _fake,
)
