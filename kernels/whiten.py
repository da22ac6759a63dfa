"""Whitening: zero mean, unit deviation over the valid elements.

Two launches up to MOMENT_BLOCK·INLINE elements: moments of blocks, then the map, which joins them by itself. x is read
twice, mask twice, y written once: 12 bytes an element in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _reduce
from ._launch import launch

_BLOCK = 1024


@triton.jit(do_not_specialize=["n", "parts"])
def _whiten_kernel(
    x, mask, moments, out, n, parts, eps: tl.float64, DDOF: tl.constexpr, SHIFT_MEAN: tl.constexpr,
    EPS_IN_VARIANCE: tl.constexpr, EVEN: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, INLINE: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) / (std + eps), or x where there is no deviation to speak of. csrc/cpu/whiten.inc."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < _reduce.length(n, EVEN)
    p = _reduce.place_of(i, inside, None, 0, mask)
    v = _reduce.read(x, i, p, T)
    m = _reduce.load_moments(moments, 0, parts, parts, INLINE)
    enough = m.count > DDOF
    variance = m.m2 / tl.where(enough, m.count - DDOF, 1.0)
    divisor = tl.sqrt(variance + eps) if EPS_IN_VARIANCE else tl.sqrt(variance) + eps
    mean = m.mean.to(T)
    y = (v - mean) / divisor.to(T)
    if not SHIFT_MEAN:
        y = y + mean
    tl.store(out + i, tl.where(p.valid, tl.where(enough, y, v), 0.0), mask=inside)


def whiten(
    x: Tensor, mask: Tensor | None, out: Tensor | None, moments: Tensor | None, have_moments: bool, ddof: int, eps: float,
    shift_mean: bool, eps_in_variance: bool, resources: object, /,
) -> None:  # fmt: skip
    """As ppo_fast._C.whiten: fills `out`, from `moments` [3] where it has them, or fills `moments` where `out` is None."""
    T = tl.float64 if x.dtype == torch.float64 else tl.float32
    n, x, mask = x.numel(), _reduce.flat(x), _reduce.flat(mask)
    if out is None:
        found, _ = _reduce.moments_of(x, mask, None, n, T, most=1)
        moments.copy_(found.view(3))
        return
    found, parts = (moments, 1) if have_moments else _reduce.moments_of(x, mask, None, n, T)
    if n == 0:
        return
    launch(_whiten_kernel, (triton.cdiv(n, _BLOCK),), x, mask, found, out, n, parts, float(eps), DDOF=ddof,
           SHIFT_MEAN=shift_mean, EPS_IN_VARIANCE=eps_in_variance, EVEN=n % 16 == 0, T=T, BLOCK=_BLOCK, INLINE=_reduce.INLINE,
           num_warps=4)  # fmt: skip


_TYPES = {"x": "*fp32", "mask": "constexpr", "moments": "*fp64", "out": "*fp32", "n": "i32", "parts": "i32", "eps": "fp64",
          "DDOF": "constexpr", "SHIFT_MEAN": "constexpr", "EPS_IN_VARIANCE": "constexpr", "EVEN": "constexpr", "T": "constexpr",
          "BLOCK": "constexpr", "INLINE": "constexpr"}  # fmt: skip
_VALUES = {"mask": None, "DDOF": 1, "SHIFT_MEAN": True, "EPS_IN_VARIANCE": False, "EVEN": True, "T": tl.float32, "BLOCK": _BLOCK,
           "INLINE": _reduce.INLINE}  # fmt: skip
_MASKED = {k: v for k, v in _VALUES.items() if k != "mask"}
AOT = [
    (_whiten_kernel, _TYPES, _VALUES, {"num_warps": 4}),
    (_whiten_kernel, {**_TYPES, "x": "*bf16", "mask": "*i1"}, {**_MASKED, "EPS_IN_VARIANCE": True}, {"num_warps": 4}),
    (_whiten_kernel, {**_TYPES, "x": "*fp64", "out": "*fp64", "mask": "*fp32"},
     {**_MASKED, "T": tl.float64, "SHIFT_MEAN": False, "DDOF": 0}, {"num_warps": 4}),
]  # fmt: skip
