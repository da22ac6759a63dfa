"""Sums over the tokens of a sequence, and reductions as weights: loss = Σ w_t·l_t, with w made of the mask and the
reduction's name (language-model trainers differ only here). Used by the reference and, for all but the plain means and
sums, ahead of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor


class Sequences:
    """The sequences that tokens belong to: rows of [..., T], or the pieces of packed [M] that cu_seqlens [S + 1] names.

    `total` sums over each sequence, `spread` gives every token what its sequence has; each is the other's derivative.
    Both in a fixed order: the same bits in every run.
    """

    def __init__(self, like: Tensor, cu_seqlens: Tensor | None) -> None:
        self.shape, self.lengths = like.shape, None
        if cu_seqlens is not None:
            self.lengths = cu_seqlens.long().diff()
            pieces = torch.arange(len(self.lengths), device=like.device)
            self.piece = torch.repeat_interleave(pieces, self.lengths, output_size=like.numel())  # of each token

    def total(self, x: Tensor) -> Tensor:
        """[..., T] -> [..., 1], or [M] -> [S]."""
        return x.sum(-1, keepdim=True) if self.lengths is None else _Total.apply(x, self)

    def largest(self, x: Tensor) -> Tensor:
        """As `total`; no derivative."""
        if self.lengths is None:
            return x.amax(-1, keepdim=True) if x.numel() else self.total(x)
        return torch.segment_reduce(x, "max", lengths=self.lengths, unsafe=True)

    def spread(self, x: Tensor) -> Tensor:
        """[..., 1] -> [..., T], or [S] -> [M]."""
        return x.expand(self.shape) if self.lengths is None else _Spread.apply(x, self)

    def mean(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Of every token's sequence, over its valid tokens; x is 0 elsewhere."""
        ones = torch.ones_like(x) if valid is None else valid.to(x.dtype)
        return self.spread(self.total(x) / self.total(ones).clamp(min=1.0))


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows):
        ctx.rows = rows
        return torch.segment_reduce(x, "sum", lengths=rows.lengths, unsafe=True)

    @staticmethod
    def backward(ctx, g):
        return _Spread.apply(g, ctx.rows), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows):
        ctx.rows = rows
        return x[rows.piece]

    @staticmethod
    def backward(ctx, g):
        return _Total.apply(g.contiguous(), ctx.rows), None


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
    rows = Sequences(like, cu_seqlens)
    valid_in_row = rows.total(ones)
    n_rows = (valid_in_row > 0).sum().clamp(min=1)  # a row with nothing in it is no sequence
    w = ones / (n_rows if denominator is None else denominator)
    return w / rows.spread(valid_in_row.clamp(min=1.0)) if reduction == "seq-mean-token-mean" else w


def moments(x: Tensor, valid: Tensor | None, ddof: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance (two passes) over the valid elements."""
    x = x if valid is None else torch.where(valid, x, 0.0)
    count = x.new_tensor(float(x.numel())) if valid is None else valid.sum().to(x.dtype)
    mean = x.sum() / count.clamp(min=1.0)
    squares = (x - mean).square()
    squares = squares if valid is None else torch.where(valid, squares, 0.0)
    return count, mean, squares.sum() / (count - ddof).clamp(min=1.0)


def normalized(x: Tensor, valid: Tensor | None, ddof: int, eps: float | Tensor) -> Tensor:
    """(x - mean) / (std + eps) over the valid elements; as it is where there are no more than ddof."""
    count, mean, var = moments(x, valid, ddof)
    return torch.where(count > ddof, (x - mean) / (var.sqrt() + eps), x)
