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
    moments: Tensor | None = None,
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
        differentiable: True lets gradients flow to x (and to `moments`), through the reference. Otherwise they are constants.
        moments: of the valid elements of x, [3] float64: their count, mean m and Σ (x - m)², as `gae(..., moments=True)`
            leaves them; x is then read once, not twice. With `group`: this rank's, joined with the others'.

    Returns:
        y, [...], contiguous, float32 (float64 for float64 input). With no more than `ddof` valid elements there is no
        deviation: they are returned as they are (Stable-Baselines3 leaves a minibatch of one alone; others give NaN).

    Numerics: deviations from tile means, tiles joined in double (Chan et al. 1979); the same bits for any thread count.

    Errors: TypeError for a dtype, ValueError for a shape, ddof or eps.

    Cost: reads x twice, mask twice, writes y once: 12 bytes an element in float32; with `moments` 8.
    """
    if ddof not in (0, 1):
        raise ValueError(f"whiten: ddof must be 0 or 1, got {ddof!r}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"whiten: eps must be finite and >= 0, got {eps!r}")
    if moments is not None:
        _check_moments(x, moments)
    if torch.compiler.is_compiling() and group is None and not differentiable and _backend.compiles_kernel(x):
        known = None if moments is None else moments.detach()
        return _op(x.detach(), mask, ddof, float(eps), shift_mean, eps_in_variance, known)
    backend = None
    if not differentiable and not torch.compiler.is_compiling():
        backend = _backend.pick("whiten", x)
    if backend is None or not backend.checks:
        _checks.same_shape("whiten", x.shape, "the shape of x", mask=mask)
        _checks.same_device("whiten", x, mask=mask)
    if backend is None:
        x = x if differentiable else x.detach()
        if moments is not None and not differentiable:
            moments = moments.detach()
        if group is not None:
            moments = joined_moments(reference.moments_of(x, mask) if moments is None else moments, group)
        return reference.whiten(x, mask=mask, ddof=ddof, eps=eps, shift_mean=shift_mean,
                                eps_in_variance=eps_in_variance, moments=moments)  # fmt: skip
    _checks.floating("whiten", x=x)
    out = _memory.empty_like(x, _dtype_of_result(x))
    options = (ddof, eps, shift_mean, eps_in_variance, backend.resources())
    if group is not None:
        if moments is None:
            moments = torch.empty(3, dtype=torch.float64, device=x.device)
            backend.ops.whiten(x, mask, None, moments, False, *options)
        moments = joined_moments(moments.detach(), group).to(x.device)
    elif moments is not None:
        moments = moments.detach().contiguous()
    backend.ops.whiten(x, mask, out, moments, moments is not None, *options)
    return out


def _dtype_of_result(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_moments(x: Tensor, moments: Tensor) -> None:
    if not isinstance(moments, Tensor):
        raise TypeError(f"whiten: moments must be [3] float64, got {type(moments).__name__}")
    if moments.dtype != torch.float64 or moments.shape != (3,):
        kind = ValueError if moments.dtype == torch.float64 else TypeError
        dtype = str(moments.dtype).removeprefix("torch.")
        raise kind(f"whiten: moments must be [3] float64, got {list(moments.shape)} {dtype}")
    if isinstance(x, Tensor):
        _checks.same_device("whiten", x, moments=moments)


def joined_moments(local: Tensor, group: Any) -> Tensor:
    """Count, mean and m2 over all ranks from each rank's, joined in rank order."""
    local = local.contiguous()
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
    return torch.stack([count, mean, m2])


# --- under torch.compile ----------------------------------------------------------------------------------------------


def _kernel(x, mask, ddof, eps, shift_mean, eps_in_variance, moments=None):
    return whiten(
        x, mask=mask, ddof=ddof, eps=eps, shift_mean=shift_mean, eps_in_variance=eps_in_variance, moments=moments
    )


def _fake(x, mask, ddof, eps, shift_mean, eps_in_variance, moments=None):
    return torch.empty_like(x, dtype=_dtype_of_result(x), memory_format=torch.contiguous_format)


_op = _library.define(
    "whiten",
    "(Tensor x, Tensor? mask, int ddof, float eps, bool shift_mean, bool eps_in_variance, "
    "Tensor? moments=None) -> Tensor",
    _kernel,
    _fake,
)
