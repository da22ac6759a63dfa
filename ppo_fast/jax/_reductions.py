"""Reductions as weights, for JAX: what `ppo_fast.reductions` is for torch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ._call import Array


class Sequences:
    """The sequences that tokens belong to: rows of [..., T], or the pieces of packed [M] that cu_seqlens [S + 1] names."""

    def __init__(self, shape: tuple[int, ...], cu_seqlens: Array | None) -> None:
        self.shape, self.piece, self.count = shape, None, 0
        if cu_seqlens is not None:
            self.count = cu_seqlens.shape[0] - 1
            self.piece = jnp.searchsorted(cu_seqlens[1:], jnp.arange(shape[0]), side="right")  # of each token

    def total(self, x: Array) -> Array:
        """[..., T] -> [..., 1], or [M] -> [S]."""
        if self.piece is None:
            return x.sum(-1, keepdims=True)
        return jax.ops.segment_sum(x, self.piece, self.count, indices_are_sorted=True)

    def spread(self, x: Array) -> Array:
        """[..., 1] -> [..., T], or [S] -> [M]."""
        return jnp.broadcast_to(x, self.shape) if self.piece is None else x[self.piece]

    def mean(self, x: Array, valid: Array | None) -> Array:
        """Of every token's sequence, over its valid tokens; x is 0 elsewhere."""
        ones = jnp.ones_like(x) if valid is None else valid.astype(x.dtype)
        return self.spread(self.total(x) / jnp.maximum(self.total(ones), 1.0))


def token_weights(
    shape: tuple[int, ...],
    dtype: Any,
    valid: Array | None,
    reduction: str,
    weights: Array | None,
    denominator: float | Array | None,
    cu_seqlens: Array | None,
) -> Array:
    """w_t; 0 where not `valid`. `denominator` replaces the count that a reduction divides by."""
    ones = jnp.ones(shape, dtype) if valid is None else valid.astype(dtype)
    if weights is not None:
        w = weights.astype(dtype)
        w = w if valid is None else jnp.where(valid, w, 0.0)
        return w if denominator is None else w / denominator
    if reduction == "sum":
        return ones if denominator is None else ones / denominator
    if reduction == "token-mean":
        return ones / (jnp.maximum(ones.sum(), 1.0) if denominator is None else denominator)
    rows = Sequences(shape, cu_seqlens)
    valid_in_row = rows.total(ones)
    n_rows = jnp.maximum((valid_in_row > 0).sum(), 1)  # a row with nothing in it is no sequence
    w = jnp.asarray(1.0, dtype) / jnp.asarray(n_rows if denominator is None else denominator, dtype)
    if reduction == "seq-mean-token-sum":
        return ones * w
    # or XLA divides once where torch divides twice, or by a constant with its reciprocal, and the last bit is another
    w, valid_in_row = jax.lax.optimization_barrier((w, jnp.maximum(valid_in_row, 1.0)))
    return ones * rows.spread(w / valid_in_row)
