"""Log-prob and entropy of rows of Bernoullis [n, D], and the gradient of the logits.

Bytes an element, float32 logits with bool actions: forward 5, backward 9. One exponential t = e^-|z| serves mass, entropy
and gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._formulas import log1p_of
from ._launch import launch
from ._rows import as_type, blocks, compute_type, example, matrix, read_vector, tile_of, tile_offsets, vector

_LONGEST = 128  # dimensions of a tile

_SIZES = ["n", "D", "logits_row", "logits_column", "action_row", "action_column"]
_GRADIENT_SIZES = ["g_stride", "h_stride", "grad_row", "grad_column"]


@triton.jit
def bernoulli_term(z, one):
    """(log mass, entropy). csrc/math/bernoulli.h: the side is chosen before it is multiplied, so 0·inf cannot happen."""
    size = tl.abs(z)
    t = tl.exp(-size)
    log_sum = log1p_of(t)
    toward = tl.where(one, -z, z)
    log_mass = -(tl.where(toward < 0.0, 0.0, toward) + log_sum)
    return log_mass, tl.where(size == float("inf"), 0.0, log_sum + size * (t / (1.0 + t)))


@triton.jit
def bernoulli_grad(z, one, g, h):
    """d/dz of g·log mass + h·entropy: g·(action - σ(z)) - h·z·σ(z)·σ(-z)."""
    size = tl.abs(z)
    t = tl.exp(-size)
    large = 1.0 / (1.0 + t)
    small = t / (1.0 + t)
    up = tl.where(z < 0.0, small, large)
    down = tl.where(z < 0.0, large, small)
    return g * tl.where(one, down, -up) - h * tl.where(size == float("inf"), 0.0, z * up * down)


@triton.jit
def _read(
    logits, actions, i, columns, logits_row, logits_column, action_row, action_column, there, DTYPE: tl.constexpr
):
    z = tl.load(logits + tile_offsets(i * logits_row, columns, logits_column, False), mask=there, other=0.0)
    one = tl.load(actions + tile_offsets(i * action_row, columns, action_column, False), mask=there, other=0)
    return as_type(z, DTYPE), one != 0


@triton.jit(do_not_specialize=_SIZES)
def bernoulli_forward(
    logits, actions, log_prob, entropy, n: tl.int64, D: tl.int64, logits_row: tl.int64, logits_column: tl.int64,
    action_row: tl.int64, action_column: tl.int64, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = i < n
    total = tl.zeros((ROWS,), DTYPE)
    total_entropy = tl.zeros((ROWS,), DTYPE)
    first = 0
    while first < D:
        columns = first + tl.arange(0, COLUMNS)
        there = inside[:, None] & (columns < D)[None, :]
        z, one = _read(logits, actions, i, columns, logits_row, logits_column, action_row, action_column, there, DTYPE)
        lp, h = bernoulli_term(z, one)
        total += tl.sum(tl.where(there, lp, 0.0), 1)
        total_entropy += tl.sum(tl.where(there, h, 0.0), 1)
        first += COLUMNS
    tl.store(log_prob + i, total, mask=inside)
    if entropy is not None:
        tl.store(entropy + i, total_entropy, mask=inside)


@triton.jit(do_not_specialize=_SIZES + _GRADIENT_SIZES)
def bernoulli_backward(
    logits, actions, d_log_prob, d_entropy, d_logits, n: tl.int64, D: tl.int64, logits_row: tl.int64,
    logits_column: tl.int64, action_row: tl.int64, action_column: tl.int64, g_stride: tl.int64, h_stride: tl.int64,
    grad_row: tl.int64, grad_column: tl.int64, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = i < n
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    g = read_vector(d_log_prob, i, g_stride, inside, DTYPE)
    h = read_vector(d_entropy, i, h_stride, inside, DTYPE)
    there = inside[:, None] & (columns < D)[None, :]
    live = there & ((g != 0.0) | (h != 0.0))[:, None]
    z, one = _read(logits, actions, i, columns, logits_row, logits_column, action_row, action_column, live, DTYPE)
    d = tl.where(live, bernoulli_grad(z, one, g[:, None], h[:, None]), 0.0)
    at = tile_offsets(i * grad_row, columns, grad_column, False)
    tl.store(d_logits + at, d.to(d_logits.dtype.element_ty), mask=there)


# --- the raw calls ----------------------------------------------------------------------------------------------------


def bernoulli_log_prob(logits, actions, log_prob, entropy, resources=None):
    n, width = log_prob.numel(), logits.shape[-1]
    if n == 0:
        return
    (logits, *of_logits), (actions, *of_actions) = matrix(logits), matrix(actions)
    tile, columns, warps = tile_of(width, _LONGEST)
    launch(
        bernoulli_forward, (blocks(n, tile),), logits, actions, log_prob, entropy, n, width, *of_logits, *of_actions,
        DTYPE=compute_type(log_prob.dtype), ROWS=tile, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip


def bernoulli_log_prob_backward(logits, actions, d_log_prob, d_entropy, d_logits, resources=None):
    if d_logits.numel() == 0:
        return
    width = logits.shape[-1]
    n = logits.numel() // width
    (logits, *of_logits), (actions, *of_actions), (found, *of_grad) = matrix(logits), matrix(actions), matrix(d_logits)
    d_log_prob, g_stride = vector(d_log_prob)
    d_entropy, h_stride = vector(d_entropy)
    tile, columns, warps = tile_of(width, _LONGEST)
    launch(
        bernoulli_backward, (blocks(n, tile), blocks(width, columns)), logits, actions, d_log_prob, d_entropy, found, n, width,
        *of_logits, *of_actions, g_stride, h_stride, *of_grad,
        DTYPE=compute_type(logits.dtype), ROWS=tile, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    if found is not d_logits:
        d_logits.copy_(found)


# --- compiled ahead of time, to see that they compile -----------------------------------------------------------------

_F32 = {x: "*fp32" for x in ("logits", "log_prob", "entropy", "d_log_prob", "d_entropy", "d_logits")}
_HALF = _F32 | {"logits": "*bf16", "d_logits": "*bf16"}
_SMALL = {"DTYPE": tl.float32, "ROWS": 128, "COLUMNS": 8}
_WIDE = {"DTYPE": tl.float32, "ROWS": 8, "COLUMNS": 128}

AOT = [
    example(bernoulli_forward, _F32 | {"actions": "*i1"}, _SMALL, num_warps=4),
    example(bernoulli_forward, _HALF | {"actions": "*fp32"}, _WIDE, num_warps=4),
    example(bernoulli_backward, _F32 | {"actions": "*i64"}, _SMALL, num_warps=4),
    example(bernoulli_backward, _HALF | {"actions": "*i1"}, _WIDE, num_warps=4),
]
