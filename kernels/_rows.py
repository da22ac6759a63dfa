"""Rows [n, A] of tensors with any strides: how kernels address, tile and read them, and what a row of logits comes to.

A tile holds ROWS rows of up to LONGEST_TILE elements; how many depends on the width only, so that a row has the same bits
alone and in any batch. Bytes: none of its own, each op's are in its file.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._formulas import exp_floored, softmax_entropy, softmax_exponent, softmax_grad

LONGEST_TILE = 4096  # elements of one row that a tile holds at most
_TILE = 1024  # elements of a tile of several rows
_VECTOR = 8  # elements of 16 bytes in half precision

# --- on the host ------------------------------------------------------------------------------------------------------


def blocks(n: int, size: int) -> int:
    return -(-n // size)


def tile_of(width: int, longest: int, elements: int = _TILE) -> tuple[int, int, int]:
    """(rows, columns, warps) of the tiles for rows of `width`."""
    columns = min(longest, 1 << max(width - 1, 0).bit_length())
    rows = max(1, elements // columns)
    return rows, columns, 8 if rows * columns > 2048 else 4


def merged(x: Tensor, event_ndim: int) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions, innermost first, those merged that strides allow to merge."""
    found: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[::-1][event_ndim:], x.stride()[::-1][event_ndim:], strict=True):
        if size == 1:
            continue
        if found and stride == found[-1][0] * found[-1][1]:
            found[-1] = (found[-1][0] * size, found[-1][1])
        else:
            found.append((size, stride))
    return found


def vector(x: Tensor | None) -> tuple[Tensor | None, int]:
    """One number a row, [...], as [n] with a stride; copied if it takes more than one."""
    if x is None:
        return None, 0
    lead = merged(x, 0)
    if len(lead) > 1:
        return x.contiguous(), 1
    return x, lead[0][1] if lead else 0


def matrix(x: Tensor) -> tuple[Tensor, int, int]:
    """[..., D] as [n, D] with (row stride, column stride); copied if its rows take more than one."""
    lead = merged(x, 1)
    if len(lead) > 1:
        return x.contiguous(), x.shape[-1], 1
    return x, lead[0][1] if lead else 0, x.stride(-1)


class Rows:
    """[..., A] tensors of one shape as rows of logits: a vocabulary is too large to be copied.

    Row i begins i // inner · outer + i % inner · row elements in: two strides, as `logits[:, :-1]` of [B, T, V] has them.
    A tensor that has more, or two that do not go with the first one's, is copied.
    """

    __slots__ = ("aligned", "inner", "nested", "parts")

    def __init__(self, *tensors: Tensor | None) -> None:
        leads = [[] if x is None else merged(x, 1) for x in tensors]
        self.inner = next((lead[0][0] for lead in leads if len(lead) == 2), 1)
        self.nested = self.inner > 1
        self.aligned = True  # every row begins at a multiple of _VECTOR elements and is that long
        self.parts: list[tuple[Tensor | None, int, int, int]] = []  # tensor and its strides: outer, row, column
        for x, lead in zip(tensors, leads, strict=True):
            if x is None:
                self.parts.append((None, 0, 0, 0))
                continue
            width, column = x.shape[-1], x.stride(-1)
            if len(lead) > 2 or (len(lead) == 2 and lead[0][0] != self.inner):
                x, lead, column = x.contiguous(), [(0, width)], 1
            row = lead[0][1] if lead else 0
            outer = lead[1][1] if len(lead) == 2 else self.inner * row
            self.aligned &= column == 1 and not (width | row | outer) % _VECTOR
            self.parts.append((x, outer, row, column))


def inverse_of(temperature: float, dtype: torch.dtype) -> float:
    """1/temperature, finite, so that the largest logit's (z - z)/temperature stays 0."""
    return min(1.0 / temperature, torch.finfo(dtype).max)


def compute_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype is torch.float64 else tl.float32


def example(kernel: Any, tensors: dict[str, str], values: dict[str, Any], **options: int) -> tuple:
    """For AOT: (kernel, types, constants, options); what is neither a tensor nor annotated is absent."""
    types, absent = {}, {}
    for name, parameter in inspect.signature(kernel.fn).parameters.items():
        note = str(parameter.annotation).removeprefix("tl.")
        types[name] = {"int64": "i64", "float64": "fp64"}.get(note, "constexpr")
        if name in tensors:
            types[name] = tensors[name]
        elif name not in values and types[name] == "constexpr":
            absent[name] = None
    return kernel, types, absent | values, options


# --- in kernels: addresses and reads ----------------------------------------------------------------------------------


@triton.jit
def as_type(x, DTYPE: tl.constexpr):
    """x in the compute dtype; bfloat16 goes by float32, the one way that Triton's interpreter knows."""
    if x.dtype == tl.bfloat16:
        return x.to(tl.float32).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x as it is stored; to bfloat16 by float32 too."""
    if DTYPE.is_bf16():
        return x.to(tl.float32).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def row_offsets(i, inner, outer, row, NESTED: tl.constexpr, ALIGNED: tl.constexpr):
    if ALIGNED:  # changes nothing but what the compiler knows: loads of 16 bytes are allowed
        row = row // 8 * 8
        outer = outer // 8 * 8
    if NESTED:
        return i // inner * outer + i % inner * row
    else:
        return i * row


@triton.jit
def tile_offsets(rows, columns, stride, ALIGNED: tl.constexpr):
    """[ROWS, COLUMNS] from where each row begins and which of its elements are meant."""
    if ALIGNED:
        return rows[:, None] + columns[None, :]
    else:
        return rows[:, None] + columns[None, :].to(tl.int64) * stride


@triton.jit
def width_of(A, ALIGNED: tl.constexpr):
    """A as int32; a mask made of it has the alignment of the rows."""
    A = A.to(tl.int32)
    if ALIGNED:
        A = A // 8 * 8
    return A


@triton.jit
def read_vector(x, i, stride, inside, DTYPE: tl.constexpr):
    """One number a row, 0 where absent."""
    if x is None:
        return tl.zeros(i.shape, DTYPE)
    else:
        return as_type(tl.load(x + i * stride, mask=inside, other=0.0), DTYPE)


@triton.jit
def inverse_temperature(temperatures, stride, inverse, i, inside, DTYPE: tl.constexpr):
    """1/temperature [ROWS], held finite. `inverse`: that of all rows where `temperatures` is absent."""
    if temperatures is None:
        return tl.full(i.shape, inverse, DTYPE)
    else:
        MOST: tl.constexpr = 1.7976931348623157e308 if DTYPE.is_fp64() else 3.4028234663852886e38
        found = 1.0 / as_type(tl.load(temperatures + i * stride, mask=inside, other=1.0), DTYPE)
        return tl.where(found > MOST, MOST, found)


@triton.jit
def read_actions(actions, i, stride, inside, A, ignore_index):
    """(action, whether its row is to be read, whether it is out of range)."""
    action = tl.load(actions + i * stride, mask=inside, other=0).to(tl.int64)
    if ignore_index is not None:
        inside = inside & (action != ignore_index)
    known = (action >= 0) & (action < A)
    return action, inside & known, inside & ~known


@triton.jit
def read_logits(
    logits, action_mask, row, mask_row, logits_column, mask_column, columns, there,
    ALIGNED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(a tile, -inf where an action is impossible or there is none; whether it may have a gradient).

    row, mask_row: where the tile's rows begin.
    """
    z = as_type(tl.load(logits + tile_offsets(row, columns, logits_column, ALIGNED), mask=there, other=0.0), DTYPE)
    if action_mask is not None:
        at = tile_offsets(mask_row, columns, mask_column, ALIGNED)
        there = there & (tl.load(action_mask + at, mask=there, other=0) != 0)
    return tl.where(there, z, float("-inf")), there


# --- in kernels: a row of logits --------------------------------------------------------------------------------------


@triton.jit
def softmax_result(taken, largest, inverse, total, weighted):
    """(log_prob, entropy, shift, log_sum) from what a pass leaves: Σ e^u, Σ u·e^u, u = (z - largest)/temperature.

    log_sum is inf where the row gives 0: it was not read, or no action is possible.
    """
    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    log_sum = tl.log(total)
    shift = tl.where(dead, 0.0, largest)
    log_prob = tl.where(dead, 0.0, (taken - shift) * inverse - log_sum)
    entropy = tl.where(dead, 0.0, softmax_entropy(log_sum, total, weighted))
    return log_prob, entropy, shift, tl.where(dead, float("inf"), log_sum)


@triton.jit
def fixed_sum(x, COLUMNS: tl.constexpr):
    """Σ of [1, COLUMNS], half upon half: no layout of the loads, which alignment decides, changes that order."""
    for level in tl.static_range(12):
        if (COLUMNS >> level) > 1:
            x = tl.sum(tl.reshape(x, (2, COLUMNS >> (level + 1))), 0)
    return tl.reshape(x, (1,))


@triton.jit
def finite_shift(largest):
    """The largest logit to subtract; of a row of nothing but -inf, 0."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def softmax_forward(z, columns, action, inverse):
    """`softmax_result` of a tile z [ROWS, COLUMNS], -inf where an action is impossible."""
    largest = tl.max(z, 1)  # a NaN may be lost here: it comes back through the sum
    u = softmax_exponent((z - finite_shift(largest)[:, None]) * inverse[:, None])
    e = exp_floored(u)
    taken = tl.sum(tl.where(columns[None, :] == action[:, None], z, 0.0), 1)
    return softmax_result(taken, largest, inverse, tl.sum(e, 1), tl.sum(e * u, 1))


@triton.jit
def softmax_backward(z, columns, action, inverse, shift, log_sum, entropy, g, h):
    """d/dz of g·log_prob + h·entropy for a tile."""
    g = g * inverse
    h = h * inverse
    log_p = softmax_exponent((z - shift[:, None]) * inverse[:, None] - log_sum[:, None])
    d = softmax_grad(log_p, exp_floored(log_p), entropy[:, None], g[:, None], h[:, None])
    return tl.where(columns[None, :] == action[:, None], d + g[:, None], d)
