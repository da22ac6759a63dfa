"""Log-prob and entropy of diagonal normals [n, D], and the gradients of mean and log_std.

Bytes an element, float32 with a log_std that all rows share: forward 8 (mean, action), backward 12 (and the gradient of
the mean). The gradient of a shared log_std is a sum over rows: each program adds up its own, in an order that depends on
n and D only, and a second kernel adds those of the programs in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._formulas import log_tanh_slope, normal_entropy, normal_log_density
from ._launch import launch
from ._reduce import ROWS_JOINED, sum_rows
from ._rows import as_type, blocks, compute_type, example, matrix, narrow, read_vector, tile_of, tile_offsets, vector

_LONGEST = 128  # dimensions of a tile
_PARTS = ROWS_JOINED  # most programs that add up the gradient of a shared log_std: one more adds up theirs

_SIZES = [
    "n", "D", "mean_row", "mean_column", "log_std_row", "log_std_column", "action_row", "action_column",
]  # fmt: skip
_GRADIENT_SIZES = [
    "g_stride", "h_stride", "d_mean_row", "d_mean_column", "d_log_std_row", "d_log_std_column", "parts",
]  # fmt: skip


@triton.jit
def read_dimensions(x, i, row, columns, column, there, DTYPE: tl.constexpr):
    """A tile [ROWS, COLUMNS], 0 where there is none."""
    return as_type(tl.load(x + tile_offsets(i * row, columns, column, False), mask=there, other=0.0), DTYPE)


@triton.jit(do_not_specialize=_SIZES)
def normal_forward(
    mean, log_std, actions, log_prob, entropy, n: tl.int64, D: tl.int64, mean_row: tl.int64, mean_column: tl.int64,
    log_std_row: tl.int64, log_std_column: tl.int64, action_row: tl.int64, action_column: tl.int64,
    SQUASH: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = i < n
    total = tl.zeros((ROWS,), DTYPE)
    total_entropy = tl.zeros((ROWS,), DTYPE)
    first = 0
    while first < D:
        columns = first + tl.arange(0, COLUMNS)
        there = inside[:, None] & (columns < D)[None, :]
        m = read_dimensions(mean, i, mean_row, columns, mean_column, there, DTYPE)
        s = read_dimensions(log_std, i, log_std_row, columns, log_std_column, there, DTYPE)
        a = read_dimensions(actions, i, action_row, columns, action_column, there, DTYPE)
        lp = normal_log_density((a - m) * tl.exp(-s), s)
        if SQUASH:
            lp -= log_tanh_slope(a)
        total += tl.sum(tl.where(there, lp, 0.0), 1)
        total_entropy += tl.sum(tl.where(there, normal_entropy(s), 0.0), 1)
        first += COLUMNS
    tl.store(log_prob + i, total, mask=inside)
    if entropy is not None:
        if SQUASH:  # no closed form: the one-sample estimate
            total_entropy = -total
        tl.store(entropy + i, total_entropy, mask=inside)


@triton.jit(do_not_specialize=_SIZES + _GRADIENT_SIZES)
def normal_backward(
    mean, log_std, actions, d_log_prob, d_entropy, d_mean, d_log_std, sums, n: tl.int64, D: tl.int64, mean_row: tl.int64,
    mean_column: tl.int64, log_std_row: tl.int64, log_std_column: tl.int64, action_row: tl.int64, action_column: tl.int64,
    g_stride: tl.int64, h_stride: tl.int64, d_mean_row: tl.int64, d_mean_column: tl.int64, d_log_std_row: tl.int64,
    d_log_std_column: tl.int64, parts: tl.int64,
    SQUASH: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program p takes tiles p, p + parts, ... of the rows. sums [parts, D]: of a shared log_std, else absent."""
    part = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_sums = tl.zeros((ROWS, COLUMNS), DTYPE)
    tile = part
    while tile * ROWS < n:
        i = tile * ROWS + tl.arange(0, ROWS)
        inside = i < n
        g = read_vector(d_log_prob, i, g_stride, inside, DTYPE)
        h = read_vector(d_entropy, i, h_stride, inside, DTYPE)
        if SQUASH:  # the entropy there is -log_prob
            g -= h
            h = tl.zeros((ROWS,), DTYPE)
        there = inside[:, None] & (columns < D)[None, :]
        live = there & ((g != 0.0) | (h != 0.0))[:, None]
        m = read_dimensions(mean, i, mean_row, columns, mean_column, live, DTYPE)
        s = read_dimensions(log_std, i, log_std_row, columns, log_std_column, live, DTYPE)
        a = read_dimensions(actions, i, action_row, columns, action_column, live, DTYPE)
        inverse_std = tl.exp(-s)
        z = (a - m) * inverse_std
        g_z = g[:, None] * z
        if d_mean is not None:
            at = tile_offsets(i * d_mean_row, columns, d_mean_column, False)
            tl.store(d_mean + at, narrow(tl.where(live, g_z * inverse_std, 0.0), d_mean.dtype.element_ty), mask=there)
        slope = tl.where(live, g_z * z - g[:, None] + h[:, None], 0.0)
        if sums is not None:
            column_sums += slope
        elif d_log_std is not None:
            at = tile_offsets(i * d_log_std_row, columns, d_log_std_column, False)
            tl.store(d_log_std + at, narrow(slope, d_log_std.dtype.element_ty), mask=there)
        tile += parts
    if sums is not None:
        tl.store(sums + part * D + columns, tl.sum(column_sums, 0), mask=columns < D)


# --- the raw calls ----------------------------------------------------------------------------------------------------


def _parts(mean, log_std, actions):
    """Each with its strides, log_std broadcast to mean."""
    if log_std.shape != mean.shape:
        log_std = log_std.expand(mean.shape)
    (mean, *of_mean), (log_std, *of_log_std), (actions, *of_actions) = matrix(mean), matrix(log_std), matrix(actions)
    return (mean, log_std, actions), (*of_mean, *of_log_std, *of_actions)


def normal_log_prob(mean, log_std, actions, squash, log_prob, entropy, resources=None):
    n, width = log_prob.numel(), mean.shape[-1]
    if n == 0:
        return
    inputs, strides = _parts(mean, log_std, actions)
    tile, columns, warps = tile_of(width, _LONGEST)
    launch(
        normal_forward, (blocks(n, tile),), *inputs, log_prob, entropy, n, width, *strides,
        SQUASH=squash, DTYPE=compute_type(log_prob.dtype), ROWS=tile, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip


def normal_log_prob_backward(mean, log_std, actions, squash, d_log_prob, d_entropy, d_mean, d_log_std, resources=None):
    width = mean.shape[-1]
    if width == 0:
        return
    n = mean.numel() // width
    shared = d_log_std is not None and d_log_std.ndim == 1 and mean.ndim != 1
    if n == 0:
        if shared:
            d_log_std.zero_()
        return
    double = torch.float64 in (mean.dtype, log_std.dtype, actions.dtype)
    inputs, strides = _parts(mean, log_std, actions)
    d_log_prob, g_stride = vector(d_log_prob)
    d_entropy, h_stride = vector(d_entropy)
    to_mean, *of_mean = (None, 0, 0) if d_mean is None else matrix(d_mean)
    to_log_std, *of_log_std = (None, 0, 0) if d_log_std is None or shared else matrix(d_log_std)
    tile, columns, warps = tile_of(width, _LONGEST)
    parts, sums = blocks(n, tile), None
    if shared:
        parts = min(parts, _PARTS)
        sums = mean.new_empty((parts, width), dtype=torch.float64 if double else torch.float32)
    launch(
        normal_backward, (parts, blocks(width, columns)), *inputs, d_log_prob, d_entropy, to_mean, to_log_std, sums, n, width,
        *strides, g_stride, h_stride, *of_mean, *of_log_std, parts,
        SQUASH=squash, DTYPE=tl.float64 if double else tl.float32, ROWS=tile, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    if shared:
        sum_rows(sums, d_log_std)
    for found, wanted in ((to_mean, d_mean), (to_log_std, d_log_std)):
        if found is not None and found is not wanted:
            wanted.copy_(found)


# --- compiled ahead of time, to see that they compile -----------------------------------------------------------------

_F32 = {x: "*fp32" for x in ("mean", "log_std", "actions", "log_prob", "entropy", "d_log_prob", "d_entropy", "d_mean")}
_SHARED = _F32 | {"sums": "*fp32"}
_FULL = _F32 | {"mean": "*bf16", "d_mean": "*bf16", "log_std": "*bf16", "d_log_std": "*bf16"}


def _values(squash: bool, rows: int, columns: int) -> dict:
    return {"SQUASH": squash, "DTYPE": tl.float32, "ROWS": rows, "COLUMNS": columns}


AOT = [
    example(normal_forward, _F32, _values(False, 128, 8), num_warps=4),
    example(normal_forward, _FULL, _values(True, 8, 128), num_warps=4),
    example(normal_backward, _SHARED, _values(False, 128, 8), num_warps=4),
    example(normal_backward, _SHARED, _values(True, 8, 128), num_warps=4),
    example(normal_backward, _FULL, _values(True, 32, 32), num_warps=4),
]
