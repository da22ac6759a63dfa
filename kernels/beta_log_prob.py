"""Log-prob and entropy of rows of Betas [n, D], and the gradients of alpha and beta.

Bytes an element, float32: forward 12, backward 20; arithmetic costs more. All of it is float64, since lgamma(α) + lgamma(β)
- lgamma(α + β) cancels. The gamma functions are taken at x + n >= 10 from their asymptotic series and brought back by the
recurrence, n the same ten steps for every element, each taken or passed over.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ._formulas import HALF_LOG_2PI, log1p_of
from ._launch import launch
from ._rows import as_type, blocks, example, matrix, narrow, read_vector, tile_of, tile_offsets, vector

_LONGEST = 64  # dimensions of a tile
_TILE = 128  # elements of a tile

_SIZES = ["n", "D", "alpha_row", "alpha_column", "beta_row", "beta_column", "action_row", "action_column"]
_GRADIENT_SIZES = ["g_stride", "h_stride", "d_alpha_row", "d_alpha_column", "d_beta_row", "d_beta_column"]


@triton.jit
def _raised(x):
    """y = x + n >= 10 for x > 0; Π (x + k), and of Σ 1/(x + k) and Σ 1/(x + k)² the numerators over it and its square.

    Numerators: one division then does for all steps, and nothing cancels. csrc/math/beta.h adds up the quotients.
    """
    y = tl.where(x < 0.0, float("nan"), x)
    product = tl.full(x.shape, 1.0, tl.float64)
    ones = tl.zeros(x.shape, tl.float64)
    squares = tl.zeros(x.shape, tl.float64)
    for _ in range(10):
        low = y < 10.0
        squares = tl.where(low, squares * (y * y) + product * product, squares)
        ones = tl.where(low, ones * y + product, ones)
        product = tl.where(low, product * y, product)
        y = tl.where(low, y + 1.0, y)
    return y, product, ones, squares


@triton.jit
def log_gamma(x):
    """log Γ(x) for x > 0 (Abramowitz and Stegun 6.1.41)."""
    y, product, _, _ = _raised(x)
    r = 1.0 / y
    q = r * r
    tail = 1.0 / 1188 - q * (691.0 / 360360 - q * (1.0 / 156))
    tail = r * (1.0 / 12 - q * (1.0 / 360 - q * (1.0 / 1260 - q * (1.0 / 1680 - q * tail))))
    return (((y - 0.5) * tl.log(y) - y) + HALF_LOG_2PI) + tail - tl.log(product)


@triton.jit
def digamma(x):
    """ψ(x) for x > 0 (6.3.18)."""
    y, product, ones, _ = _raised(x)
    r = 1.0 / y
    q = r * r
    tail = 1.0 / 252 - q * (1.0 / 240 - q * (1.0 / 132 - q * (691.0 / 32760)))
    return tl.log(y) - 0.5 * r - q * (1.0 / 12 - q * (1.0 / 120 - q * tail)) - ones / product


@triton.jit
def trigamma(x):
    """ψ'(x) for x > 0 (6.4.12)."""
    y, product, _, squares = _raised(x)
    r = 1.0 / y
    q = r * r
    tail = 1.0 / 42 - q * (1.0 / 30 - q * (5.0 / 66 - q * (691.0 / 2730)))
    tail = q * (1.0 / 6 - q * (1.0 / 30 - q * tail))
    return (r + r * tail) + 0.5 * q + squares / (product * product)


@triton.jit
def _times_log(a, x, log_x):
    """a·log x as torch.xlogy has it: 0 where a is 0, unless x is NaN."""
    return tl.where((a == 0.0) & (x == x), 0.0, a * log_x)


@triton.jit
def beta_term(alpha, beta, x, log_width):
    """(log-density, entropy) of one Beta at x in [0, 1]. csrc/math/beta.h."""
    total = alpha + beta
    log_norm = log_gamma(alpha) + log_gamma(beta) - log_gamma(total) + log_width
    log_prob = _times_log(alpha - 1.0, x, tl.log(x)) + _times_log(beta - 1.0, x, log1p_of(-x)) - log_norm
    entropy = log_norm - (alpha - 1.0) * digamma(alpha) - (beta - 1.0) * digamma(beta) + (total - 2.0) * digamma(total)
    return log_prob, entropy


@triton.jit
def beta_grad(alpha, beta, x, g, h):
    """(d/d alpha, d/d beta) of g·log-density + h·entropy. csrc/math/beta.h."""
    total = alpha + beta
    log_x = tl.where((alpha == 1.0) & (x <= 0.0), 0.0, tl.log(x))
    log_rest = tl.where((beta == 1.0) & (x >= 1.0), 0.0, log1p_of(-x))
    common = digamma(total)
    d_alpha = tl.where(g != 0.0, g * ((log_x - digamma(alpha)) + common), 0.0)
    d_beta = tl.where(g != 0.0, g * ((log_rest - digamma(beta)) + common), 0.0)
    common = (total - 2.0) * trigamma(total)
    d_alpha += tl.where(h != 0.0, h * (common - (alpha - 1.0) * trigamma(alpha)), 0.0)
    d_beta += tl.where(h != 0.0, h * (common - (beta - 1.0) * trigamma(beta)), 0.0)
    return d_alpha, d_beta


@triton.jit
def _read(x, i, row, columns, column, there):
    """A tile in float64; 1 where there is none, which all of the formulas take."""
    at = tile_offsets(i * row, columns, column, False)
    return as_type(tl.load(x + at, mask=there, other=1.0), tl.float64)


@triton.jit(do_not_specialize=_SIZES)
def beta_forward(
    alpha, beta, actions, low: tl.float64, width: tl.float64, log_width: tl.float64, log_prob, entropy, n: tl.int64,
    D: tl.int64, alpha_row: tl.int64, alpha_column: tl.int64, beta_row: tl.int64, beta_column: tl.int64,
    action_row: tl.int64, action_column: tl.int64, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = i < n
    total = tl.zeros((ROWS,), tl.float64)
    total_entropy = tl.zeros((ROWS,), tl.float64)
    first = 0
    while first < D:
        columns = first + tl.arange(0, COLUMNS)
        there = inside[:, None] & (columns < D)[None, :]
        a = _read(alpha, i, alpha_row, columns, alpha_column, there)
        b = _read(beta, i, beta_row, columns, beta_column, there)
        x = (_read(actions, i, action_row, columns, action_column, there) - low) / width
        lp, h = beta_term(a, b, x, log_width)
        total += tl.sum(tl.where(there, lp, 0.0), 1)
        total_entropy += tl.sum(tl.where(there, h, 0.0), 1)
        first += COLUMNS
    tl.store(log_prob + i, total.to(log_prob.dtype.element_ty), mask=inside)
    if entropy is not None:
        tl.store(entropy + i, total_entropy.to(entropy.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES + _GRADIENT_SIZES)
def beta_backward(
    alpha, beta, actions, low: tl.float64, width: tl.float64, d_log_prob, d_entropy, d_alpha, d_beta, n: tl.int64,
    D: tl.int64, alpha_row: tl.int64, alpha_column: tl.int64, beta_row: tl.int64, beta_column: tl.int64,
    action_row: tl.int64, action_column: tl.int64, g_stride: tl.int64, h_stride: tl.int64, d_alpha_row: tl.int64,
    d_alpha_column: tl.int64, d_beta_row: tl.int64, d_beta_column: tl.int64, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = i < n
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    g = read_vector(d_log_prob, i, g_stride, inside, tl.float64)
    h = read_vector(d_entropy, i, h_stride, inside, tl.float64)
    there = inside[:, None] & (columns < D)[None, :]
    live = there & ((g != 0.0) | (h != 0.0))[:, None]
    a = _read(alpha, i, alpha_row, columns, alpha_column, live)
    b = _read(beta, i, beta_row, columns, beta_column, live)
    x = (_read(actions, i, action_row, columns, action_column, live) - low) / width
    of_alpha, of_beta = beta_grad(a, b, x, g[:, None], h[:, None])  # selects by g and h itself: 0 where not live
    if d_alpha is not None:
        at = tile_offsets(i * d_alpha_row, columns, d_alpha_column, False)
        tl.store(d_alpha + at, narrow(of_alpha, d_alpha.dtype.element_ty), mask=there)
    if d_beta is not None:
        at = tile_offsets(i * d_beta_row, columns, d_beta_column, False)
        tl.store(d_beta + at, narrow(of_beta, d_beta.dtype.element_ty), mask=there)


# --- the raw calls ----------------------------------------------------------------------------------------------------


def beta_log_prob(alpha, beta, actions, low, high, log_prob, entropy, resources=None):
    n, width = log_prob.numel(), alpha.shape[-1]
    if n == 0:
        return
    (alpha, *of_alpha), (beta, *of_beta), (actions, *of_actions) = matrix(alpha), matrix(beta), matrix(actions)
    tile, columns, warps = tile_of(width, _LONGEST, _TILE)
    launch(
        beta_forward, (blocks(n, tile),), alpha, beta, actions, low, high - low, math.log(high - low), log_prob, entropy, n,
        width, *of_alpha, *of_beta, *of_actions, ROWS=tile, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip


def beta_log_prob_backward(alpha, beta, actions, low, high, d_log_prob, d_entropy, d_alpha, d_beta, resources=None):
    if alpha.numel() == 0:
        return
    width = alpha.shape[-1]
    n = alpha.numel() // width
    (alpha, *of_alpha), (beta, *of_beta), (actions, *of_actions) = matrix(alpha), matrix(beta), matrix(actions)
    d_log_prob, g_stride = vector(d_log_prob)
    d_entropy, h_stride = vector(d_entropy)
    to_alpha, *to_alpha_strides = (None, 0, 0) if d_alpha is None else matrix(d_alpha)
    to_beta, *to_beta_strides = (None, 0, 0) if d_beta is None else matrix(d_beta)
    tile, columns, warps = tile_of(width, _LONGEST, _TILE)
    launch(
        beta_backward, (blocks(n, tile), blocks(width, columns)), alpha, beta, actions, low, high - low, d_log_prob, d_entropy,
        to_alpha, to_beta, n, width, *of_alpha, *of_beta, *of_actions, g_stride, h_stride, *to_alpha_strides,
        *to_beta_strides, ROWS=tile, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    for found, wanted in ((to_alpha, d_alpha), (to_beta, d_beta)):
        if found is not wanted:
            wanted.copy_(found)


# --- compiled ahead of time, to see that they compile -----------------------------------------------------------------

_F32 = {x: "*fp32" for x in ("alpha", "beta", "actions", "log_prob", "entropy", "d_log_prob", "d_entropy", "d_alpha",
                             "d_beta")}  # fmt: skip
_HALF = _F32 | {x: "*bf16" for x in ("alpha", "beta", "d_alpha", "d_beta")}
_SMALL = {"ROWS": 16, "COLUMNS": 8}
_WIDE = {"ROWS": 2, "COLUMNS": 64}

AOT = [
    example(beta_forward, _F32, _SMALL, num_warps=4),
    example(beta_forward, _HALF, _WIDE, num_warps=4),
    example(beta_backward, _F32, _SMALL, num_warps=4),
    example(beta_backward, _HALF, _WIDE, num_warps=4),
]
