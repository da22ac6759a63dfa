"""Reductions are weights: loss = Σ w_t·l_t, with w made of the mask and the reduction's name (language-model trainers
differ only here). Used by the reference and, for all but the plain means and sums, ahead of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def token_weights(
    like: Tensor,
    valid: Tensor | None,
    reduction: str,
    weights: Tensor | None,
    denominator: float | Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """w_t in the shape of `like`; 0 where not `valid`. `denominator` replaces the count that a reduction divides by."""
    ones = torch.ones_like(like) if valid is None else valid.to(like.dtype)
    if weights is not None:
        w = weights.to(like.dtype)
        w = w if valid is None else torch.where(valid, w, 0.0)
        return w if denominator is None else w / denominator
    if reduction == "sum":
        return ones if denominator is None else ones / denominator
    if reduction == "token-mean":
        return ones / (ones.sum().clamp(min=1.0) if denominator is None else denominator)
    if cu_seqlens is not None:
        lengths = cu_seqlens.long().diff()
        row = torch.repeat_interleave(torch.arange(len(lengths), device=like.device), lengths, output_size=like.numel())
        valid_in_row = torch.zeros(len(lengths), dtype=like.dtype, device=like.device).index_add_(0, row, ones)
        n_rows = (valid_in_row > 0).sum().clamp(min=1)
        valid_in_row = valid_in_row[row]
    else:
        valid_in_row = ones.sum(-1, keepdim=True)
        n_rows = (valid_in_row > 0).sum().clamp(min=1)  # a row with nothing in it is no sequence
    w = ones / (n_rows if denominator is None else denominator)
    return w / valid_in_row.clamp(min=1.0) if reduction == "seq-mean-token-mean" else w
