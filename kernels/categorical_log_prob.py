"""Log-prob and entropy of categorical rows [n, A], and the gradient of the logits.

Bytes an element, bfloat16 logits: forward 2, backward 4 (read once, written once); with a bool mask 1 more each. Rows up
to LONGEST_TILE lie in a tile and are reduced there; a longer one has a program of its own, which goes over it once with
sums relative to the largest logit so far, the next block's loads under way while one is summed. Which of the two depends
on A only. An action out of range is not read but noted: its row gives 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _reports
from ._formulas import exp_floored, softmax_exponent
from ._launch import launch
from ._rows import (
    LONGEST_TILE,
    Rows,
    as_type,
    blocks,
    compute_type,
    example,
    finite_shift,
    fixed_sum,
    inverse_of,
    inverse_temperature,
    read_actions,
    read_logits,
    read_vector,
    row_offsets,
    softmax_backward,
    softmax_forward,
    softmax_result,
    tile_of,
    tile_offsets,
    vector,
    width_of,
)

_SIZES = [
    "n", "A", "inner", "logits_outer", "logits_row", "logits_column", "mask_outer", "mask_row", "mask_column",
    "action_stride", "temperature_stride", "saved_row", "heads", "head", "ignore_index",
]  # fmt: skip
_GRADIENT_SIZES = ["grad_outer", "grad_row", "grad_column", "g_stride", "h_stride"]


@triton.jit(do_not_specialize=_SIZES)
def categorical_forward(
    logits, actions, action_mask, temperatures, inverse: tl.float64, ignore_index, log_prob, entropy, saved,
    report, n: tl.int64, A: tl.int64, inner: tl.int64, logits_outer: tl.int64, logits_row: tl.int64, logits_column: tl.int64,
    mask_outer: tl.int64, mask_row: tl.int64, mask_column: tl.int64, action_stride: tl.int64,
    temperature_stride: tl.int64, saved_row: tl.int64, heads: tl.int64, head: tl.int64,
    NESTED: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of whole rows a program. Loads are not aligned where they could be: the sums would be others.

    Row i's action is number i·heads + head in the report.
    """
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = i < n
    A = width_of(A, False)
    columns = tl.arange(0, COLUMNS)
    action, valid, bad = read_actions(actions, i, action_stride, inside, A, ignore_index)
    _reports.refuse(report, i * heads + head, action, bad)
    z, _ = read_logits(
        logits, action_mask, row_offsets(i, inner, logits_outer, logits_row, NESTED, False),
        row_offsets(i, inner, mask_outer, mask_row, NESTED, False), logits_column, mask_column, columns,
        valid[:, None] & (columns < A)[None, :], False, DTYPE,
    )  # fmt: skip
    of_temperature = inverse_temperature(temperatures, temperature_stride, inverse, i, inside, DTYPE)
    lp, h, shift, log_sum = softmax_forward(z, columns, action, of_temperature)
    tl.store(log_prob + i, lp, mask=inside)
    if entropy is not None:
        tl.store(entropy + i, h, mask=inside)
    tl.store(saved + i, shift, mask=inside)
    tl.store(saved + saved_row + i, log_sum, mask=inside)


@triton.jit
def _absorb(z, largest, total, weighted, inverse):
    """One more block [1, COLUMNS] into the sums of a row; they are brought to the largest logit so far."""
    now = tl.max(z, 1)
    grown = tl.where(now > largest, now, largest)
    if tl.sum((grown != largest).to(tl.int32), 0) != 0:  # seldom after the first blocks
        step = tl.where(largest == float("-inf"), 0.0, softmax_exponent((largest - grown) * inverse))
        factor = exp_floored(step)
        weighted = factor[:, None] * (weighted + step[:, None] * total)
        total = factor[:, None] * total
    u = softmax_exponent((z - finite_shift(grown)[:, None]) * inverse[:, None])
    e = exp_floored(u)
    return grown, total + e, weighted + e * u


@triton.jit(do_not_specialize=_SIZES)
def categorical_forward_long(
    logits, actions, action_mask, temperatures, inverse: tl.float64, ignore_index, log_prob, entropy, saved,
    report, n: tl.int64, A: tl.int64, inner: tl.int64, logits_outer: tl.int64, logits_row: tl.int64, logits_column: tl.int64,
    mask_outer: tl.int64, mask_row: tl.int64, mask_column: tl.int64, action_stride: tl.int64,
    temperature_stride: tl.int64, saved_row: tl.int64, heads: tl.int64, head: tl.int64,
    NESTED: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row a program. Blocks are [1, COLUMNS]; each of its columns has sums of its own, added up at the end."""
    i = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    inside = i < n
    A = width_of(A, ALIGNED)
    lanes = tl.arange(0, COLUMNS)
    action, valid, bad = read_actions(actions, i, action_stride, inside, A, ignore_index)
    _reports.refuse(report, i * heads + head, action, bad)
    row = row_offsets(i, inner, logits_outer, logits_row, NESTED, ALIGNED)
    of_mask = row_offsets(i, inner, mask_outer, mask_row, NESTED, ALIGNED)
    of_temperature = inverse_temperature(temperatures, temperature_stride, inverse, i, inside, DTYPE)
    taken = as_type(tl.load(logits + row + action * logits_column, mask=valid, other=0.0), DTYPE)
    if action_mask is not None:
        possible = tl.load(action_mask + of_mask + action * mask_column, mask=valid, other=0) != 0
        taken = tl.where(possible, taken, float("-inf"))

    largest = tl.full((1,), float("-inf"), DTYPE)
    total = tl.zeros((1, COLUMNS), DTYPE)
    weighted = tl.zeros((1, COLUMNS), DTYPE)
    z, _ = read_logits(
        logits, action_mask, row, of_mask, logits_column, mask_column, lanes, valid[:, None] & (lanes < A)[None, :],
        ALIGNED, DTYPE,
    )  # fmt: skip
    first = 0
    while first < A:
        first += COLUMNS
        columns = first + lanes
        ahead, _ = read_logits(
            logits, action_mask, row, of_mask, logits_column, mask_column, columns,
            valid[:, None] & (columns < A)[None, :], ALIGNED, DTYPE,
        )  # fmt: skip
        largest, total, weighted = _absorb(z, largest, total, weighted, of_temperature)
        z = ahead
    lp, h, shift, log_sum = softmax_result(
        taken, largest, of_temperature, fixed_sum(total, COLUMNS), fixed_sum(weighted, COLUMNS)
    )
    tl.store(log_prob + i, lp, mask=inside)
    if entropy is not None:
        tl.store(entropy + i, h, mask=inside)
    tl.store(saved + i, shift, mask=inside)
    tl.store(saved + saved_row + i, log_sum, mask=inside)


@triton.jit(do_not_specialize=_SIZES + _GRADIENT_SIZES)
def categorical_backward(
    logits, actions, action_mask, temperatures, inverse: tl.float64, entropy, saved, d_log_prob, d_entropy, d_logits,
    n: tl.int64, A: tl.int64, inner: tl.int64, logits_outer: tl.int64, logits_row: tl.int64, logits_column: tl.int64,
    mask_outer: tl.int64, mask_row: tl.int64, mask_column: tl.int64, action_stride: tl.int64,
    temperature_stride: tl.int64, saved_row: tl.int64, grad_outer: tl.int64, grad_row: tl.int64, grad_column: tl.int64,
    g_stride: tl.int64, h_stride: tl.int64,
    NESTED: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tile (i, j) of the gradient. It reads what it overwrites and nothing else of the logits: they may be one memory."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = i < n
    A = width_of(A, ALIGNED)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    g = read_vector(d_log_prob, i, g_stride, inside, DTYPE)
    h = read_vector(d_entropy, i, h_stride, inside, DTYPE)
    log_sum = tl.load(saved + saved_row + i, mask=inside, other=float("inf"))
    live = inside & (log_sum != float("inf")) & ((g != 0.0) | (h != 0.0))
    shift = tl.load(saved + i, mask=live, other=0.0)
    of_row = tl.zeros((ROWS,), DTYPE)
    if d_entropy is not None:
        of_row = tl.load(entropy + i, mask=live, other=0.0)
    action = tl.load(actions + i * action_stride, mask=live, other=0).to(tl.int64)
    of_temperature = inverse_temperature(temperatures, temperature_stride, inverse, i, inside, DTYPE)

    z, possible = read_logits(
        logits, action_mask, row_offsets(i, inner, logits_outer, logits_row, NESTED, ALIGNED),
        row_offsets(i, inner, mask_outer, mask_row, NESTED, ALIGNED), logits_column, mask_column, columns,
        live[:, None] & (columns < A)[None, :], ALIGNED, DTYPE,
    )  # fmt: skip
    d = softmax_backward(z, columns, action, of_temperature, shift, log_sum, of_row, g, h)
    d = tl.where(possible, d, 0.0)  # also of the row that is not live, and of an action taken against its mask
    at = tile_offsets(row_offsets(i, inner, grad_outer, grad_row, NESTED, ALIGNED), columns, grad_column, ALIGNED)
    there = inside[:, None] & (columns < A)[None, :]
    tl.store(d_logits + at, d.to(d_logits.dtype.element_ty), mask=there)


# --- the raw calls ----------------------------------------------------------------------------------------------------


def categorical_log_prob(
    logits, actions, action_mask, rows, temperature, ignore_index, log_prob, entropy, saved, resources=None
):
    report = _reports.of("categorical_log_prob", logits.device)
    forward(logits, actions, action_mask, rows, temperature, ignore_index, log_prob, entropy, saved, report)
    _reports.raise_early(logits.device)


def forward(
    logits, actions, action_mask, rows, temperature, ignore_index, log_prob, entropy, saved, report, heads=1, head=0
):
    """Of one head among `heads`, as `report` counts their actions."""
    n, width = log_prob.numel(), logits.shape[-1]
    if n == 0:
        return
    x = Rows(logits, action_mask)
    (logits, *of_logits), (action_mask, *of_mask) = x.parts
    actions, action_stride = vector(actions)
    rows, row_stride = vector(rows)
    args = (
        logits, actions, action_mask, rows, inverse_of(temperature, saved.dtype), ignore_index, log_prob, entropy, saved,
        report, n, width, x.inner, *of_logits, *of_mask, action_stride, row_stride, saved.stride(0), heads, head,
    )  # fmt: skip
    meta = {"NESTED": x.nested, "DTYPE": compute_type(saved.dtype)}
    if width > LONGEST_TILE:
        launch(categorical_forward_long, (n,), *args, **meta, ALIGNED=x.aligned, COLUMNS=LONGEST_TILE, num_warps=8)
    else:
        tile, columns, warps = tile_of(width, LONGEST_TILE)
        launch(categorical_forward, (blocks(n, tile),), *args, **meta, ROWS=tile, COLUMNS=columns, num_warps=warps)


def categorical_log_prob_backward(
    logits, actions, action_mask, rows, temperature, entropy, saved, d_log_prob, d_entropy, d_logits, resources=None
):
    n, width = saved.shape[1], logits.shape[-1]
    if n == 0:
        return
    x = Rows(logits, action_mask, d_logits)
    (logits, *of_logits), (action_mask, *of_mask), (found, *of_grad) = x.parts
    actions, action_stride = vector(actions)
    rows, row_stride = vector(rows)
    d_log_prob, g_stride = vector(d_log_prob)
    d_entropy, h_stride = vector(d_entropy)
    tile, columns, warps = tile_of(width, LONGEST_TILE)
    launch(
        categorical_backward, (blocks(n, tile), blocks(width, columns)),
        logits, actions, action_mask, rows, inverse_of(temperature, saved.dtype), entropy, saved, d_log_prob, d_entropy,
        found, n, width, x.inner, *of_logits, *of_mask, action_stride, row_stride, saved.stride(0), *of_grad, g_stride,
        h_stride,
        NESTED=x.nested, ALIGNED=x.aligned, DTYPE=compute_type(saved.dtype), ROWS=tile, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    if found is not d_logits:
        d_logits.copy_(found)


# --- compiled ahead of time, to see that they compile -----------------------------------------------------------------

_F32 = {x: "*fp32" for x in ("logits", "log_prob", "entropy", "saved", "d_log_prob", "d_entropy", "d_logits")}
_HALF = {**_F32, "logits": "*bf16", "d_logits": "*bf16"}
_F64 = {x: "*fp64" for x in _F32}
_LABELS = {"actions": "*i64", "report": "*i64"}
_MASKED = {**_LABELS, "action_mask": "*i1", "temperatures": "*fp32", "ignore_index": "i32"}


def _values(columns: int, rows: int | None = None, dtype: tl.dtype = tl.float32, nested: bool = False) -> dict:
    tile = {} if rows is None else {"ROWS": rows}
    return {"NESTED": nested, "DTYPE": dtype, **tile, "COLUMNS": columns}


_ALIGNED = {"ALIGNED": True}

AOT = [
    example(categorical_forward, _F32 | _LABELS, _values(4, 256), num_warps=4),
    example(categorical_forward, _HALF | _MASKED, _values(32, 32), num_warps=4),
    example(categorical_forward, _HALF | _LABELS, _values(4096, 1), num_warps=8),
    example(categorical_forward, _F64 | _MASKED, _values(64, 16, tl.float64), num_warps=4),
    example(categorical_forward_long, _HALF | _LABELS, _values(4096, nested=True) | _ALIGNED, num_warps=8),
    example(categorical_forward_long, _F32 | _MASKED, _values(4096) | {"ALIGNED": False}, num_warps=8),
    example(categorical_forward_long, _F64 | _LABELS, _values(4096, None, tl.float64) | _ALIGNED, num_warps=8),
    example(categorical_backward, _F32 | _LABELS, _values(4, 256) | {"ALIGNED": False}, num_warps=4),
    example(categorical_backward, _HALF | _MASKED, _values(32, 32) | _ALIGNED, num_warps=4),
    example(categorical_backward, _HALF | _LABELS, _values(4096, 1, nested=True) | _ALIGNED, num_warps=8),
    example(categorical_backward, _F64 | _MASKED, _values(64, 16, tl.float64) | _ALIGNED, num_warps=4),
]
