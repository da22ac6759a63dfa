"""Gradients that a loss wrote for grad_output = 1, times what came in.

Read and written in place, 8 bytes an element in float32, one launch a gradient; nothing but grad_output is read where that
is 1, and the host never asks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _reduce
from ._launch import launch

_BLOCK = 4096


@triton.jit(do_not_specialize=["n"])
def _scale_kernel(grad_loss, grad, n, EVEN: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    by = tl.load(grad_loss).to(T)
    if by != 1.0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < _reduce.length(n, EVEN)
        x = tl.load(grad + i, mask=inside, other=0.0).to(T)
        _reduce.store(grad + i, x * by, inside)


def scale(grad_loss: Tensor, *grads: Tensor | None) -> None:
    """grad *= grad_loss for each that is not None: contiguous, any float dtype; grad_loss 0-dim on the same device."""
    for grad in grads:
        if grad is not None and grad.numel() > 0:
            n, T = grad.numel(), tl.float64 if grad.dtype == torch.float64 else tl.float32
            launch(
                _scale_kernel,
                (triton.cdiv(n, _BLOCK),),
                grad_loss,
                grad,
                n,
                EVEN=n % 16 == 0,
                T=T,
                BLOCK=_BLOCK,
                num_warps=8,
            )


_TYPES = {
    "grad_loss": "*fp32",
    "grad": "*fp32",
    "n": "i32",
    "EVEN": "constexpr",
    "T": "constexpr",
    "BLOCK": "constexpr",
}
AOT = [
    (_scale_kernel, _TYPES, {"EVEN": True, "T": tl.float32, "BLOCK": _BLOCK}, {"num_warps": 8}),
    (_scale_kernel, {**_TYPES, "grad": "*bf16"}, {"EVEN": True, "T": tl.float32, "BLOCK": _BLOCK}, {"num_warps": 8}),
    (_scale_kernel, {**_TYPES, "grad_loss": "*fp64", "grad": "*fp64"}, {"EVEN": True, "T": tl.float64, "BLOCK": _BLOCK},
     {"num_warps": 8}),
]  # fmt: skip
