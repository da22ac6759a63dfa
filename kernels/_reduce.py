"""Sums in a fixed order: blocks of elements leave partial results, and these are joined in the order of the blocks.

Which block an element is in depends on the number of elements alone, there are no atomics, and partial results are
float64: the same bits in every run.

Bytes: moments read x and mask, 5 an element with float32 and bool, and write 24 a block of 4096; sums of rows read 8 a number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._rows import narrow

MOMENT_BLOCK = 4096
JOIN = 1024  # partial results that one program joins
INLINE = 64  # partial moments that a consumer joins by itself: fewer launches where a launch is what takes time


def flat(x: Tensor | None) -> Tensor | None:
    """A stream as kernels walk it: element i at offset i."""
    return x if x is None or x.is_contiguous() else x.contiguous()


def rows_of(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Rows [..., A] as kernels walk them: element j of row i lies at i·row_stride + j·stride. Copies only what is no such
    grid."""
    if x is None:
        return None, 0, 0
    if x.ndim != 2:
        width = x.shape[-1]
        try:
            x = x.view(x.shape[:-1].numel(), width)
        except RuntimeError:  # leading dimensions that do not merge
            x = x.reshape(x.shape[:-1].numel(), width)
    return x, x.stride(0), x.stride(1)


@triton.jit
def store(to, x, mask):
    tl.store(to, narrow(x, to.dtype.element_ty), mask=mask)


# --- count, mean, sum of squared deviations ---------------------------------------------------------------------------


class Moments(NamedTuple):
    """float64; csrc/cpu/moments.h."""

    count: tl.tensor
    mean: tl.tensor
    m2: tl.tensor


@triton.jit
def block_moments(x, valid, count):
    """Of the valid elements of a block that lies in registers; the mean as computed first is off by its rounding, which
    the sum of the deviations from it takes back out (`drift`)."""
    some = tl.where(count > 0, count, 1.0)
    near = (tl.sum(tl.where(valid, x, 0.0)).to(tl.float64) / some).to(x.dtype)
    deviation = tl.where(valid, x - near, 0.0)
    drift = tl.sum(deviation).to(tl.float64)
    m2 = tl.sum(deviation * deviation).to(tl.float64) - drift * (drift / some)
    return Moments(count, near.to(tl.float64) + drift / some, tl.where(m2 < 0, 0.0, m2))


@triton.jit
def joined_moments(count, mean, m2):
    """Of several blocks' moments; a block that is empty has mean 0 and m2 0."""
    total = tl.sum(count)
    center = tl.sum(count * mean) / tl.where(total > 0, total, 1.0)
    gap = tl.where(count > 0, mean - center, 0.0)
    return Moments(total, center, tl.sum(m2 + count * gap * gap))


class Sums(NamedTuple):
    """Of each lane's numbers while they come by, float64: deviations from the first one, so that nothing cancels that n
    roundings do not bound. csrc/math/moments.h."""

    count: tl.tensor
    shift: tl.tensor
    drift: tl.tensor
    squares: tl.tensor


@triton.jit
def no_sums(LANES: tl.constexpr):
    zero = tl.zeros((LANES,), tl.float64)
    return Sums(zero, zero, zero, zero)


@triton.jit
def add_to_sums(sums, x, valid):
    x = tl.where(valid, x, 0.0).to(tl.float64)
    shift = tl.where(sums.count == 0, x, sums.shift)
    deviation = tl.where(valid, x - shift, 0.0)
    return Sums(sums.count + valid.to(tl.float64), shift, sums.drift + deviation, sums.squares + deviation * deviation)


@triton.jit
def moments_of_sums(sums):
    """Of all lanes together."""
    count = sums.count
    mean_drift = sums.drift / tl.where(count > 0, count, 1.0)
    m2 = sums.squares - sums.drift * mean_drift
    return joined_moments(count, sums.shift + mean_drift, tl.where(m2 < 0, 0.0, m2))


@triton.jit
def load_moments(partials, first, n, parts, LANES: tl.constexpr):
    """Joins `n` <= LANES of the `parts` partial moments [3, parts], from `first` on."""
    k = first + tl.arange(0, LANES)
    live = tl.arange(0, LANES) < n
    count = tl.load(partials + k, mask=live, other=0.0)
    mean = tl.load(partials + parts + k, mask=live, other=0.0)
    m2 = tl.load(partials + 2 * parts + k, mask=live, other=0.0)
    return joined_moments(count, mean, m2)


@triton.jit
def store_moments(partials, at, parts, m):
    tl.store(partials + at, m.count)
    tl.store(partials + parts + at, m.mean)
    tl.store(partials + 2 * parts + at, m.m2)


class Place(NamedTuple):
    """Where a block's elements are stored, which of them exist there, and which the mask keeps."""

    at: tl.tensor
    exists: tl.tensor
    valid: tl.tensor


@triton.jit
def place_of(i, inside, index, stored, mask):
    """Element i, or where there is an index its element index[i] of `stored`; one out of range counts as masked out."""
    at = i
    exists = inside
    if index is not None:
        at = tl.load(index + i, mask=inside, other=0).to(tl.int64)
        exists = inside & (at >= 0) & (at < stored)
    valid = exists
    if mask is not None:
        valid = exists & (tl.load(mask + at, mask=exists, other=0) != 0)
    return Place(at, exists, valid)


@triton.jit
def read(x, at, p, T: tl.constexpr):
    """0 where not valid. What exists is loaded all the same: by the vector, and without waiting for the mask."""
    return tl.where(p.valid, tl.load(x + at, mask=p.exists, other=0.0).to(T), 0.0)


@triton.jit
def length(n, EVEN: tl.constexpr):
    """n, a multiple of 16 where EVEN: the compiler then knows that a vector of elements ends before it does."""
    if EVEN:
        n = n // 16 * 16
    return n


@triton.jit(do_not_specialize=["n", "stored", "parts"])
def moments_kernel(
    x, mask, index, partials, n, stored, parts, EVEN: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    p = place_of(i, i < length(n, EVEN), index, stored, mask)
    values = read(x, p.at, p, T)
    count = tl.sum(p.valid.to(tl.int32)).to(tl.float64)
    store_moments(partials, block, parts, block_moments(values, p.valid, count))


@triton.jit(do_not_specialize=["parts", "joined"])
def join_moments_kernel(partials, out, parts, joined, LANES: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    store_moments(out, block, joined, load_moments(partials, block * LANES, parts - block * LANES, parts, LANES))


def moments_of(
    x: Tensor, mask: Tensor | None, index: Tensor | None, n: int, dtype: Any, most: int | None = None
) -> tuple[Tensor, int]:
    """Moments of n elements of `x`, valid by `mask`, gathered by `index`: [3, parts] with parts <= `most` (INLINE), float64.

    Reads x and mask once; launches once for up to MOMENT_BLOCK·most elements.
    """
    partials = empty_moments(max(1, triton.cdiv(n, MOMENT_BLOCK)), x.device)
    parts = partials.shape[1]
    launch(moments_kernel, (parts,), x, mask, index, partials, n, x.numel(), parts, EVEN=n % 16 == 0, T=dtype,
           BLOCK=MOMENT_BLOCK, num_warps=8)  # fmt: skip
    return joined(partials, INLINE if most is None else most)


def empty_moments(parts: int, device: torch.device) -> Tensor:
    return torch.empty((3, parts), dtype=torch.float64, device=device)


def joined(partials: Tensor, most: int, to: Tensor | None = None) -> tuple[Tensor, int]:
    """Partial moments [3, parts] as no more than `most`, and how many there are: neighbours joined, level by level. A last
    join to a single one goes `to` [3]."""
    parts = partials.shape[1]
    while parts > most:
        fewer = triton.cdiv(parts, JOIN)
        out = empty_moments(fewer, partials.device) if fewer > 1 or to is None else to.view(3, 1)
        launch(join_moments_kernel, (fewer,), partials, out, parts, fewer, LANES=JOIN, num_warps=4)
        partials, parts = out, fewer
    return partials, parts


# --- sums of rows -----------------------------------------------------------------------------------------------------

ROWS_JOINED = 256  # rows that one program adds up
_ROWS, _COLUMNS = 16, 64


@triton.jit(do_not_specialize=["parts"])
def sum_rows_kernel(partials, out, parts, width, GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out[j] = Σ of rows [j·GROUP, (j + 1)·GROUP) of partials [parts, width], COLS columns a program."""
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float64)
    for k in range(0, GROUP, ROWS):
        row = group * GROUP + k + tl.arange(0, ROWS)
        here = (row < parts)[:, None] & (column < width)[None, :]
        total += tl.load(partials + row[:, None] * width + column[None, :], mask=here, other=0.0)
    store(out + group * width + column, tl.sum(total, 0), column < width)


def sum_rows(partials: Tensor, out: Tensor) -> None:
    """out [D] = Σ over the rows of partials [parts, D], float64."""
    parts, width = partials.shape
    while True:
        joined = max(1, triton.cdiv(parts, ROWS_JOINED))
        to = out if joined == 1 else torch.empty((joined, width), dtype=torch.float64, device=out.device)
        launch(sum_rows_kernel, (joined, triton.cdiv(width, _COLUMNS)), partials, to, parts, width, GROUP=ROWS_JOINED,
               ROWS=_ROWS, COLS=_COLUMNS, num_warps=4)  # fmt: skip
        if joined == 1:
            return
        partials, parts = to, joined


_MOMENTS = {"x": "*fp32", "mask": "constexpr", "index": "constexpr", "partials": "*fp64", "n": "i32", "stored": "i32",
            "parts": "i32", "EVEN": "constexpr", "T": "constexpr", "BLOCK": "constexpr"}  # fmt: skip
_PLAIN = {"mask": None, "index": None, "EVEN": True, "T": tl.float32, "BLOCK": MOMENT_BLOCK}
_ODD = {"EVEN": False, "T": tl.float32, "BLOCK": MOMENT_BLOCK}
_DOUBLE = {"index": None, "EVEN": True, "T": tl.float64, "BLOCK": MOMENT_BLOCK}
AOT = [
    (moments_kernel, _MOMENTS, _PLAIN, {"num_warps": 8}),
    (moments_kernel, _MOMENTS | {"x": "*bf16", "mask": "*i1", "index": "*i64"}, _ODD, {"num_warps": 8}),
    (moments_kernel, _MOMENTS | {"x": "*fp64", "mask": "*fp32"}, _DOUBLE, {"num_warps": 8}),
    (join_moments_kernel, {"partials": "*fp64", "out": "*fp64", "parts": "i32", "joined": "i32", "LANES": "constexpr"},
     {"LANES": JOIN}, {"num_warps": 4}),
    (sum_rows_kernel, {"partials": "*fp64", "out": "*fp32", "parts": "i32", "width": "i32", "GROUP": "constexpr",
                       "ROWS": "constexpr", "COLS": "constexpr"},
     {"GROUP": ROWS_JOINED, "ROWS": _ROWS, "COLS": _COLUMNS}, {"num_warps": 4}),
]  # fmt: skip
