"""Log-prob and entropy of K categoricals side by side in rows [n, Σ nvec], and the gradient of the logits.

Bytes an element, float32 logits: forward 4, backward 8 (read once, written once); 12 more a head and row are kept. One
launch for all heads, whose borders lie on the device; where a head is too wide for a tile, one for each.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _reports
from ._launch import launch
from ._rows import (
    LONGEST_TILE,
    Rows,
    blocks,
    compute_type,
    example,
    read_actions,
    read_logits,
    read_vector,
    row_offsets,
    softmax_backward,
    softmax_forward,
    tile_of,
    tile_offsets,
    vector,
)
from .categorical_log_prob import categorical_log_prob_backward
from .categorical_log_prob import forward as forward_of_head

_SIZES = [
    "n", "K", "inner", "logits_outer", "logits_row", "logits_column", "mask_outer", "mask_row", "mask_column",
    "actions_outer", "actions_row", "actions_column",
]  # fmt: skip
_GRADIENT_SIZES = ["grad_outer", "grad_row", "grad_column", "g_stride", "h_stride"]


@triton.jit(do_not_specialize=_SIZES)
def multi_categorical_forward(
    logits, actions, action_mask, borders, log_prob, entropy, saved, report, n: tl.int64, K: tl.int64, inner: tl.int64,
    logits_outer: tl.int64, logits_row: tl.int64, logits_column: tl.int64, mask_outer: tl.int64, mask_row: tl.int64,
    mask_column: tl.int64, actions_outer: tl.int64, actions_row: tl.int64, actions_column: tl.int64,
    NESTED: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of rows a program, head after head."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = i < n
    columns = tl.arange(0, COLUMNS)
    row = row_offsets(i, inner, logits_outer, logits_row, NESTED, False)
    mask_row = row_offsets(i, inner, mask_outer, mask_row, NESTED, False)
    action_row = row_offsets(i, inner, actions_outer, actions_row, NESTED, False)
    one = tl.full((ROWS,), 1.0, DTYPE)
    total = tl.zeros((ROWS,), DTYPE)
    total_entropy = tl.zeros((ROWS,), DTYPE)
    refused_at = tl.full((ROWS,), -1, tl.int64)  # the first action of the row that is out of range
    refused = refused_at
    k = tl.zeros((), tl.int64)
    while k < K:
        first = tl.load(borders + k)
        width = tl.load(borders + k + 1) - first
        action, valid, bad = read_actions(actions + k * actions_column, action_row, 1, inside, width, None)
        bad = bad & (refused_at < 0)
        refused_at = tl.where(bad, i * K + k, refused_at)
        refused = tl.where(bad, action, refused)
        z, _ = read_logits(
            logits, action_mask, row + first * logits_column, mask_row + first * mask_column, logits_column, mask_column,
            columns, valid[:, None] & (columns < width)[None, :], False, DTYPE,
        )  # fmt: skip
        lp, h, shift, log_sum = softmax_forward(z, columns, action, one)
        total += lp
        total_entropy += h
        tl.store(saved + k * n + i, shift, mask=inside)
        tl.store(saved + (K + k) * n + i, log_sum, mask=inside)
        tl.store(saved + (2 * K + k) * n + i, h, mask=inside)
        k += 1
    _reports.refuse(report, refused_at, refused, refused_at >= 0)
    tl.store(log_prob + i, total, mask=inside)
    if entropy is not None:
        tl.store(entropy + i, total_entropy, mask=inside)


@triton.jit(do_not_specialize=_SIZES + _GRADIENT_SIZES)
def multi_categorical_backward(
    logits, actions, action_mask, borders, saved, d_log_prob, d_entropy, d_logits, n: tl.int64, K: tl.int64,
    inner: tl.int64, logits_outer: tl.int64, logits_row: tl.int64, logits_column: tl.int64, mask_outer: tl.int64,
    mask_row: tl.int64, mask_column: tl.int64, actions_outer: tl.int64, actions_row: tl.int64, actions_column: tl.int64,
    grad_outer: tl.int64, grad_row: tl.int64, grad_column: tl.int64, g_stride: tl.int64, h_stride: tl.int64,
    NESTED: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of rows a program, head after head."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = i < n
    columns = tl.arange(0, COLUMNS)
    row = row_offsets(i, inner, logits_outer, logits_row, NESTED, False)
    mask_row = row_offsets(i, inner, mask_outer, mask_row, NESTED, False)
    action_row = row_offsets(i, inner, actions_outer, actions_row, NESTED, False)
    grad_row = row_offsets(i, inner, grad_outer, grad_row, NESTED, False)
    g = read_vector(d_log_prob, i, g_stride, inside, DTYPE)
    h = read_vector(d_entropy, i, h_stride, inside, DTYPE)
    wanted = inside & ((g != 0.0) | (h != 0.0))
    one = tl.full((ROWS,), 1.0, DTYPE)
    k = tl.zeros((), tl.int64)
    while k < K:
        first = tl.load(borders + k)
        width = tl.load(borders + k + 1) - first
        log_sum = tl.load(saved + (K + k) * n + i, mask=wanted, other=float("inf"))
        live = wanted & (log_sum != float("inf"))
        shift = tl.load(saved + k * n + i, mask=live, other=0.0)
        entropy = tl.load(saved + (2 * K + k) * n + i, mask=live, other=0.0)
        action = tl.load(actions + k * actions_column + action_row, mask=live, other=0).to(tl.int64)
        z, possible = read_logits(
            logits, action_mask, row + first * logits_column, mask_row + first * mask_column, logits_column, mask_column,
            columns, live[:, None] & (columns < width)[None, :], False, DTYPE,
        )  # fmt: skip
        d = softmax_backward(z, columns, action, one, shift, log_sum, entropy, g, h)
        d = tl.where(possible, d, 0.0).to(d_logits.dtype.element_ty)
        at = tile_offsets(grad_row + first * grad_column, columns, grad_column, False)
        tl.store(d_logits + at, d, mask=inside[:, None] & (columns < width)[None, :])
        k += 1


# --- the raw calls ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _borders(nvec: tuple[int, ...], device: torch.device) -> Tensor:
    """[K + 1]: where each head begins. Copied to the device once, in the call that also compiles."""
    return torch.tensor([0, *nvec], dtype=torch.int64).cumsum(0).to(device)


def _heads(nvec, *tensors: Tensor | None):
    """Each head's columns of each tensor."""
    first = 0
    for width in nvec:
        yield [None if x is None else x[..., first : first + width] for x in tensors]
        first += width


def multi_categorical_log_prob(logits, actions, action_mask, nvec, log_prob, entropy, saved, resources=None):
    n = log_prob.numel()
    if n == 0:
        return
    report, K = _reports.of("multi_categorical_log_prob", logits.device), len(nvec)
    if max(nvec) > LONGEST_TILE:
        log_probs = torch.empty_like(saved[0])
        for k, (z, mask) in enumerate(_heads(nvec, logits, action_mask)):
            forward_of_head(
                z, actions[..., k], mask, None, 1.0, None, log_probs[k], saved[2, k], saved[:2, k], report, K, k
            )
        for out, heads in ((log_prob, log_probs), (entropy, saved[2])):
            if out is not None:
                out.copy_(functools.reduce(torch.add, heads).view(out.shape))
        _reports.raise_early(logits.device)
        return
    x = Rows(logits, action_mask, actions)
    (logits, *of_logits), (action_mask, *of_mask), (actions, *of_actions) = x.parts
    tile, columns, warps = tile_of(max(nvec), LONGEST_TILE)
    launch(
        multi_categorical_forward, (blocks(n, tile),),
        logits, actions, action_mask, _borders(tuple(nvec), logits.device), log_prob, entropy, saved, report, n, K,
        x.inner, *of_logits, *of_mask, *of_actions,
        NESTED=x.nested, DTYPE=compute_type(saved.dtype), ROWS=tile, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    _reports.raise_early(logits.device)


def multi_categorical_log_prob_backward(
    logits, actions, action_mask, nvec, saved, d_log_prob, d_entropy, d_logits, resources=None
):
    n = saved.shape[2]
    if n == 0:
        return
    if max(nvec) > LONGEST_TILE:
        for k, (z, mask, d) in enumerate(_heads(nvec, logits, action_mask, d_logits)):
            categorical_log_prob_backward(
                z, actions[..., k], mask, None, 1.0, saved[2, k], saved[:2, k], d_log_prob, d_entropy, d
            )
        return
    x = Rows(logits, action_mask, actions, d_logits)
    (logits, *of_logits), (action_mask, *of_mask), (actions, *of_actions), (found, *of_grad) = x.parts
    d_log_prob, g_stride = vector(d_log_prob)
    d_entropy, h_stride = vector(d_entropy)
    tile, columns, warps = tile_of(max(nvec), LONGEST_TILE)
    launch(
        multi_categorical_backward, (blocks(n, tile),),
        logits, actions, action_mask, _borders(tuple(nvec), logits.device), saved, d_log_prob, d_entropy, found, n,
        len(nvec), x.inner, *of_logits, *of_mask, *of_actions, *of_grad, g_stride, h_stride,
        NESTED=x.nested, DTYPE=compute_type(saved.dtype), ROWS=tile, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    if found is not d_logits:
        d_logits.copy_(found)


# --- compiled ahead of time, to see that they compile -----------------------------------------------------------------

_F32 = {x: "*fp32" for x in ("logits", "log_prob", "entropy", "saved", "d_log_prob", "d_entropy", "d_logits")}
_F32 |= {"actions": "*i64", "borders": "*i64", "report": "*i64"}
_MASKED = {"logits": "*bf16", "d_logits": "*bf16", "action_mask": "*i1"}
_SMALL = {"NESTED": False, "DTYPE": tl.float32, "ROWS": 128, "COLUMNS": 8}
_WIDE = {"NESTED": True, "DTYPE": tl.float32, "ROWS": 1, "COLUMNS": 4096}

AOT = [
    example(multi_categorical_forward, _F32, _SMALL, num_warps=4),
    example(multi_categorical_forward, _F32 | _MASKED, _WIDE, num_warps=8),
    example(multi_categorical_backward, _F32, _SMALL, num_warps=4),
    example(multi_categorical_backward, _F32 | _MASKED, _WIDE, num_warps=8),
]
